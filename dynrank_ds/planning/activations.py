"""Bytes of activations of a micro-batch, by formula, of a decoder of the LLaMA kind.

Counted per token and layer is what autograd keeps: the layer's input and the sum behind attention, both normed sums,
which are inputs of linears, q and k behind their rotation, v, attention's output and its copy for o_proj, and of the
MLP the outputs of gate_proj and up_proj, silu of the first, and the product. In bf16 the norms keep fp32 copies of
their inputs. A weight-decomposed linear keeps its output from before its rows are scaled. Attention is taken to keep
no matrix of tokens by tokens, as SDPA and FlashAttention do; eager attention keeps two of each head.
"""

from __future__ import annotations

from dataclasses import dataclass

from dynrank_ds.planning.architecture import Architecture
from dynrank_ds.training.logits import rows_at_once


@dataclass(frozen=True)
class MicroBatch:
    """What one forward of a process is given."""

    samples: int
    tokens: int
    """Of each sample, padding included."""
    targets: int
    """Tokens in all samples that the loss is taken on."""

    @property
    def positions(self) -> int:
        """Tokens of all samples."""
        return self.samples * self.tokens


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch."""

    layer_input: int
    """Of one layer's input, all that is kept of a layer whose activations are recomputed."""
    layer: int
    """All that autograd keeps of one layer, its input aside."""
    layer_backward: int
    """Gradients in the backward of one layer, at most at one time."""
    logits: int
    """The hidden states at targets, their gradient, and the logits, softmax and gradient of one chunk."""


def activations(of: Architecture, batch: MicroBatch, item: int, attention: str) -> Activations:
    """Return the activations of a micro-batch for `item` bytes an element, 2 or 4."""
    n, hidden, mlp = batch.positions, of.hidden, of.intermediate
    kept = 3 * hidden + 3 * of.query_width + 2 * of.key_width + 4 * mlp + of.decomposed_width
    norms = 2 * hidden * 4 if item < 4 else 0
    chunk = min(batch.targets, rows_at_once(of.vocabulary))
    matrices = 2 * of.heads * batch.tokens * item if attention == "eager" else 0
    return Activations(
        layer_input=n * hidden * item,
        layer=n * (kept * item + norms + matrices),
        layer_backward=n * (3 * mlp + 2 * hidden) * item,
        # In fp32: the log-softmax of a chunk and two gradients; its logits are gone by then.
        logits=chunk * of.vocabulary * 12 + 2 * batch.targets * hidden * item,
    )
