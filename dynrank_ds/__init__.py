"""Fine-tuning of large language models on DeepSpeed with low-rank adapters whose ranks change."""
