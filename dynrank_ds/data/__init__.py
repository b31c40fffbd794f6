"""From a data source to the batches of a training step: read, format, tokenise once, order, collate."""
