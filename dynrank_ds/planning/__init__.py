"""What a run will need, from its recipe and its model's architecture alone: memory, traffic, time."""
