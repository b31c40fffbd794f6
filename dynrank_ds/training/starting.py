"""The ranks that a run begins with, and the PEFT adapter that it may start from (`adapter.init_from`)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from torch import Tensor, nn

from dynrank_ds.adapters.linear import AdaptedModule, Part
from dynrank_ds.adapters.weight_decomposed import WeightDecomposedLinear
from dynrank_ds.errors import RecipeError, RunError
from dynrank_ds.export.folder import read_record
from dynrank_ds.export.low_rank import svd
from dynrank_ds.export.peft_adapter import PeftAdapter, Update
from dynrank_ds.recipe_sections import AdapterSection
from dynrank_ds.zero.gathering import gathered

logger = logging.getLogger(__name__)


def ranks_of_linears(
    section: AdapterSection, linears: Mapping[str, nn.Linear], least_rank: int
) -> dict[str, int]:
    """Return the ranks of the linear layers `linears` that do not begin with adapter.rank, by full name.

    With `adapter.init_from` that is all of them, and new triples are only what the method needs: `least_rank` where the
    adapter has none. A key of `adapter.ranks` is a full name or a dotted end of it; of several that fit, the longest
    counts.

    Raises:
        RecipeError: a key fits no layer, or the method cannot start with such a rank.
    """
    if section.init_from is not None:
        return dict.fromkeys(linears, least_rank)
    ranks: dict[str, int] = {}
    for key, rank in sorted(section.ranks.items(), key=lambda item: len(item[0])):
        fitting = [name for name in linears if name == key or name.endswith(f".{key}")]
        if not fitting:
            raise RecipeError(
                f"adapter.ranks names '{key}', which is none of the {len(linears)} adapted linear layers, such as "
                f"{next(iter(linears))}"
            )
        if rank < least_rank:
            raise RecipeError(
                f"adapter.ranks gives {key} rank {rank}: the method needs at least {least_rank} in every module"
            )
        ranks |= dict.fromkeys(fitting, rank)
    return ranks


def warn_of_another_base(adapter: Path, model_hash: str) -> None:
    """Warn if the adapter says that it was trained on a base of another hash; adapters of PEFT's say nothing."""
    trained_on = read_record(adapter).get("base_model_hash")
    if trained_on is not None and trained_on != model_hash:
        logger.warning(
            "adapter.init_from %s was trained on another base than model.path: their hashes differ", adapter
        )


def begin_magnitudes(modules: Mapping[str, AdaptedModule], magnitudes: Mapping[str, Tensor]) -> None:
    """Set the magnitudes of weight-decomposed modules that were given the triples of an adapter.

    magnitudes: (out,) of those whose adapter has them; the others begin with the function W x + dW x, as it had it.
    """
    for name, module in modules.items():
        if isinstance(module, WeightDecomposedLinear) and not module.base.weight.is_meta:
            with gathered(module.base.weight):
                module.begin_at(magnitudes.get(name))


class StartingAdapter:
    """The PEFT LoRA adapter that a run starts from.

    Raises:
        RunError: there is no such adapter.
        RecipeError: it does not fit the model, or adapts layers that the recipe does not.
    """

    def __init__(self, folder: Path, section: AdapterSection, linears: Mapping[str, nn.Linear]) -> None:
        self._folder, self._section = folder, section
        try:
            self._adapter = PeftAdapter(folder)
        except RunError as error:
            raise RunError(f"adapter.init_from: {error}") from error
        if self._adapter.weight_decomposed and not section.weight_decomposed:
            raise RecipeError(
                f"adapter.init_from {folder} is weight-decomposed (DoRA): set adapter.weight_decomposed to true, or "
                "start from another adapter"
            )
        for name, (out_features, in_features) in self._adapter.modules.items():
            linear = linears.get(name)
            if linear is None:
                raise RecipeError(
                    f"adapter.init_from {folder} adapts {name}, which is none of the {len(linears)} layers that "
                    "adapter.targets and adapter.layers name: add it there"
                )
            if (linear.out_features, linear.in_features) != (out_features, in_features):
                raise RecipeError(
                    f"adapter.init_from {folder}: {name} is {out_features} x {in_features}, the model's "
                    f"{linear.out_features} x {linear.in_features}: is it an adapter of this model?"
                )
        if left_out := [name for name in linears if name not in self._adapter.modules]:
            logger.info("adapter.init_from has no triples for %s and %d more", left_out[0], len(left_out) - 1)

    def magnitudes(self) -> dict[str, Tensor]:
        """Return the magnitudes of the output rows of every module, (out,) fp32; {} where the adapter has none."""
        names = self._adapter.modules if self._adapter.weight_decomposed else ()
        return {name: self._adapter.magnitudes(name) for name in names}

    def factors(
        self, modules: Mapping[str, AdaptedModule], factors: Sequence[str]
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield (module, {factor: fp32 weights}) with the adapter's update, for every module that it has triples of.

        modules: injected, with the scale of the run. factors: the method's. Without lora_E the adapter's own A and B
        are kept, with the ratio of the scales in B; with it they are those of the SVD: A and B orthonormal, and lora_E
        the singular values over the scale. Triples whose A and B are both zero, as padded exports have, are left out,
        and so are those that are zero in a head.

        Raises:
            RecipeError: a rank is above adapter.max_rank.
        """
        for name in self._adapter.modules:
            update = self._adapter.update(name)
            for full, module in modules.items():
                if full == name or (module.part is not None and module.part.linear == name):
                    triples = self._triples(full, _of_part(update, module.part), module, factors)
                    if triples:
                        yield full, triples

    def _triples(
        self, name: str, update: Update, module: AdaptedModule, factors: Sequence[str]
    ) -> dict[str, Tensor]:
        live = update.a.any(1) | update.b.any(0)
        update = Update(update.a[live], update.b[:, live], update.scale)
        largest = self._section.largest_rank(module.in_features, module.out_features)
        if len(update.a) > largest:
            raise RecipeError(
                f"adapter.init_from {self._folder} has rank {len(update.a)} in {name}, above its largest rank {largest}"
                " (adapter.max_rank, or the smaller side): use `dynrank resize` first"
            )
        if not len(update.a):
            return {}
        if "lora_E" not in factors:
            return {"lora_A": update.a, "lora_B": (update.b.T * (update.scale / module.scale)).contiguous()}
        u, singular, vt = svd(update)
        return {
            "lora_A": vt.float().contiguous(),
            "lora_E": (singular / module.scale).float(),
            "lora_B": u.T.float().contiguous(),
        }

    def __enter__(self) -> StartingAdapter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._adapter.__exit__(kind, error, trace)


def _of_part(update: Update, part: Part | None) -> Update:
    """Return the update of a head: its rows of B or its columns of A, and the triples that are not zero there."""
    if part is None:
        return update
    own = slice(part.start, part.stop)
    a, b = (update.a, update.b[own]) if part.side == "rows" else (update.a[:, own], update.b)
    kept = (b if part.side == "rows" else a.T).any(0)
    return Update(a[kept], b[:, kept], update.scale)
