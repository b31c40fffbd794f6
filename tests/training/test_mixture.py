"""Several sources: each has its share of every global batch, whatever was asked before, and the log counts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrank_ds.data.batching import MixedBatches
from dynrank_ds.errors import DataError, RecipeError
from dynrank_ds.recipe import Recipe, check_recipe
from dynrank_ds.training.resume import data_hash, fingerprints
from dynrank_ds.training.samples import make_batches, prepare_data, split_held_out
from tests.support.launch import train
from tests.support.tiny import write_data, write_model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_model(tmp_path / "model")
    write_data(tmp_path / "a.jsonl", samples=30, longest=20, seed=1)
    write_data(tmp_path / "b.jsonl", samples=12, longest=20, seed=2)
    monkeypatch.setenv("DYNRANK_CACHE", str(tmp_path / "cache"))
    return tmp_path


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    a, b = ({"source": str(folder / f"{name}.jsonl"), "share": s} for name, s in (("a", 0.7), ("b", 0.3)))
    return {
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "data": {"source": {"a": a, "b": b}, "max_length": 200, **changes.get("data", {})},
        "adapter": {"rank": 2, "alpha": 4.0},
        "method": {"name": "lora"},
        "train": {"steps": 6, "global_batch_size": 4, "learning_rate": 1e-3, **changes.get("train", {})},
        "output": {"dir": str(folder / "run")},
    }


def recipe(folder: Path, **changes: Any) -> Recipe:
    return check_recipe(values(folder, **changes), "r.yaml")


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.integers(1, 20), min_size=2, max_size=5),
    extra=st.integers(0, 20),
    seed=st.integers(0, 2**31),
)
def test_each_source_has_its_share_of_every_batch_and_exactly_over_many(
    weights: list[int], extra: int, seed: int
) -> None:
    shares = tuple(weight / sum(weights) for weight in weights)
    size = -(-sum(weights) // min(weights)) + extra
    source_of = np.repeat(np.arange(len(weights), dtype=np.int16), [7 * weight for weight in weights])
    batches = MixedBatches(source_of, shares, size, seed)
    drawn = []
    for step in range(25):
        indices = batches.indices(step)
        assert len(indices) == size
        counts = np.bincount(source_of[indices], minlength=len(weights))
        assert counts.tolist() == batches.counts(step)
        assert all(abs(count - share * size) < 2 for count, share in zip(counts, shares, strict=True))
        drawn.append(indices)
    total = np.bincount(source_of[np.concatenate(drawn)], minlength=len(weights))
    assert all(abs(n - share * size * 25) <= 1 for n, share in zip(total, shares, strict=True))
    for number, weight in enumerate(weights):
        mine = np.concatenate([d[source_of[d] == number] for d in drawn])
        for start in range(0, len(mine) - 7 * weight + 1, 7 * weight):
            assert len(set(mine[start : start + 7 * weight])) == 7 * weight, (
                "each once an epoch of its source"
            )
    again = MixedBatches(source_of, shares, size, seed)
    assert np.array_equal(again.indices(17), drawn[17]) and np.array_equal(again.indices(3), drawn[3])
    other = MixedBatches(source_of, shares, size, seed + 1)
    assert any(not np.array_equal(other.indices(step), drawn[step]) for step in range(25))


def test_the_samples_are_those_of_each_source_alone(folder: Path) -> None:
    mixed = recipe(folder)
    dataset, _ = prepare_data(mixed)
    alone = []
    for name in "ab":
        chosen = mixed.data.model_copy(update={"source": str(folder / f"{name}.jsonl")})
        alone.append(prepare_data(mixed.model_copy(update={"data": chosen}))[0])
    assert np.array_equal(dataset.tokens, np.concatenate([one.tokens for one in alone]))
    assert np.bincount(dataset.source_of).tolist() == [len(one) for one in alone] == [30, 12]
    trained, held_out = split_held_out(dataset, recipe(folder, data={"held_out": 6}))
    assert len(held_out) == 6
    kept = sorted(
        trained.lengths[trained.source_of == 1].tolist() + held_out.lengths[held_out.source_of == 1].tolist()
    )
    assert kept == sorted(alone[1].lengths.tolist())
    assert data_hash(dataset) != data_hash(alone[0])
    values_of_other = values(folder)
    values_of_other["data"]["source"]["a"]["share"], values_of_other["data"]["source"]["b"]["share"] = (
        0.5,
        0.5,
    )
    other = check_recipe(values_of_other, "r.yaml")
    assert fingerprints(mixed, dataset) != fingerprints(other, dataset), "other shares are another run"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"train": {"steps": None, "epochs": 1}}, "several sources have no common epoch: give train.steps"),
        (
            {"train": {"global_batch_size": 3}},
            "data.source.b.share is 0.3 of train.global_batch_size 3: give each",
        ),
        ({"data": {"limit": 3}}, "data.limit is given beside several sources: give it to one of them"),
    ],
)
def test_a_mixture_that_cannot_be_drawn_is_refused(
    change: dict[str, Any], sentence: str, folder: Path
) -> None:
    with pytest.raises(RecipeError) as error:
        recipe(folder, **change)
    assert sentence in str(error.value)


def test_shares_and_keys_of_sources_are_checked(folder: Path) -> None:
    given = values(folder)
    given["data"]["source"]["a"]["share"] = 0.6
    with pytest.raises(RecipeError, match=r"the shares of data.source are 0.9 together: they must be 1"):
        check_recipe(given, "r.yaml")
    given["data"]["source"]["a"]["shar"] = 0.6
    with pytest.raises(RecipeError, match="shar"):
        check_recipe(given, "r.yaml")
    large = recipe(folder, train={"global_batch_size": 42})
    with pytest.raises(
        DataError, match=r"data.source.b has 12 samples, fewer than its share 0.3 of a global"
    ):
        make_batches(prepare_data(large)[0], large)


def test_a_run_counts_the_samples_of_each_source(folder: Path) -> None:
    (folder / "r.yaml").write_text(yaml.safe_dump(values(folder)))
    train(2, folder / "r.yaml")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples_of"] for line in lines] == [
        dict(
            zip("ab", make_batches(prepare_data(recipe(folder))[0], recipe(folder)).counts(step), strict=True)
        )
        for step in range(6)
    ]
    assert sum(line["samples_of"]["a"] for line in lines) == 17
