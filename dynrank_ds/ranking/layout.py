"""Where a process's adapter elements lie in one flat vector.

Weights, gradients, moments and statistics of the adapters are handled as flat fp32 vectors of the same
layout: the fragments that this process holds, one after another, all lora_A first, then lora_E, then
lora_B, each in module order. A per-triple sum over fragments is then one index_add, whatever the ZeRO
stage, and adding the processes' sums gives the sum over the whole row.

What is trained beside the triples (the magnitudes of weight-decomposed modules) is no part of these vectors, so that
methods never meet it. The optimizer has it behind them: `vector_fragments`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class ModuleShape:
    """An adapted linear: its full module name and its sides."""

    name: str
    in_features: int
    out_features: int

    def row_length(self, factor: str) -> int:
        """Return the number of elements of one triple in `factor`."""
        return {"lora_A": self.in_features, "lora_E": 1, "lora_B": self.out_features}[factor]

    def vector_length(self, vector: str) -> int:
        """Return the number of elements of a vector beside the triples."""
        return {"magnitude_offset": self.out_features}[vector]

    def triple_parameters(self, factors: Sequence[str]) -> int:
        """Return the number of parameters of one triple."""
        return sum(map(self.row_length, factors))


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of one factor or vector in row-major order, held by this process; possibly none."""

    factor: str
    module: int
    start: int
    stop: int


FragmentOf = Callable[[str, int, int], tuple[int, int]]
"""(factor, module, numel) -> [start, stop) of the factor's elements that this process holds."""


class ShardLayout:
    """The flat vector of a process: modules, their ranks, the factors they have, and the local fragments.

    vectors: names of what modules have beside the triples, at every rank.
    """

    def __init__(
        self,
        shapes: Sequence[ModuleShape],
        ranks: Sequence[int],
        factors: Sequence[str],
        fragment_of: FragmentOf,
        device: torch.device | str = "cpu",
        vectors: Sequence[str] = (),
    ) -> None:
        self.shapes, self.ranks, self.factors = tuple(shapes), tuple(ranks), tuple(factors)
        self.vectors = tuple(vectors)
        self.device = torch.device(device)
        self.fragments = tuple(
            Fragment(factor, module, *fragment_of(factor, module, rank * shape.row_length(factor)))
            for factor in factors
            for module, (shape, rank) in enumerate(zip(shapes, ranks, strict=True))
            if rank > 0
        )
        self.vector_fragments = tuple(
            Fragment(vector, module, *fragment_of(vector, module, shape.vector_length(vector)))
            for vector in vectors
            for module, shape in enumerate(shapes)
        )

    @property
    def all_fragments(self) -> tuple[Fragment, ...]:
        """Those of the triples and, behind them, those of the vectors."""
        return self.fragments + self.vector_fragments

    @property
    def total_rank(self) -> int:
        return sum(self.ranks)

    @cached_property
    def numel(self) -> int:
        """Elements of triples that this process holds."""
        return sum(f.stop - f.start for f in self.fragments)

    @property
    def trainable_parameters(self) -> int:
        """Elements over all processes."""
        return sum(
            rank * shape.triple_parameters(self.factors)
            for shape, rank in zip(self.shapes, self.ranks, strict=True)
        ) + sum(shape.vector_length(vector) for vector in self.vectors for shape in self.shapes)

    def row_length(self, of: Fragment) -> int:
        """Return the length of the rows of a fragment's factor; a vector is one row."""
        shape = self.shapes[of.module]
        return shape.vector_length(of.factor) if of.factor in self.vectors else shape.row_length(of.factor)

    def rows(self, of: Fragment) -> int:
        """Return the number of rows of a fragment's factor; a vector is one row."""
        return 1 if of.factor in self.vectors else self.ranks[of.module]

    @cached_property
    def module_of_triple(self) -> Tensor:
        """(total_rank,) int64: the module of every triple, triples in module order."""
        return torch.repeat_interleave(torch.arange(len(self.ranks)), torch.tensor(self.ranks)).to(
            self.device
        )

    @cached_property
    def row_ids(self) -> Tensor:
        """(numel,) int64: factor index * total_rank + triple, for every local element."""
        first_triple = [0, *torch.tensor(self.ranks).cumsum(0).tolist()]
        pieces = []
        for fragment in self.fragments:
            length = self.shapes[fragment.module].row_length(fragment.factor)
            base = self.factors.index(fragment.factor) * self.total_rank + first_triple[fragment.module]
            pieces.append(torch.arange(fragment.start, fragment.stop) // length + base)
        return torch.cat(pieces).to(self.device) if pieces else torch.empty(0, dtype=torch.int64)

    @cached_property
    def input_ids(self) -> Tensor:
        """(elements of lora_A held here,) int64: input feature of each, modules' features one after another."""
        first_input = [0, *torch.tensor([s.in_features for s in self.shapes]).cumsum(0).tolist()]
        pieces = [
            torch.arange(f.start, f.stop) % self.shapes[f.module].in_features + first_input[f.module]
            for f in self.fragments
            if f.factor == "lora_A"
        ]
        return torch.cat(pieces).to(self.device)

    def factor(self, flat: Tensor, name: str) -> Tensor:
        """Return the part of a flat vector that belongs to factor `name`."""
        start = sum(f.stop - f.start for f in self.fragments if f.factor in self._before(name))
        length = sum(f.stop - f.start for f in self.fragments if f.factor == name)
        return flat[start : start + length]

    def _before(self, name: str) -> tuple[str, ...]:
        return self.factors[: self.factors.index(name)]

    def split(self, flat: Tensor) -> list[Tensor]:
        """Return views of a flat vector, one a fragment."""
        return list(flat.split([f.stop - f.start for f in self.fragments]))

    def row_sums(self, flat: Tensor) -> Tensor:
        """Return (len(factors), total_rank) fp64: this process's part of the sum over each triple's row."""
        sums = torch.zeros(len(self.factors) * self.total_rank, dtype=torch.float64, device=flat.device)
        return sums.index_add_(0, self.row_ids, flat.double()).view(len(self.factors), self.total_rank)

    def module_sums(self, row_values: Tensor) -> Tensor:
        """Sum (..., total_rank) over the triples of each module: (..., modules)."""
        out = row_values.new_zeros(*row_values.shape[:-1], len(self.ranks))
        return out.index_add_(-1, self.module_of_triple, row_values)

    def row_lengths(self) -> Tensor:
        """Return (len(factors), total_rank) fp64: elements in each triple's row of each factor."""
        lengths = torch.tensor(
            [[shape.row_length(factor) for shape in self.shapes] for factor in self.factors],
            dtype=torch.float64,
        )
        return lengths.to(self.device)[:, self.module_of_triple]

    def by_module(self, row_values: Tensor) -> list[Tensor]:
        """Split (total_rank,) into one CPU tensor per module."""
        return list(row_values.cpu().split(list(self.ranks)))


def whole(factor: str, module: int, numel: int) -> tuple[int, int]:
    """Return the fragment of a process that holds everything."""
    return 0, numel
