"""A rank change is physical: what processes hold after it has exactly the new ranks' elements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import outcomes
from tests.support.recipes import lines

IN_OUT = {
    "q_proj": (36, 36),
    "k_proj": (36, 18),
    "v_proj": (36, 18),
    "o_proj": (36, 36),
    "gate_proj": (36, 52),
    "up_proj": (36, 52),
    "down_proj": (52, 36),
}
STATES = ("master", "half", "exp_avg", "exp_avg_sq")


def elements(ranks: dict[str, int]) -> dict[str, int]:
    """{module.factor: elements} by the shapes of the tiny model."""
    out = {}
    for module, rank in ranks.items():
        inputs, outputs = IN_OUT[module.rsplit(".", 1)[-1]]
        out |= {
            f"{module}.lora_A": rank * inputs,
            f"{module}.lora_E": rank,
            f"{module}.lora_B": rank * outputs,
        }
    return out


@pytest.fixture(params=["fp32", "bf16"])
def adjustments(request: pytest.FixtureRequest, shards: Path) -> list[tuple[dict[str, int], list[Any]]]:
    """For each adjustment: elements by ranks.jsonl, and what each of the two processes held after it."""
    run = shards / request.param
    logged = lines(run / "ranks.jsonl")
    held = outcomes(run, "held", 2)
    assert [line["step"] for line in logged] == [4, 7, 10, 13, 16]
    assert all(line["before"] != line["after"] for line in logged)
    return [(elements(line["after"]), [h[i] for h in held]) for i, line in enumerate(logged)]


def test_each_parameter_has_the_elements_of_its_rank(adjustments: Any) -> None:
    for expected, held in adjustments:
        for process in held:
            assert {name: factor["numel"] for name, factor in process["factors"].items()} == expected


def test_master_moments_and_half_precision_copy_shrink_and_grow_with_their_parameter(
    adjustments: Any,
) -> None:
    for expected, held in adjustments:
        for name, numel in expected.items():
            padding = numel % 2
            for state in STATES:
                assert sum(process["factors"][name][state] for process in held) - padding == numel, (
                    name,
                    state,
                )


def test_no_element_is_left_over_anywhere_in_the_optimizer(adjustments: Any) -> None:
    for expected, held in adjustments:
        padded = sum(numel + numel % 2 for numel in expected.values())
        for state in ("master", "exp_avg", "exp_avg_sq"):
            assert sum(process["all"][state] for process in held) == padded


def test_half_precision_copy_is_the_rounded_master_after_every_change(adjustments: Any) -> None:
    for _, held in adjustments:
        assert all(factor["half_is_master"] for process in held for factor in process["factors"].values())
