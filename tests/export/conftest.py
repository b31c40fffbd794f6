"""A run directory as training leaves it, written without the package, and the model that it stands for."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from dynrank_ds.checkpoint.files import FORMAT, write_sums

LAYERS = 13
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MODULES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass
class AdaptedModule:
    a: torch.Tensor  # (r, in)
    e: torch.Tensor | None  # (r,); None: LoRA
    b: torch.Tensor  # (r, out)
    scale: float

    def delta(self) -> torch.Tensor:
        e = torch.ones(len(self.a)) if self.e is None else self.e
        return self.scale * self.b.T @ torch.diag(e) @ self.a


@dataclass
class FakeRun:
    folder: Path
    base: Path
    modules: dict[str, AdaptedModule]

    def model(self) -> LlamaForCausalLM:
        """The base with W + s B^T diag(e) A in place of W: a plain forward without any adapter."""
        model = LlamaForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        with torch.no_grad():
            for name, module in self.modules.items():
                model.get_submodule(name).weight += module.delta()
        return model


def tiny_config(**changes) -> LlamaConfig:
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    return LlamaConfig(**sizes | dict(num_hidden_layers=LAYERS, vocab_size=64) | changes)


def save_base(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB", **changes) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(**changes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    return folder


def draw_modules(
    model: LlamaForCausalLM, ranks: dict[str, int], with_e: bool = True
) -> dict[str, AdaptedModule]:
    generator = torch.Generator().manual_seed(1)
    modules = {}
    for index, (name, rank) in enumerate(ranks.items()):
        out_features, in_features = model.get_submodule(name).weight.shape
        a = 0.2 * torch.randn(rank, in_features, generator=generator)
        b = 0.2 * torch.randn(rank, out_features, generator=generator)
        e = torch.randn(rank, generator=generator) if with_e else None
        modules[name] = AdaptedModule(a, e, b, scale=(16 / 12, 2.0, 0.7)[index % 3])
    return modules


def save_checkpoint(
    checkpoint: Path, base: Path, modules: dict[str, AdaptedModule], method: str = "pe_dyra"
) -> None:
    checkpoint.mkdir(parents=True)
    tensors, shapes = {}, {}
    for name, module in modules.items():
        rank, scale = len(module.a), module.scale
        shapes[name] = dict(
            rank=rank, scale=scale, in_features=module.a.shape[1], out_features=module.b.shape[1]
        )
        if rank:
            factors = {"lora_A": module.a, "lora_B": module.b} | (
                {} if module.e is None else {"lora_E": module.e}
            )
            for factor, value in factors.items():
                tensors[f"master/{name}.{factor}"] = value
                tensors[f"exp_avg/{name}.{factor}"] = torch.zeros_like(value)
    save_file(tensors, checkpoint / "state.safetensors")
    state = dict(format=FORMAT, step=int(checkpoint.name.split("-")[1]), method=method, base_model=str(base))
    (checkpoint / "state.json").write_text(json.dumps(state | {"blocks": shapes}))
    write_sums(checkpoint)


def uneven_ranks() -> dict[str, int]:
    """Ranks 0 to 6, with layers 1, 10, 11 and 12 of one module apart from each other."""
    names = [f"model.layers.{layer}.{module}" for layer in range(LAYERS) for module in MODULES]
    ranks = {name: (3 * index + index // 7) % 7 for index, name in enumerate(names)}
    return ranks | {
        f"model.layers.{layer}.self_attn.q_proj": r
        for layer, r in ((0, 2), (1, 1), (10, 4), (11, 6), (12, 0))
    }


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> FakeRun:
    root = tmp_path_factory.mktemp("run")
    base = save_base(root / "base")
    modules = draw_modules(LlamaForCausalLM.from_pretrained(base), uneven_ranks())
    stale = {
        name: AdaptedModule(module.a * 2, module.e, module.b, module.scale)
        for name, module in modules.items()
    }
    save_checkpoint(root / "run/checkpoints/step-9", base, stale)
    save_checkpoint(root / "run/checkpoints/step-20", base, modules)
    (root / "run/checkpoints/step-30.tmp").mkdir()
    return FakeRun(root / "run", base, modules)


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    return torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(2))
