"""Checkpoints: one safetensors file and one JSON, complete or absent.

`files` names and checks them, `keys` names the tensors in them, `writing` and `reading` are the two ways between a
checkpoint and a run, and `adapter` reads the trained triples alone, which needs neither DeepSpeed nor the base model.
"""
