"""Linears with low-rank triples: the layer, its initial values and its injection into a model."""
