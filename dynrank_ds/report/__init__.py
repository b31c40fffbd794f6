"""What the ranks did in a run, as one HTML page and pictures."""

from dynrank_ds.report.page import write_report

__all__ = ["write_report"]
