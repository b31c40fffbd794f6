"""The benchmarks behind the figures that the project states: `python -m dynrank_ds.bench [name ...] [--quick]`."""
