"""What the ranks did in a run, as one HTML page and pictures."""

from dynrank_ds.report.page import write_report
from dynrank_ds.report.watch import watch_report

__all__ = ["watch_report", "write_report"]
