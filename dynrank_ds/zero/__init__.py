"""Everything that touches DeepSpeed: processes, engines, partitioned adapters."""
