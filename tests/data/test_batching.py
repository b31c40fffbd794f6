import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrank_ds.data.batching import GlobalBatches


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
