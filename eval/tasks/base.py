"""What a benchmark has to provide."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from dynrank_eval.protocols import Protocol


class Verdict(str, Enum):
    """The outcome of one sample; all but CORRECT score 0.

    INVALID: there is no answer to judge. TIMEOUT: the program was stopped at its time limit.
    """

    CORRECT = "correct"
    WRONG = "wrong"
    INVALID = "invalid"
    TIMEOUT = "timeout"


@dataclass(frozen=True)
class Problem:
    """What the model is asked (without the protocol's prompt) and what its answer is held against."""

    task_id: str
    text: str
    reference: dict[str, str]


@dataclass(frozen=True)
class Judgement:
    verdict: Verdict
    extracted: str | None


class Task(ABC):
    """A benchmark."""

    name: str
    default_protocol: str

    @abstractmethod
    def load(self, data_dir: Path | None) -> list[Problem]:
        """All problems, in the benchmark's order; DataError where they are not to be had."""

    def check_machine(self) -> None:  # noqa: B027  most tasks need nothing
        """Raises MachineError where this machine cannot score the task; called before generating."""

    @abstractmethod
    def judge(
        self, problems: Sequence[Problem], completions: Sequence[str], protocol: Protocol
    ) -> list[Judgement]:
        """One judgement per problem, of the completion at the same place."""


def fingerprint(values: object) -> str:
    """SHA-256 of `values` as JSON."""
    return hashlib.sha256(json.dumps(values, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
