"""How samples become micro-batches: each exactly once, like with like, packed without waste."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaTokenizer

from dynrank_ds.data.batching import GlobalBatches
from dynrank_ds.data.collating import IGNORED, Collator, PackedCollator, PaddedCollator
from dynrank_ds.data.formats import FORMATS
from dynrank_ds.data.reading import read_file
from dynrank_ds.data.rows import Row
from dynrank_ds.data.tokenising import TokenisedDataset
from tests.data.conftest import tokenised

COLLATORS = [PaddedCollator(0), PackedCollator()]


@pytest.mark.parametrize("collator", COLLATORS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_processes_cover_a_global_batch_exactly_once(
    collator: Collator, world_size: int, micro_batch_size: int
) -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(1, 500, size=100)
    indices = random.permutation(100)[:24]
    dealt = [
        collator.micro_batches(indices, lengths, rank, world_size, micro_batch_size)
        for rank in range(world_size)
    ]
    assert sorted(np.concatenate([m for rank in dealt for m in rank])) == sorted(indices)
    for rank in dealt:
        assert len(rank) == 24 // (world_size * micro_batch_size) and all(map(len, rank))


def test_micro_batches_that_meet_hold_samples_of_like_length() -> None:
    random = np.random.default_rng(1)
    lengths = random.integers(1, 500, size=48)
    dealt = [PaddedCollator(0).micro_batches(np.arange(48), lengths, rank, 2, 4) for rank in range(2)]
    together = [np.sort(lengths[np.concatenate(pair)]) for pair in zip(*dealt, strict=True)]
    assert np.array_equal(np.concatenate(together), np.sort(lengths))


@pytest.mark.parametrize("collator", COLLATORS)
def test_samples_are_dealt_in_the_same_way_whatever_their_order(collator: Collator) -> None:
    lengths = np.array([5] * 8 + [7] * 8)
    forward = collator.micro_batches(np.arange(16), lengths, 0, 2, 2)
    backward = collator.micro_batches(np.arange(16)[::-1], lengths, 0, 2, 2)
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward, strict=True))


DATASET = TokenisedDataset(
    tokens=np.array([5, 6, 2, 7, 8, 9, 2], dtype=np.int32),
    targets=np.array([0, 1, 1, 0, 0, 1, 1], dtype=np.bool_),
    starts=np.array([0, 3]),
    lengths=np.array([3, 4]),
    target_counts=np.array([2, 2]),
)


def test_a_batch_is_padded_on_the_right() -> None:
    batch = PaddedCollator(2).collate(DATASET, np.array([1, 0]))
    assert torch.equal(batch.input_ids, torch.tensor([[7, 8, 9, 2], [5, 6, 2, 2]]))
    assert torch.equal(batch.attention_mask, torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]))
    assert torch.equal(batch.labels, torch.tensor([[IGNORED, IGNORED, 9, 2], [IGNORED, 6, 2, IGNORED]]))
    inputs = batch.inputs()
    assert inputs.keys() == {"input_ids", "positions", "targets"}
    assert inputs["positions"].tolist() == [1, 2, 4, 5] and inputs["targets"].tolist() == [9, 2, 6, 2]


def test_a_packed_batch_is_one_row_whose_positions_restart() -> None:
    batch = PackedCollator().collate(DATASET, np.array([1, 0]))
    assert batch.packed == (4, 3)
    assert batch.input_ids.tolist() == [[7, 8, 9, 2, 5, 6, 2]]
    assert batch.attention_mask.tolist() == [[1] * 7]
    inputs = batch.inputs()
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert inputs["positions"].tolist() == [1, 2, 4, 5] and inputs["targets"].tolist() == [9, 2, 6, 2]


def waste(collator: Collator, lengths: NDArray[np.int64], world_size: int, micro_batch_size: int) -> float:
    """The share of positions that are padding, or for which a process waits for one with more tokens."""
    busy = total = 0
    batches = GlobalBatches(len(lengths), 128, seed=0)
    for step in range(len(lengths) // 128):
        indices = batches.indices(step)
        dealt = [
            collator.micro_batches(indices, lengths, rank, world_size, micro_batch_size)
            for rank in range(world_size)
        ]
        for together in zip(*dealt, strict=True):
            sizes = [_positions(collator, lengths[chosen]) for chosen in together]
            total += world_size * max(sizes)
        busy += int(lengths[indices].sum())
    return 1 - busy / total


def _positions(collator: Collator, lengths: NDArray[np.int64]) -> int:
    return int(lengths.sum() if isinstance(collator, PackedCollator) else len(lengths) * lengths.max())


GSM8K_DECILES = [110, 158, 176, 192, 208, 225, 245, 267, 293, 337, 614]
"""Of GSM8K's first 2,000 training rows: tokens in MetaMath's prompt, by LLaMA-2's tokenizer."""
SETUPS = pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 4), (2, 4), (8, 2), (8, 8)])


@SETUPS
def test_packing_wastes_less_than_5_percent_on_lengths_like_gsm8ks(
    world_size: int, micro_batch_size: int
) -> None:
    uniform = np.random.default_rng(4).random(2048)
    lengths = np.interp(uniform, np.linspace(0, 1, 11), GSM8K_DECILES).astype(np.int64)
    packed = waste(PackedCollator(), lengths, world_size, micro_batch_size)
    padded = waste(PaddedCollator(0), lengths, world_size, micro_batch_size)
    shuffled = waste(Shuffled(), lengths, world_size, micro_batch_size)
    print(f"packed {packed:.2%}, grouped by length {padded:.2%}, neither {shuffled:.2%}")
    assert packed < 0.05 and packed < padded < shuffled


@SETUPS
def test_packing_wastes_less_than_5_percent_on_gsm8k(
    gsm8k_lengths: NDArray[np.int64], world_size: int, micro_batch_size: int
) -> None:
    packed = waste(PackedCollator(), gsm8k_lengths, world_size, micro_batch_size)
    print(f"{world_size} processes x {micro_batch_size}: packed {packed:.2%}")
    assert packed < 0.05


class Shuffled(PaddedCollator):
    """What packing and grouping are better than: samples as they come."""

    def __init__(self) -> None:
        super().__init__(0)

    def micro_batches(
        self,
        indices: NDArray[np.int64],
        lengths: NDArray[np.int64],
        rank: int,
        world_size: int,
        micro_batch_size: int,
    ) -> list[NDArray[np.int64]]:
        return list(indices[rank::world_size].reshape(-1, micro_batch_size))


@pytest.fixture(scope="module")
def gsm8k_lengths(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.int64]:
    """Tokens of GSM8K's first training rows in MetaMath's prompt, by LLaMA-2's tokenizer."""
    folder = tmp_path_factory.mktemp("llama2")
    (folder / "tokenizer.model").symlink_to(data_dir / "tokenizers" / "llama2-tokenizer.model")
    rows = [
        Row({"query": row.fields["question"], "response": row.fields["answer"]}, row.origin)
        for row in islice(read_file(data_dir / "gsm8k" / "train.jsonl"), 1280)
    ]
    tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=True)
    return tokenised(rows, tokenizer, FORMATS["metamathqa"]).lengths
