"""Which linear layers of a model get adapters: `adapter.targets` and `adapter.layers`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from dynrank_ds.errors import RecipeError

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class TextDecoder:
    """Where adapters may go in a model, by full module names."""

    name: str
    """The decoder: of a composite model its text decoder; "" is the whole model."""
    layers: str
    """Its list of layers."""
    n_layers: int
    head: str | None = None
    """The output layer, which is outside of the decoder."""


def find_linears(
    model: nn.Module,
    targets: Sequence[str] | str,
    decoder: TextDecoder,
    layers: Sequence[int] | None = None,
    rank: int = 1,
) -> dict[str, nn.Linear]:
    """Return the linear layers that the targets name, by their full names, in the model's order.

    Args:
        model: not yet adapted.
        targets: names, each the whole or a dotted end of a full name; or a regular expression that matches whole full
            names; or "all-linear": every linear layer of the decoder with both sides of at least `rank`.
        decoder: where to look.
        layers: numbers of decoder layers that alone are adapted.
        rank: of the adapters.

    Raises:
        RecipeError: a target names nothing that can be adapted, or a layer does not exist.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    inside = {
        name: linear
        for name, linear in linears.items()
        if _is_within(name, decoder.name) and not _is_read_by_a_kernel(model, name)
    }
    in_layers = _of_layers(inside, decoder, layers)
    if targets == ALL_LINEAR:
        chosen = {
            name for name, linear in in_layers.items() if min(linear.in_features, linear.out_features) >= rank
        }
    elif isinstance(targets, str):
        pattern = re.compile(targets)
        _refuse_head(decoder, pattern.fullmatch(decoder.head or "") is not None)
        chosen = {name for name in in_layers if pattern.fullmatch(name)}
        if not chosen:
            raise RecipeError(
                f"adapter.targets '{targets}' matches none of the {len(in_layers)} linear layers, such as "
                f"{next(iter(in_layers), 'none')}: a regular expression must match the full name; "
                f"for names give a list, [{targets}]"
            )
    else:
        chosen = set()
        for target in targets:
            _refuse_head(decoder, decoder.head is not None and _ends_with(decoder.head, target))
            found = {name for name in in_layers if _ends_with(name, target)}
            if not found:
                raise RecipeError(_unknown(target, model, linears, inside, decoder, layers))
            chosen |= found
    return {name: linear for name, linear in inside.items() if name in chosen}


def lost_in_peft(model: nn.Module, chosen: Iterable[str]) -> list[str]:
    """Return the adapted layers of a model with fused experts that PEFT 0.21 takes for the experts when it loads them.

    It renames every target called like a projection of the experts, whether it is one or not.
    """
    fused = bool(_fused_experts(model))
    return [name for name in chosen if fused and _last(name) in ("gate_proj", "up_proj", "down_proj")]


def describe_targets(model: nn.Module, chosen: Mapping[str, nn.Linear]) -> str:
    """Return how many linear layers of each name are adapted and which are left out."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    adapted = _counted(_last(name) for name in chosen)
    left_out = _counted(_last(name) for name in linears if name not in chosen)
    fused = _counted(_last(name) for name in _fused_experts(model))
    return (
        f"{len(chosen)} linear layers ({adapted})"
        + (f"; left out: {left_out}" if left_out else "")
        + (f"; not adaptable: experts held as fused 3-D parameters ({fused})" if fused else "")
    )


def _of_layers(
    inside: Mapping[str, nn.Linear], decoder: TextDecoder, layers: Sequence[int] | None
) -> Mapping[str, nn.Linear]:
    if layers is None:
        return inside
    for layer in layers:
        if layer >= decoder.n_layers:
            raise RecipeError(
                f"adapter.layers names layer {layer}, but the model's {decoder.n_layers} layers are 0 to "
                f"{decoder.n_layers - 1}"
            )
    prefixes = tuple(f"{decoder.layers}.{layer}." for layer in layers)
    return {name: linear for name, linear in inside.items() if name.startswith(prefixes)}


def _refuse_head(decoder: TextDecoder, named: bool) -> None:
    if named:
        raise RecipeError(
            f"adapter.targets names {decoder.head}, the output layer: it cannot be adapted, since logits are made at "
            "target tokens alone and its statistics would not compare with those of other layers, and where it is tied "
            "to the embedding it could not be merged; leave it out"
        )


def _unknown(
    target: str,
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    inside: Mapping[str, nn.Linear],
    decoder: TextDecoder,
    layers: Sequence[int] | None,
) -> str:
    """Return the sentence that says why a target names nothing."""
    if any(_ends_with(name, target) for name in inside):
        return f"adapter.targets names '{target}', which none of the layers {list(layers or ())} of adapter.layers has"
    if elsewhere := [name for name in linears if _ends_with(name, target)]:
        if _is_read_by_a_kernel(model, elsewhere[0]):
            return (
                f"adapter.targets names '{target}', but {elsewhere[0]} belongs to a state-space layer, whose kernel "
                "reads the weight alone: an adapter beside it would have no effect"
            )
        return (
            f"adapter.targets names '{target}', which only {elsewhere[0]} and its like are called: adapters go into "
            f"the text decoder, {decoder.name}"
        )
    known = ", ".join(sorted({_last(name) for name in inside}))
    message = f"adapter.targets names '{target}', but the model has no linear of that name; it has {known}"
    if fused := _fused_experts(model):
        message += (
            f"; its experts are held as fused 3-D parameters ({fused[0]} and {len(fused) - 1} more), which no adapter "
            "can be put beside"
        )
    return message


def _fused_experts(model: nn.Module) -> list[str]:
    shapes = {
        name: getattr(p, "ds_shape", p.shape) for name, p in model.named_parameters()
    }  # partitioned or not
    return [name for name, shape in shapes.items() if len(shape) == 3 and "expert" in name]


def _is_within(name: str, root: str) -> bool:
    return not root or name.startswith(f"{root}.")


def _is_read_by_a_kernel(model: nn.Module, name: str) -> bool:
    """Return whether a linear is the last of a Mamba layer, whose fused kernel takes its weight and never calls it."""
    parent, _, child = name.rpartition(".")
    return child == "out_proj" and isinstance(getattr(model.get_submodule(parent), "conv1d", None), nn.Conv1d)


def _ends_with(name: str, target: str) -> bool:
    """Return whether PEFT's rule matches: the full name, or a suffix of it that begins after a dot."""
    return name == target or name.endswith(f".{target}")


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _counted(names: Iterable[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(names).items())
