"""Which samples make up a step.

The order is a function of (seed, global step) alone: neither the world size nor the past of a run changes
which samples a step sees.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


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


def draw_held_out(n_samples: int, count: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices to train on and the `count` held out, in ascending order; the same for equal arguments."""
    drawn = np.random.default_rng([*b"held-out", seed]).permutation(n_samples)
    return np.sort(drawn[count:]), np.sort(drawn[:count])


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, n_samples: int) -> NDArray[np.int64]:
    order = np.random.default_rng([seed, epoch]).permutation(n_samples)
    order.flags.writeable = False
    return order
