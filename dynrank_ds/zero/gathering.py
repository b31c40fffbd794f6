"""Parameters of the base gathered outside of DeepSpeed's forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
from torch import Tensor


@contextmanager
def gathered(param: Tensor) -> Iterator[None]:
    """Hold a parameter whole while the `with` block runs, to be read; every process must enter together.

    One that is not partitioned is whole anyway.
    """
    with deepspeed.zero.GatheredParameters([param], enabled=hasattr(param, "ds_id")):
        yield
