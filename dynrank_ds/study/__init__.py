"""Studies: many runs of several methods, each with its learning rate tuned, compared on the same problems."""
