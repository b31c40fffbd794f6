"""What works on a machine's GPUs: short runs of everything that needs one, and a table of what passed."""
