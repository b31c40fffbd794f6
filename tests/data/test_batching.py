import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrank_ds.data.batching import IGNORED, GlobalBatches, collate, local_micro_batches
from dynrank_ds.data.tokenising import TokenisedDataset


@settings(max_examples=50, deadline=None)
@given(
    n_samples=st.integers(1, 40),
    batch=st.integers(1, 50),
    seed=st.integers(0, 2**32),
    epochs=st.integers(1, 4),
)
def test_every_epoch_holds_each_sample_once(n_samples: int, batch: int, seed: int, epochs: int) -> None:
    batches = GlobalBatches(n_samples, batch, seed)
    steps = -(-epochs * n_samples // batch)
    stream = np.concatenate([batches.indices(step) for step in range(steps)])[: epochs * n_samples]
    for epoch in stream.reshape(epochs, n_samples):
        assert sorted(epoch) == list(range(n_samples))


def test_the_batch_of_a_step_does_not_depend_on_what_was_asked_before() -> None:
    walked = GlobalBatches(1000, 64, seed=3)
    stream = [walked.indices(step) for step in range(40)]
    for step in (37, 2, 16, 15):
        assert np.array_equal(GlobalBatches(1000, 64, seed=3).indices(step), stream[step])


def test_seeds_and_epochs_differ() -> None:
    first = GlobalBatches(64, 64, seed=0)
    assert not np.array_equal(first.indices(0), first.indices(1))
    assert not np.array_equal(first.indices(0), GlobalBatches(64, 64, seed=1).indices(0))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_processes_cover_a_global_batch_exactly_once(world_size: int, micro_batch_size: int) -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(1, 500, size=100)
    indices = random.permutation(100)[:24]
    dealt = [
        local_micro_batches(indices, lengths, rank, world_size, micro_batch_size)
        for rank in range(world_size)
    ]
    assert sorted(np.concatenate([m for rank in dealt for m in rank])) == sorted(indices)
    for rank in dealt:
        assert [len(m) for m in rank] == [micro_batch_size] * (24 // (world_size * micro_batch_size))


def test_micro_batches_that_meet_hold_samples_of_like_length() -> None:
    random = np.random.default_rng(1)
    lengths = random.integers(1, 500, size=48)
    dealt = [local_micro_batches(np.arange(48), lengths, rank, 2, 4) for rank in range(2)]
    together = [np.sort(lengths[np.concatenate(pair)]) for pair in zip(*dealt, strict=True)]
    assert np.array_equal(np.concatenate(together), np.sort(lengths))


def test_equal_lengths_are_dealt_in_the_same_way_whatever_the_order() -> None:
    lengths = np.full(8, 5)
    forward = local_micro_batches(np.arange(8), lengths, 0, 2, 2)
    backward = local_micro_batches(np.arange(8)[::-1], lengths, 0, 2, 2)
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward, strict=True))


def test_a_batch_is_padded_on_the_right() -> None:
    dataset = TokenisedDataset(
        tokens=np.array([5, 6, 2, 7, 8, 9, 2], dtype=np.int32),
        targets=np.array([0, 1, 1, 0, 0, 1, 1], dtype=np.bool_),
        starts=np.array([0, 3]),
        lengths=np.array([3, 4]),
        target_counts=np.array([2, 2]),
    )
    batch = collate(dataset, np.array([1, 0]), pad_id=2)
    assert torch.equal(batch.input_ids, torch.tensor([[7, 8, 9, 2], [5, 6, 2, 2]]))
    assert torch.equal(batch.attention_mask, torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]))
    assert torch.equal(batch.labels, torch.tensor([[IGNORED, IGNORED, 9, 2], [IGNORED, 6, 2, IGNORED]]))
