"""The training loop and what it needs besides DeepSpeed."""
