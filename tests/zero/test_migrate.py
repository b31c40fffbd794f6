"""Rows on the move between simulated processes; the real collectives are tested with the engine."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from dynrank_ds.ranking.layout import ModuleShape, ShardLayout, whole
from dynrank_ds.ranking.plan import RankPlan
from dynrank_ds.zero import migrate as moving
from dynrank_ds.zero.migrate import migrate, migrate_vectors, module_sizes, portions
from dynrank_ds.zero.shards import zero2_rules, zero3_rules
from tests.ranking.thread_processes import ThreadProcess, run_in_threads, shard

FACTORS = ("lora_A", "lora_E", "lora_B")
SHAPES = tuple(
    ModuleShape(str(i), n_in, n_out) for i, (n_in, n_out) in enumerate([(7, 5), (4, 9), (3, 3), (6, 2)])
)
BEFORE = (3, 2, 0, 4)
PLAN = RankPlan(keep=((0, 2), (0, 1), (), (1,)), new=(2, 0, 1, 0))
AFTER = (4, 2, 1, 1)
STATES = 3  # weights and both moments


def new_rows(module: int, count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(module)
    shape = SHAPES[module]
    return {
        "lora_A": torch.randn(count, shape.in_features, generator=generator),
        "lora_E": torch.randn(count, generator=generator),
        "lora_B": torch.randn(count, shape.out_features, generator=generator),
    }


def whole_states(ranks: tuple[int, ...]) -> dict[tuple[str, int], Tensor]:
    """{(factor, module): (states, rank, row)}"""
    torch.manual_seed(0)
    return {
        (factor, b): torch.randn(STATES, rank, SHAPES[b].row_length(factor)).relu().neg()  # -0 too
        for factor in FACTORS
        for b, rank in enumerate(ranks)
    }


def indexed(full: dict[tuple[str, int], Tensor]) -> dict[tuple[str, int], Tensor]:
    """The plan by plain indexing of whole tensors."""
    out = {}
    for (factor, b), states in full.items():
        fresh = torch.zeros(STATES, PLAN.new[b], states.shape[2])
        fresh[0] = new_rows(b, PLAN.new[b])[factor].reshape(fresh[0].shape)
        out[factor, b] = torch.cat([states[:, list(PLAN.keep[b])], fresh], dim=1)
    return out


def held(full: dict[tuple[str, int], Tensor], rank: int, size: int) -> Tensor:
    present = [value for value in full.values() if value.shape[1]]
    return torch.stack([shard([value[n] for value in present], rank, size) for n in range(STATES)])


def held_flat(full: dict[tuple[str, int], Tensor], rank: int, size: int) -> Tensor:
    """ZeRO-2: all tensors behind one another, padded to a multiple of 2 * size, in equal pieces."""
    whole = torch.cat([value.flatten(1) for value in full.values()], dim=1)
    piece = -(-whole.shape[1] // (2 * size)) * 2
    return whole[:, rank * piece : (rank + 1) * piece]


STAGES = {2: (zero2_rules, held_flat), 3: (zero3_rules, held)}


def rows_of_plan(module: int, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    assert {f: rows.shape[0] for f, rows in old.items()} == {
        f: BEFORE[module] for f in FACTORS if BEFORE[module]
    }
    return new_rows(module, PLAN.new[module])


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("gathered_at_once", [1, 2**21])
def test_migrating_shards_equals_indexing_whole_tensors(
    stage: int, size: int, gathered_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moving, "GATHERED_AT_ONCE", gathered_at_once)
    full = whole_states(BEFORE)
    expected = indexed(full)
    rules_of, held = STAGES[stage]
    before, after = (rules_of(SHAPES, ranks, FACTORS, size) for ranks in (BEFORE, AFTER))

    def work(process: ThreadProcess) -> tuple[Tensor, dict[int, dict[str, Tensor]]]:
        old = ShardLayout(SHAPES, BEFORE, FACTORS, before[process.rank])
        new = ShardLayout(SHAPES, AFTER, FACTORS, after[process.rank])
        mine = held(full, process.rank, size)
        return migrate(mine, old, new, PLAN, rows_of_plan, (before, after), process.all_reduce_sum)

    for rank, (states, changed) in enumerate(run_in_threads(size, work)):
        assert torch.equal(states.view(torch.int32), held(expected, rank, size).view(torch.int32))
        assert set(changed) == {0, 2, 3}
        for module, factors in changed.items():
            for factor, weights in factors.items():
                assert torch.equal(weights.flatten(), expected[factor, module][0].flatten())


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_vectors_stay_as_they_are_while_triples_before_them_come_and_go(stage: int, size: int) -> None:
    vectors = ("magnitude_offset",)
    beside = {(vectors[0], b): torch.randn(STATES, 1, shape.out_features) for b, shape in enumerate(SHAPES)}
    full = whole_states(BEFORE)
    rules_of, held = STAGES[stage]
    before, after = (rules_of(SHAPES, ranks, FACTORS, size, vectors) for ranks in (BEFORE, AFTER))

    def work(process: ThreadProcess) -> tuple[Tensor, Tensor]:
        old = ShardLayout(SHAPES, BEFORE, FACTORS, before[process.rank], vectors=vectors)
        new = ShardLayout(SHAPES, AFTER, FACTORS, after[process.rank], vectors=vectors)
        rules, mine = (before, after), held(full | beside, process.rank, size)
        states, _ = migrate(mine[:, : old.numel], old, new, PLAN, rows_of_plan, rules, process.all_reduce_sum)
        behind = sum(f.stop - f.start for f in old.vector_fragments)
        moved = mine[:, old.numel : old.numel + behind]
        return states, migrate_vectors(moved, old, new, rules, process.all_reduce_sum)

    for rank, parts in enumerate(run_in_threads(size, work)):
        assert torch.equal(torch.cat(parts, dim=1), held(indexed(full) | beside, rank, size))


def test_survivors_keep_their_rows_and_new_rows_have_zero_moments() -> None:
    full = whole_states(BEFORE)
    rules = zero3_rules(SHAPES, BEFORE, FACTORS, 1)
    old, new = (ShardLayout(SHAPES, ranks, FACTORS, rules[0]) for ranks in (BEFORE, AFTER))
    states, _ = migrate(held(full, 0, 1), old, new, PLAN, rows_of_plan, (rules, rules), lambda flat: flat)
    a = states[:, : 4 * 7].view(STATES, 4, 7)  # lora_A of module 0, the first of the layout
    assert torch.equal(a[:, :2], full["lora_A", 0][:, [0, 2]])
    assert torch.equal(a[0, 2:], new_rows(0, 2)["lora_A"])
    assert not a[1:, 2:].any()


def test_modules_are_gathered_in_groups_of_bounded_size_and_larger_ones_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes = [ModuleShape(str(i), 3, 1) for i in range(5)]
    layout = ShardLayout(shapes, (2, 1, 0, 9, 1), ("lora_A", "lora_B"), whole)
    monkeypatch.setattr(moving, "GATHERED_AT_ONCE", 24)
    # Two states of 4 elements a triple: 16, 8, 0, 72 and 8 elements.
    sizes = module_sizes(layout, layout.fragments)
    assert list(portions(range(5), sizes, 2)) == [[0, 1, 2], [3], [4]]
    assert list(portions([4, 0], sizes, 2)) == [[4, 0]]
