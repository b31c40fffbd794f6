"""Adapters in one process's memory, outside DeepSpeed: their optimizer, their changes of rank, their export."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynrank_ds.adapters.linear import AdaptedModule
from dynrank_ds.checkpoint.adapter import LinearShape
from dynrank_ds.export.folder import staged_folder
from dynrank_ds.export.peft_writer import DTYPES, Format, write_adapter
from dynrank_ds.ranking.layout import ModuleShape, ShardLayout, whole
from dynrank_ds.ranking.plan import RankPlan
from dynrank_ds.training.adamw import RowAgedAdamW
from dynrank_ds.zero.migrate import NewRows, migrate

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdapterAdamW(torch.optim.Optimizer):
    """RowAgedAdamW on fp32 master weights, as an optimizer of the model's own parameters.

    An fp32 parameter is its own master. Parameters can be replaced; the group, which schedulers hold, stays.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        super().__init__(list(params), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.discard = False
        """Whether the next step leaves everything as it is."""
        self.replace(self.param_groups[0]["params"])

    def replace(self, params: Sequence[nn.Parameter]) -> None:
        """Train these parameters from now on, with masters and moments made anew."""
        group = self.param_groups[0]
        group["params"] = list(params)
        self.masters = [p.detach() if p.dtype == torch.float32 else p.detach().float() for p in params]
        settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        self.inner = RowAgedAdamW(self.masters, **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if self.discard:
            return
        self.inner.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        params = self.param_groups[0]["params"]
        for param, master in zip(params, self.masters, strict=True):
            master.grad = None if param.grad is None else param.grad.to(master.dtype)
        self.inner.step()
        for param, master in zip(params, self.masters, strict=True):
            master.grad = None
            if param.dtype != master.dtype:
                param.copy_(master)


class LiveAdapters:
    """The adapted modules of a model, their layout and their optimizer's state.

    Flat vectors are fp32, of all elements, in the order of `layout`.
    """

    def __init__(self, modules: Mapping[str, AdaptedModule], factors: Sequence[str]) -> None:
        self.modules = list(modules.values())
        self.factors = tuple(factors)
        self.shapes = tuple(ModuleShape(n, m.in_features, m.out_features) for n, m in modules.items())
        self.births = [
            torch.zeros(len(m.factors().get("lora_A", ())), dtype=torch.int64) for m in self.modules
        ]
        self.updates = 0
        self.layout = self._layout([len(births) for births in self.births])
        self.optimizer: AdapterAdamW | None = None

    def parameters(self) -> list[nn.Parameter]:
        """Return the factors in the order of the layout."""
        return [self.modules[f.module].factors()[f.factor] for f in self.layout.fragments]

    def begin(self, optimizer: AdapterAdamW) -> None:
        """Follow this optimizer of `parameters`, and give it zero moments."""
        self.optimizer = optimizer
        optimizer.replace(self.parameters())
        self._seed()

    def weights(self) -> Tensor:
        """Return the fp32 master weights."""
        assert self.optimizer is not None
        return torch.cat([master.flatten() for master in self.optimizer.masters])

    def gradients(self) -> Tensor:
        """Return the gradients of all factors; 0 where there is none."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters()]
        return torch.cat([grad.flatten().float() for grad in grads])

    def resize(
        self, plan: RankPlan, new_rows: NewRows, statistics: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Change ranks to `plan`, in model, master and moments; return `statistics` carried along.

        New triples get `new_rows` as weights, zero moments and statistics, and the age 0.
        """
        assert self.optimizer is not None
        inner = self.optimizer.inner.state
        moments = [torch.cat([inner[m][name].flatten() for m in self.optimizer.masters]) for name in MOMENTS]
        states = torch.stack([self.weights(), *moments, *statistics.values()])
        old, new = self.layout, self._layout(plan.ranks)
        moved, changed = migrate(states, old, new, plan, new_rows, ([whole], [whole]), lambda tensor: tensor)
        device = self.parameters()[0].device
        for index, factors in changed.items():
            self.modules[index].set_factors(
                {name: value.to(device) for name, value in factors.items()} if plan.ranks[index] else {}
            )
            kept = self.births[index][list(plan.keep[index])]
            self.births[index] = torch.cat([kept, kept.new_full((plan.new[index],), self.updates)])
        self.layout = new
        self.optimizer.replace(self.parameters())
        self._seed()
        for number, name in enumerate(("master", *MOMENTS)):
            pieces = new.split(moved[number])
            for master, piece in zip(self.optimizer.masters, pieces, strict=True):
                target = master if name == "master" else self.optimizer.inner.state[master][name]
                target.copy_(piece.view_as(target))
        return {name: moved[3 + number].clone() for number, name in enumerate(statistics)}

    @torch.no_grad()
    def mask(self, masked: Sequence[Sequence[int]]) -> None:
        """Set lora_E of these triples of every module to 0."""
        assert self.optimizer is not None
        for of, param, master in zip(
            self.layout.fragments, self.parameters(), self.optimizer.masters, strict=True
        ):
            if of.factor == "lora_E":
                param[list(masked[of.module])] = 0
                master[list(masked[of.module])] = 0

    def _layout(self, ranks: Sequence[int]) -> ShardLayout:
        device = next(m.lora_A.device for m in self.modules if m.lora_A is not None)
        return ShardLayout(self.shapes, ranks, self.factors, whole, device)

    def _seed(self) -> None:
        assert self.optimizer is not None
        for of, master in zip(self.layout.fragments, self.optimizer.masters, strict=True):
            births = self.births[of.module].to(master.device)
            lengths = torch.full_like(births, self.shapes[of.module].row_length(of.factor))
            self.optimizer.inner.set_state(master, self.updates, births, torch.ones_like(births), lengths)


class LiveSource:
    """The triples of live adapters, for export; gates are those of the method."""

    def __init__(
        self, adapters: LiveAdapters, gates: Sequence[Tensor | None], base_model: str | None
    ) -> None:
        self.base_model, self.description = base_model, f"step {adapters.updates}"
        self.weight_decomposed = False
        self._parts: dict[str, list[tuple[AdaptedModule, Tensor | None]]] = {}
        for shape, module, gate in zip(adapters.shapes, adapters.modules, gates, strict=True):
            name = module.part.linear if module.part else shape.name
            self._parts.setdefault(name, []).append((module, gate))
        self._masters = {
            (of.module, of.factor): master
            for of, master in zip(adapters.layout.fragments, _masters(adapters), strict=True)
        }
        self._index = {id(module): number for number, module in enumerate(adapters.modules)}
        self.linears = {name: self._shape(parts) for name, parts in self._parts.items()}

    def magnitudes(self, name: str) -> None:
        """There are none: DynamicRankCallback refuses weight-decomposed adapters."""

    def triples(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and diag(e g) B (r, out) of a linear layer, fp32; of a head zero outside of it."""
        pairs = [self._triples(*part) for part in self._parts[name] if self._rank(part[0])]
        return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])

    def _triples(self, module: AdaptedModule, gate: Tensor | None) -> tuple[Tensor, Tensor]:
        index = self._index[id(module)]
        a, b = (self._masters[index, factor].float().cpu() for factor in ("lora_A", "lora_B"))
        if (index, "lora_E") in self._masters:
            b = b * self._masters[index, "lora_E"].float().cpu()[:, None]
        if gate is not None:
            b = b * gate.detach().float().cpu().expand(len(b))[:, None]
        part = module.part
        if part is None:
            return a, b
        padding = (part.start, part.of - part.stop)
        return (F.pad(a, padding), b) if part.side == "columns" else (a, F.pad(b, padding))

    def _rank(self, module: AdaptedModule) -> int:
        return 0 if module.lora_A is None else len(module.lora_A)

    def _shape(self, parts: list[tuple[AdaptedModule, Tensor | None]]) -> LinearShape:
        first = parts[0][0]
        sides = {"columns": first.in_features, "rows": first.out_features}
        if first.part is not None:
            sides[first.part.side] = first.part.of
        rank = sum(self._rank(module) for module, _ in parts)
        return LinearShape(rank, first.scale, sides["columns"], sides["rows"], len(parts))

    def export(self, output: Path, format: Format, dtype: str, record: Mapping[str, Any]) -> None:
        """Write a PEFT folder, with `record` as its dynrank.json.

        Raises:
            RunError: the adapter changes nothing, or the output holds something else.
        """
        keys = ("trainer", "base_model", "method", "format")
        record = {**record, "format": format}
        with staged_folder(
            output, record, lambda there: all(there.get(k) == record.get(k) for k in keys)
        ) as folder:
            write_adapter(self, folder, format, DTYPES[dtype])


def _masters(adapters: LiveAdapters) -> Sequence[Tensor]:
    return adapters.parameters() if adapters.optimizer is None else adapters.optimizer.masters
