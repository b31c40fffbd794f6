"""Forward and backward of one adapted linear layer against the bare layer and against PEFT's LoRA layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoConfig

from dynrank_ds.adapters.initial import lora_factors
from dynrank_ds.adapters.inject import inject
from dynrank_ds.bench.figures import Figure
from dynrank_ds.bench.pairs import paired_ratio
from dynrank_ds.dtypes import native_bf16
from dynrank_ds.recipe import Recipe
from dynrank_ds.zero import processes

RANKS, TOKENS = (4, 16, 64), (64, 512, 2048)
PAIRS, QUICK_PAIRS = 60, 20


def measure_linear(recipe: Recipe, quick: bool) -> Iterator[Figure]:
    """Yield the ratios for the up-projection of the recipe's model, by dtype, rank and tokens.

    Quick: rank 4 and 512 tokens, 20 pairs instead of 60. bf16 is left out where the device has no arithmetic for it:
    there the bare layer alone takes most of the time, and the ratios say nothing.
    """
    device = processes.start(recipe.deepspeed.timeout)
    config = AutoConfig.from_pretrained(recipe.model.path).get_text_config(decoder=True)
    ranks, tokens = ((4,), (512,)) if quick else (RANKS, TOKENS)
    dtypes = [torch.float32, *([torch.bfloat16] if native_bf16(device.type) else [])]
    for dtype, rank, n in product(dtypes, ranks, tokens):
        torch.manual_seed(0)
        base = nn.Linear(config.hidden_size, config.intermediate_size, bias=False, device=device, dtype=dtype)
        base.requires_grad_(False)
        x = torch.randn(1, n, config.hidden_size, device=device, dtype=dtype, requires_grad=True)
        grad_y = torch.randn(1, n, config.intermediate_size, device=device, dtype=dtype)
        ours, theirs = (_step(layer, x, grad_y) for layer in (_adapted(base, rank), _pefts(base, rank)))
        bare = _step(base, x, grad_y)
        for name, other in (("bare linear", bare), ("peft lora", theirs)):
            found = paired_ratio(ours, other, QUICK_PAIRS if quick else PAIRS, device)
            shape = f"{str(dtype).removeprefix('torch.')}, rank {rank}, {n} tokens"
            yield Figure(
                f"ours / {name}, {shape}",
                f"{found.median:.3f} [{found.low:.3f}, {found.high:.3f}]",
                {
                    "peer": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "rank": rank,
                    "tokens": n,
                    "in_features": config.hidden_size,
                    "out_features": config.intermediate_size,
                    "threads": torch.get_num_threads(),
                    "ratio": found.median,
                    "interval_95": [found.low, found.high],
                },
            )
    processes.stop()


class _Holder(nn.Module):
    """What both libraries find the layer in."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer


def _adapted(base: nn.Linear, rank: int) -> nn.Module:
    holder = _Holder(base)
    inject(holder, {"layer": base}, rank, 1.0, lora_factors, seed=0)
    return holder.layer.to(base.weight.device)


def _pefts(base: nn.Linear, rank: int) -> nn.Module:
    holder = _Holder(base)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"])
    # PEFT makes the factors of a 16-bit base in fp32 by default; ours are of the base's dtype.
    inject_adapter_in_model(config, holder)
    return holder.layer.to(base.weight.dtype)


def _step(layer: nn.Module, x: Tensor, grad_y: Tensor) -> Callable[[], None]:
    """Return a forward and backward of the layer, with gradients of input and factors."""
    trained = [p for p in layer.parameters() if p.requires_grad]

    def step() -> None:
        torch.autograd.grad(layer(x), [x, *trained], grad_y)

    return step
