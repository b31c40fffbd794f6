"""Samples packed into one row give the losses, gradients and statistics of padded ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import modeling_flash_attention_utils as flash_attention

from dynrank_ds.data.collating import Collator, PackedCollator, PaddedCollator
from dynrank_ds.data.tokenising import TokenisedDataset
from dynrank_ds.methods import build_method
from dynrank_ds.methods.base import MicroBatch
from dynrank_ds.recipe import check_recipe
from dynrank_ds.training.loss import SummedLoss
from dynrank_ds.training.model import adapt, load_model
from dynrank_ds.training.samples import prepare_data
from tests.support.tiny import write_data, write_model

METHODS = {
    "pe_dyra": {"name": "pe_dyra", "t_i": 1, "interval": 3, "t_f": 2, "k": 5},
    "increlora": {"name": "increlora", "target_rank": 8, "top_h": 14, "t_i": 1, "interval": 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packing")
    write_model(path / "model")
    write_data(path / "data.jsonl")
    return path


def one_step(
    folder: Path,
    collator: Collator,
    micro_batch_size: int,
    method_name: str,
    attention: str,
    checkpointing: bool,
) -> tuple[float, Tensor, Tensor]:
    """Mean loss, adapter gradients and the method's statistics of backward, of one batch of 12 samples."""
    recipe = check_recipe(
        {
            "model": {"path": str(folder / "model"), "dtype": "fp32"},
            "data": {"source": str(folder / "data.jsonl"), "max_length": 200},
            "adapter": {"rank": 4, "alpha": 16.0},
            "method": METHODS[method_name],
            "train": {"steps": 30, "global_batch_size": 12, "learning_rate": 1e-3},
            "output": {"dir": "nowhere"},
        },
        "recipe",
    )
    dataset, _ = prepare_data(recipe)
    indices = np.arange(12)
    model = load_model(recipe.model, checkpointing)
    # Not by the recipe, for FlashAttention cannot be loaded without a GPU.
    model.config._attn_implementation = attention
    modules = adapt(model, recipe)
    method = build_method(recipe.method, modules, 30, torch.device("cpu"))
    # B begins at zero in some methods: then most gradients would be zero, and equal whatever is wrong.
    torch.manual_seed(0)
    for module in modules.values():
        assert module.lora_B is not None
        torch.nn.init.normal_(module.lora_B, std=0.1)
    loss, n_targets = SummedLoss(model), int(dataset.target_counts[indices].sum())
    total = 0.0
    micro_batches = collator.micro_batches(indices, dataset.lengths, 0, 1, micro_batch_size)
    for number, chosen in enumerate(micro_batches):
        total += backward(dataset, collator, chosen, loss, method, n_targets, last=number == 0)
    gradients = torch.cat(
        [p.grad.flatten() for module in modules.values() for p in module.factors().values()]
    )
    sums = method.energy._sums if method_name == "pe_dyra" else method._sums  # type: ignore[attr-defined]
    return total, gradients, sums


def backward(dataset: TokenisedDataset, collator, chosen, loss, method, n_targets: int, last: bool) -> float:
    """As the loop does it."""
    batch = collator.collate(dataset, chosen)
    method.begin_micro_batch(MicroBatch(batch.attention_mask, batch.packed, last=last))
    mean = loss(**batch.inputs()) / n_targets
    mean.backward()
    return float(mean.detach())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("attention", "micro_batch_size", "checkpointing"),
    [("sdpa", 4, False), ("eager", 12, False), ("sdpa", 12, True), ("eager", 1, False)],
)
def test_a_packed_batch_gives_loss_gradients_and_statistics_of_the_padded_one(
    folder: Path, method: str, attention: str, micro_batch_size: int, checkpointing: bool
) -> None:
    loss, gradients, sums = one_step(folder, PaddedCollator(2), 3, method, attention, False)
    packed = one_step(folder, PackedCollator(), micro_batch_size, method, attention, checkpointing)
    assert abs(packed[0] - loss) <= 1e-6 * loss
    largest = float((packed[1] - gradients).abs().max() / gradients.abs().max())
    print(
        f"{method} {attention}: losses differ by {abs(packed[0] - loss):.1e}, gradients by {largest:.1e} of the largest"
    )
    assert largest <= 1e-6
    torch.testing.assert_close(packed[2], sums, rtol=2e-5, atol=0)


class PlayedKernels:
    """FlashAttention's two kernels in plain PyTorch, and the boundaries that the one for unequal lengths was given."""

    def __init__(self) -> None:
        self.boundaries: list[list[int]] = []

    def dense(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> Tensor:
        """(rows, tokens, heads, width), fewer key and value heads than query heads."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True)
        return out.transpose(1, 2)

    def unequal(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: Tensor,
        max_seqlen_k: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> Tensor:
        """(tokens, heads, width); sample i is [cu_seqlens[i], cu_seqlens[i + 1])."""
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max() and causal
        self.boundaries.append(cu_seqlens_q.tolist())
        samples = [
            self.dense(q[None, a:b], k[None, a:b], v[None, a:b], dropout_p, softmax_scale, causal)[0]
            for a, b in pairwise(self.boundaries[-1])
        ]
        return torch.cat(samples)

    def load(self, *_: object) -> tuple[Sequence[object], Sequence[object]]:
        """As transformers' own: kernels, and what makes their arguments."""
        arguments = flash_attention._lazy_define_process_function(self.unequal)
        return (self.dense, self.unequal, None, None, None), (arguments, dict)


def test_flash_attention_is_given_each_packed_sample_by_itself(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of transformers' way from position ids to FlashAttention; only the kernels are played."""
    loss, gradients, _ = one_step(folder, PaddedCollator(2), 3, "pe_dyra", "sdpa", False)
    kernels = PlayedKernels()
    monkeypatch.setattr(flash_attention, "lazy_import_flash_attention", kernels.load)
    padded = one_step(folder, PaddedCollator(2), 3, "pe_dyra", "flash_attention_2", False)
    assert not kernels.boundaries, "padded rows need no boundaries"
    packed = one_step(folder, PackedCollator(), 4, "pe_dyra", "flash_attention_2", False)
    assert len(kernels.boundaries) == 3 * 2, "3 rows, 2 layers"
    for boundaries in kernels.boundaries:
        assert len(boundaries) > 2 and boundaries == sorted(set(boundaries))
    for other in (padded, packed):
        assert abs(other[0] - loss) <= 1e-6 * loss
        assert float((other[1] - gradients).abs().max() / gradients.abs().max()) <= 1e-6
