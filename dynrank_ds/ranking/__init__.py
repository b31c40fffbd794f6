"""Ranking triples: where their elements lie, what is accumulated of them, what is done with the ranks."""
