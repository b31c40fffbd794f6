"""How long a step takes at stated speeds: arithmetic and traffic, as if one hid the other and as if it did not."""

from __future__ import annotations

from dataclasses import dataclass

from dynrank_ds.planning.activations import MicroBatch
from dynrank_ds.planning.architecture import Architecture
from dynrank_ds.planning.traffic import Traffic


@dataclass(frozen=True)
class Hardware:
    """Speeds of a GPU, as its maker states them."""

    name: str
    flops: float
    """Dense bf16 operations a second."""
    within_node: float
    """Bytes a second that a GPU receives from its node."""
    between_nodes: float
    """Bytes a second of the network card that each GPU has for other nodes."""
    from_host: float
    """Bytes a second that a GPU receives from the machine's memory."""


HARDWARE = {
    # NVIDIA's data sheets, whose rates of NVLink and PCIe are of both directions together; one 400 or 200 Gb/s card for
    # each GPU, as in DGX.
    "h100": Hardware("h100", 989e12, 450e9, 50e9, 64e9),
    "h200": Hardware("h200", 989e12, 450e9, 50e9, 64e9),
    "a100": Hardware("a100", 312e12, 300e9, 25e9, 32e9),
}
ARITHMETIC = 0.4
"""Share of the stated operations that training reaches (ours; measure it on your machine)."""
LINKS = 0.7
"""Share of the stated rates that collectives reach (ours)."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step."""

    arithmetic: float
    traffic: float

    @property
    def overlapped(self) -> float:
        return max(self.arithmetic, self.traffic)

    @property
    def serial(self) -> float:
        return self.arithmetic + self.traffic


def step_time(
    of: Architecture,
    batch: MicroBatch,
    accumulation: int,
    recomputed: bool,
    moved: Traffic,
    hardware: Hardware,
    nodes: int,
    gpus_per_node: int,
) -> StepTime:
    """Return the time of a step of `accumulation` micro-batches in which a process receives what is `moved`.

    A frozen weight costs two operations a token in forward, two in backward (no gradient of its own), two more where
    layers are recomputed; an adapter's weight costs six or eight; causal attention half of all pairs of tokens.
    """
    weights = of.base_parameters - (0 if of.tied else of.units[0].elements)
    again = weights - of.units[-1].elements if recomputed else 0
    passes = 4 if recomputed else 3  # backward has two for whatever has two factors
    pairs = 2 * of.layers * of.query_width * batch.tokens
    per_token = 2 * (2 * weights + again) + (2 * of.trainable_parameters + pairs) * passes
    arithmetic = per_token * batch.positions * accumulation / (hardware.flops * ARITHMETIC)
    everywhere = moved.parameters + moved.gradients - moved.within_node
    links = (
        everywhere / rate_everywhere(hardware, nodes, gpus_per_node)
        + moved.within_node / hardware.within_node
        + moved.from_host / hardware.from_host
    )
    return StepTime(arithmetic, links / LINKS)


def rate_everywhere(hardware: Hardware, nodes: int, gpus_per_node: int) -> float:
    """Return the stated bytes a second that a GPU receives in a collective of all processes.

    Between nodes it goes in as many rings as a node has cards, and each card carries its ring's part.
    """
    if nodes == 1:
        return hardware.within_node
    return min(hardware.within_node, hardware.between_nodes * gpus_per_node)
