import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrank_ds.data.batching import GlobalBatches, draw_held_out


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


@settings(max_examples=50, deadline=None)
@given(n_samples=st.integers(1, 200), share=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_held_out_samples_are_the_asked_for_number_and_never_among_the_others(
    n_samples: int, share: float, seed: int
) -> None:
    count = int(share * n_samples)
    trained, held_out = draw_held_out(n_samples, count, seed)
    assert len(held_out) == count
    assert sorted([*trained, *held_out]) == list(range(n_samples))
    assert all(map(np.array_equal, draw_held_out(n_samples, count, seed), (trained, held_out)))


def test_held_out_samples_are_drawn_by_the_seed_from_everywhere() -> None:
    first, other = (draw_held_out(1000, 100, seed)[1] for seed in (0, 1))
    assert not np.array_equal(first, other)
    assert first.min() < 50 and first.max() > 950
