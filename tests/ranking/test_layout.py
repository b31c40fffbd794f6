from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrank_ds.ranking.layout import ModuleShape, ShardLayout, whole
from dynrank_ds.zero.shards import zero3_rules
from tests.ranking.thread_processes import shard

FACTORS = ("lora_A", "lora_E", "lora_B")
SHAPES = (ModuleShape("a", 7, 5), ModuleShape("b", 4, 9), ModuleShape("c", 3, 3), ModuleShape("d", 6, 2))
RANKS = (3, 1, 0, 4)
SIDES = {"lora_A": (7, 4, 3, 6), "lora_E": (1, 1, 1, 1), "lora_B": (5, 9, 3, 2)}


def random_factors() -> dict[str, list[torch.Tensor]]:
    """{factor: one (rank, row) tensor a module that has triples}"""
    torch.manual_seed(0)
    return {
        f: [torch.randn(r, n, dtype=torch.float64) for r, n in zip(RANKS, SIDES[f], strict=True) if r]
        for f in FACTORS
    }


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_processes_row_sums_add_up_to_whole_rows(size: int) -> None:
    full = random_factors()
    expected = torch.stack([torch.cat([module.sum(1) for module in full[f]]) for f in FACTORS])
    summed = torch.zeros_like(expected)
    for rank in range(size):
        layout = ShardLayout(SHAPES, RANKS, FACTORS, zero3_rules((), (), (), size)[rank])
        flat = shard([module for f in FACTORS for module in full[f]], rank, size)
        assert layout.numel == flat.numel()
        summed += layout.row_sums(flat)
    torch.testing.assert_close(summed, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_each_element_of_lora_a_knows_its_input_feature(size: int) -> None:
    features = torch.arange(20)  # 7 + 4 + 3 + 6
    rows = [features[:7].repeat(3), features[7:11], features[14:].repeat(4)]
    for rank in range(size):
        layout = ShardLayout(SHAPES, RANKS, FACTORS, zero3_rules((), (), (), size)[rank])
        assert torch.equal(layout.input_ids, shard(rows, rank, size))


def test_factor_and_split_are_views_of_the_flat_vector() -> None:
    layout = ShardLayout(SHAPES, RANKS, FACTORS, whole)
    full = random_factors()
    flat = torch.cat([module.flatten() for f in FACTORS for module in full[f]])
    for factor in FACTORS:
        part = layout.factor(flat, factor)
        assert torch.equal(part, torch.cat([module.flatten() for module in full[factor]]))
        part.zero_()
    assert not flat.any()
    assert [len(piece) for piece in layout.split(flat)] == [21, 4, 24, 3, 1, 4, 15, 9, 8]


def test_counts_and_sums_by_module() -> None:
    layout = ShardLayout(SHAPES, RANKS, FACTORS, whole)
    assert layout.total_rank == 8
    assert layout.trainable_parameters == 49 + 8 + 32
    assert layout.module_of_triple.tolist() == [0, 0, 0, 1, 3, 3, 3, 3]
    per_triple = torch.arange(8.0)
    assert layout.module_sums(per_triple).tolist() == [3.0, 3.0, 0.0, 22.0]
    assert [part.tolist() for part in layout.by_module(per_triple)] == [[0, 1, 2], [3], [], [4, 5, 6, 7]]
    assert layout.row_lengths()[:, 3].tolist() == [4, 1, 9]


@settings(max_examples=40, deadline=None)
@given(
    modules=st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=4
    ).filter(lambda modules: any(rank for _, _, rank in modules)),
    size=st.integers(1, 7),
)
def test_fragments_cover_every_element_exactly_once(modules: list[tuple[int, int, int]], size: int) -> None:
    shapes = [ModuleShape(str(i), n_in, n_out) for i, (n_in, n_out, _) in enumerate(modules)]
    ranks = [rank for _, _, rank in modules]
    seen: dict[tuple[str, int], list[int]] = {}
    for rank in range(size):
        for f in ShardLayout(shapes, ranks, FACTORS, zero3_rules((), (), (), size)[rank]).fragments:
            seen.setdefault((f.factor, f.module), []).extend(range(f.start, f.stop))
    expected = {
        (factor, b): list(range(rank * {"lora_A": n_in, "lora_E": 1, "lora_B": n_out}[factor]))
        for factor in FACTORS
        for b, (n_in, n_out, rank) in enumerate(modules)
        if rank
    }
    assert seen == expected
