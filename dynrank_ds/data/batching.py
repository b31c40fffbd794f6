"""Which samples make up a step.

The order is a function of (seed, global step) alone: neither the world size nor the past of a run changes
which samples a step sees.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

_SEEDS_APART = 1_000_003
"""Between the seeds of two sources' orders."""


@dataclass(frozen=True)
class GlobalBatches:
    """The samples of every step: each exactly once an epoch, in an order drawn anew for each epoch.

    A batch that an epoch's end cuts goes on with the next epoch's order, so all batches are full.
    """

    n_samples: int
    global_batch_size: int
    seed: int

    def indices(self, step: int) -> NDArray[np.int64]:
        """Return the (global_batch_size,) sample indices of the 0-based `step`."""
        positions = np.arange(self.global_batch_size) + step * self.global_batch_size
        epochs, places = np.divmod(positions, self.n_samples)
        chosen = np.empty(self.global_batch_size, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = _epoch_order(self.seed, int(epoch), self.n_samples)[places[here]]
        return chosen


@dataclass(frozen=True)
class MixedBatches:
    """Global batches of which each source has its share, by an order of its own; exact over steps where not in one.

    source_of: (n,) the number of each sample's source. shares: by number; 1 together, each at least one sample.
    """

    source_of: NDArray[np.int16]
    shares: tuple[float, ...]
    global_batch_size: int
    seed: int

    def indices(self, step: int) -> NDArray[np.int64]:
        """(global_batch_size,) sample indices of the 0-based `step`."""
        before, after = self._counts(step), self._counts(step + 1)
        parts = []
        for number, (start, stop) in enumerate(zip(before, after, strict=True)):
            members = self._members[number]
            epochs, places = np.divmod(np.arange(start, stop), len(members))
            seed = self.seed + (number + 1) * _SEEDS_APART
            orders = {int(epoch): _epoch_order(seed, int(epoch), len(members)) for epoch in np.unique(epochs)}
            drawn = [orders[int(epoch)][place] for epoch, place in zip(epochs, places, strict=True)]
            parts.append(members[np.array(drawn, dtype=np.int64)])
        return np.concatenate(parts)

    def counts(self, step: int) -> list[int]:
        """Return the number of samples of each source in the 0-based `step`."""
        return (self._counts(step + 1) - self._counts(step)).tolist()

    def _counts(self, steps: int) -> NDArray[np.int64]:
        """Return the number of samples of each source in the first `steps` steps.

        The shares' whole parts, and one more for those with the largest remainders.
        """
        total = steps * self.global_batch_size
        exact = np.array(self.shares) * total
        counts = np.floor(exact + 1e-6).astype(np.int64)
        largest = np.argsort(-(exact - counts), kind="stable")
        counts[largest[: total - int(counts.sum())]] += 1
        return counts

    @cached_property
    def _members(self) -> list[NDArray[np.int64]]:
        return [np.flatnonzero(self.source_of == number) for number in range(len(self.shares))]


def draw_held_out(n_samples: int, count: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices to train on and the `count` held out, in ascending order; the same for equal arguments."""
    drawn = np.random.default_rng([*b"held-out", seed]).permutation(n_samples)
    return np.sort(drawn[count:]), np.sort(drawn[:count])


@lru_cache(maxsize=16)
def _epoch_order(seed: int, epoch: int, n_samples: int) -> NDArray[np.int64]:
    order = np.random.default_rng([seed, epoch]).permutation(n_samples)
    order.flags.writeable = False
    return order
