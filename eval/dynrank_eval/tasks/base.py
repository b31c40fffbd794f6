"""What a benchmark has to provide."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from dynrank_ds.errors import DataError
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
    """What the model is asked (without the protocol's prompt) and what its answer is compared with.

    Attributes:
        forms: the text in other forms that some protocols ask in.
        groups: what results are broken down by: {"subject": "Algebra", "level": "1"}.
    """

    task_id: str
    text: str
    reference: dict[str, Any]
    groups: Mapping[str, str] = field(default_factory=dict)
    forms: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgement:
    """The verdict and what was judged.

    Attributes:
        extracted: the answer or program that was judged; None where there was none.
        grades: where more than one reading or grader was asked, what each says.
        grader: what decided.
    """

    verdict: Verdict
    extracted: str | None
    grades: Mapping[str, bool] = field(default_factory=dict)
    grader: str = ""


class Task(ABC):
    """A benchmark."""

    name: str
    default_protocol: str

    @abstractmethod
    def load(self, data_dir: Path | None) -> list[Problem]:
        """Return all problems, in the benchmark's order; DataError where they are not to be had."""

    def source(self, data_dir: Path | None) -> dict[str, str]:
        """Return where the problems come from (`file` or `hub`) and which `variant` of the benchmark they are."""
        return {}

    def examples(self, data_dir: Path | None) -> list[dict[str, Any]]:
        """Return training rows for protocols with solved examples; DataError where there are none."""
        raise DataError(f"{self.name} has no solved examples, which this protocol shows before each problem.")

    def check_machine(  # noqa: B027  most tasks need nothing
        self, protocol: Protocol, allow_network: bool
    ) -> None:
        """Raise MachineError where this machine cannot score the task; called before generating."""

    def machine(self) -> dict[str, Any]:
        """Return what of this machine bears on the verdicts, for the run block of results.json."""
        return {}

    @abstractmethod
    def judge(
        self, problems: Sequence[Problem], completions: Sequence[str], protocol: Protocol
    ) -> list[Judgement]:
        """Return one judgement per problem, of the completion at the same place."""


def fingerprint(values: object) -> str:
    """Return the SHA-256 of `values` as JSON."""
    return hashlib.sha256(
        json.dumps(values, ensure_ascii=False, sort_keys=True).encode("utf-8", "backslashreplace")
    ).hexdigest()
