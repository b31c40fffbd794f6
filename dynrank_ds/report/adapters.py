"""A figure of what the trained adapters use of their ranks."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.colors import Normalize
from torch import Tensor

from dynrank_ds.checkpoint.adapter import TrainedAdapter
from dynrank_ds.report.canvas import ORDERED, Plot, colour_bar, title
from dynrank_ds.report.grids import layer_grid, write_numbers
from dynrank_ds.report.places import kinds_of, labels, place
from dynrank_ds.report.record import RunRecord


def effective_rank(a: Tensor, b: Tensor) -> float:
    """Return exp of the entropy of the normalised singular values of B^T A, for A (r, in) and B (r, out).

    Roy and Vetterli, "The effective rank", EUSIPCO 2007. 0 where B^T A is 0.
    """
    values = torch.linalg.svdvals(torch.linalg.qr(b.double().T).R @ torch.linalg.qr(a.double().T).R.T)
    shares = values[values > 0] / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum())) if len(shares) else 0.0


def effective_ranks(record: RunRecord) -> list[tuple[str, int, float]]:
    """Return name, rank and effective rank of every linear in the newest checkpoint; empty where there is none."""
    if record.checkpoint is None:
        return []
    with TrainedAdapter(record.checkpoint) as adapter:
        return [
            (name, shape.rank, effective_rank(*adapter.triples(name)) if shape.rank else 0.0)
            for name, shape in adapter.linears.items()
        ]


def utilisation_plots(rows: list[tuple[str, int, float]]) -> list[Plot]:
    """Return the figure of `effective_ranks`; none where no linear has a triple."""
    if not any(rank for _, rank, _ in rows):
        return []
    names = [name for name, _, _ in rows]
    kinds, layers = kinds_of(names), sorted({place(name).layer for name in names})
    used = np.full((len(kinds), len(layers)), np.nan)
    for name, rank, effective in rows:
        if rank:
            used[kinds.index(place(name).kind), layers.index(place(name).layer)] = effective / rank
    figure, panels, image = layer_grid(labels(kinds), layers, used, (ORDERED, Normalize(0, 1)))
    numbers = np.where(np.isnan(used), "", np.char.mod("%.2f", np.nan_to_num(used))).astype(object)
    write_numbers(panels, numbers, used < 0.6)
    title(panels[0], f"Rank utilisation of every linear: {utilisation_text(rows)}")
    colour_bar(figure, panels, image, "effective rank / rank")
    return [
        Plot(
            "utilisation",
            figure,
            "Effective rank divided by rank of every adapted linear",
            "Utilisation is effective rank / rank: 1 where all singular values of B^T A are equal, 1 / rank where one "
            "outweighs all others. Effective rank: exp of the entropy of the normalised singular values, in the newest "
            "checkpoint (Roy and Vetterli, 2007). Compare PE-DyRA, Fig. 1a, whose paper does not say how it computes "
            "effective rank; this definition is ours. Triples of all heads of a linear count together.",
            ("linear", "rank", "effective rank"),
            rows,
        )
    ]


def utilisation_text(rows: list[tuple[str, int, float]]) -> str:
    """Return `effective rank 61 of 144, 42 %`, over all linears."""
    total, effective = sum(rank for _, rank, _ in rows), sum(value for _, _, value in rows)
    return f"effective rank {effective:.0f} of {total:,}, {100 * effective / total:.0f} %"
