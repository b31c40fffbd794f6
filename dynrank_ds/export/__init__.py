"""From a run to what other engines load: PEFT adapter folders and merged models."""

from dynrank_ds.export.adapter_formats import export_adapter, export_checkpoint
from dynrank_ds.export.merge import merge_adapter

__all__ = ["export_adapter", "export_checkpoint", "merge_adapter"]
