"""The two forms in which a PiSSA adapter leaves a run.

Against the base as it is, an adapter of rank up to 2 r: what training changed, s (B^T diag(e) A - B0^T diag(e0) A0).
And in PiSSA's own form, a base without the initial triples and the trained triples beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from dynrank_ds.checkpoint.adapter import LinearShape, TrainedAdapter
from dynrank_ds.errors import RunError
from dynrank_ds.export.base_model import model_hash
from dynrank_ds.export.folder import RECORD
from dynrank_ds.export.low_rank import svd
from dynrank_ds.export.merge import merge_adapter
from dynrank_ds.export.model_card import provenance
from dynrank_ds.export.peft_adapter import Update
from dynrank_ds.export.peft_writer import write_adapter

ADAPTER, RESIDUAL = "adapter", "residual_model"
"""Folders of PiSSA's own form."""


class _Source:
    """What the three sources of triples below have in common."""

    weight_decomposed = False

    def __init__(self, adapter: TrainedAdapter) -> None:
        self._adapter = adapter
        self.description, self.base_model = adapter.description, adapter.base_model
        self.linears: Mapping[str, LinearShape] = adapter.linears

    def magnitudes(self, name: str) -> None:
        """Return None: PiSSA's linears have no magnitudes."""


class ChangeSource(_Source):
    """What training changed, as triples against the base as it is.

    Written as the SVD of the difference: both of its terms are as large as the principal part of the weight, and
    rounded one by one to 16 bits they would leave little of it.
    """

    def __init__(self, adapter: TrainedAdapter) -> None:
        super().__init__(adapter)
        self.linears = {
            name: replace(shape, rank=self._rank(name, shape)) for name, shape in adapter.linears.items()
        }

    def triples(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A (n, in) and B (n, out) of a linear of rank n > 0, in fp32: the change is scale * B^T A."""
        a, b = self._adapter.triples(name)
        if name in self._adapter.subtracted:
            initial_a, initial_b = self._adapter.subtracted_triples(name)
            a, b = torch.cat([a, initial_a]), torch.cat([b, -initial_b])
            u, singular, vt = svd(Update(a, b.T, 1.0))
            root = singular.sqrt()[:, None]
            a, b = (vt * root).float(), (u.T * root).float()
        return a.contiguous(), b.contiguous()

    def _rank(self, name: str, shape: LinearShape) -> int:
        subtracted = self._adapter.subtracted.get(name, 0)
        if not subtracted:
            return shape.rank
        return min(shape.rank + subtracted, shape.in_features, shape.out_features)


class _MinusInitial(_Source):
    """The initial triples with their sign changed: what makes the residual base of the base."""

    def __init__(self, adapter: TrainedAdapter) -> None:
        super().__init__(adapter)
        self.linears = {
            name: replace(adapter.linears[name], rank=count) for name, count in adapter.subtracted.items()
        }

    def triples(self, name: str) -> tuple[Tensor, Tensor]:
        a, b = self._adapter.subtracted_triples(name)
        return a, -b


class _Trained(_Source):
    """The trained triples, for the residual base."""

    def __init__(self, adapter: TrainedAdapter, base: Path) -> None:
        super().__init__(adapter)
        self.base_model = str(base)

    def triples(self, name: str) -> tuple[Tensor, Tensor]:
        return self._adapter.triples(name)


def write_residual_form(adapter: TrainedAdapter, folder: Path, final: Path, dtype: torch.dtype) -> None:
    """Write FOLDER/residual_model, W - s B0^T diag(e0) A0 in the base's dtype, and FOLDER/adapter, the trained triples.

    final: the name that `folder` gets, by which the adapter names its base.

    Raises:
        RunError, ModelError: there are no initial triples, or the base cannot be read or is another one.
    """
    if not adapter.subtracted:
        raise RunError(
            f"{adapter.description} subtracts no initial triples, so that its residual base would be the base: export "
            "it as peft or padded"
        )
    (folder / ADAPTER).mkdir()
    write_adapter(_Trained(adapter, final / RESIDUAL), folder / ADAPTER, "peft", dtype)
    with TemporaryDirectory(dir=folder) as minus:
        write_adapter(_MinusInitial(adapter), Path(minus), "peft", torch.float32)
        (Path(minus) / RECORD).write_text(json.dumps(provenance(adapter)))  # by which another base is refused
        merge_adapter(Path(minus), adapter.base_model, folder / RESIDUAL)
    of_residual = {"base_model": str(final / RESIDUAL), "base_model_hash": model_hash(folder / RESIDUAL)}
    (folder / ADAPTER / RECORD).write_text(json.dumps(provenance(adapter) | of_residual, indent=2) + "\n")
