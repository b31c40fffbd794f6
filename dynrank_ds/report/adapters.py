"""A figure of what the trained adapters use of their ranks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dynrank_ds.checkpoint.adapter import TrainedAdapter
from dynrank_ds.report.canvas import INK, ORDERED, Plot, canvas, colour_bar, title
from dynrank_ds.report.places import NOWHERE, kinds_of, labels, place
from dynrank_ds.report.record import RunRecord


def effective_rank(a: Tensor, b: Tensor) -> float:
    """Return exp of the entropy of the normalised singular values of B^T A, for A (r, in) and B (r, out).

    Roy and Vetterli, "The effective rank", EUSIPCO 2007. 0 where B^T A is 0.
    """
    values = torch.linalg.svdvals(torch.linalg.qr(b.double().T).R @ torch.linalg.qr(a.double().T).R.T)
    shares = values[values > 0] / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum())) if len(shares) else 0.0


def adapter_plots(record: RunRecord) -> list[Plot]:
    """Return the figure of effective ranks in the newest checkpoint; none where there is no checkpoint with triples."""
    if record.checkpoint is None or not any(record.end.values()):
        return []
    with TrainedAdapter(record.checkpoint) as adapter:
        rows = [
            (name, shape.rank, effective_rank(*adapter.triples(name)) if shape.rank else 0.0)
            for name, shape in adapter.linears.items()
        ]
    names = [name for name, _, _ in rows]
    kinds, layers = kinds_of(names), sorted({place(name).layer for name in names})
    used = np.full((len(kinds), len(layers)), np.nan)
    for name, rank, effective in rows:
        if rank:
            used[kinds.index(place(name).kind), layers.index(place(name).layer)] = effective / rank
    figure, [axes] = canvas(width=2.6 + 0.36 * max(len(layers), 16), height=1.7 + 0.4 * len(kinds))
    image = axes.imshow(used, cmap=ORDERED, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for row, column in np.argwhere(~np.isnan(used)):
        colour = INK if used[row, column] > 0.6 else "white"
        axes.text(column, row, f"{used[row, column]:.1f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(layers)), ["none" if layer == NOWHERE else str(layer) for layer in layers])
    axes.set_yticks(range(len(kinds)), labels(kinds))
    axes.tick_params(length=0)
    axes.set_xlabel("layer")
    total, effective = sum(rank for _, rank, _ in rows), sum(value for _, _, value in rows)
    title(axes, f"Effective rank by rank: the adapters use {effective:.0f} of {total} ranks")
    colour_bar(figure, axes, image, "effective rank / rank")
    return [
        Plot(
            "effective_rank",
            figure,
            "Effective rank by rank of every adapted linear",
            "Effective rank: exp of the entropy of the normalised singular values of B^T A in the newest checkpoint "
            "(Roy and Vetterli, 2007); heads with ranks of their own are counted together. Compare PE-DyRA, Fig. 1a.",
            ("linear", "rank", "effective rank"),
            rows,
        )
    ]
