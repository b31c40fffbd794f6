"""Protocols: named, versioned files that fix how a benchmark is asked and read.

A published protocol never changes: results name it. A change gets a new version in a new file.
"""

from dataclasses import dataclass
from importlib import resources

import yaml

from dynrank_ds import prompts
from dynrank_ds.errors import RecipeError


@dataclass(frozen=True)
class Protocol:
    """How problems become prompts and completions become answers.

    Attributes:
        tasks: the benchmarks it is meant for.
        prompt: a name in `dynrank_ds.prompts`; None where the problem's text is the prompt.
        max_new_tokens: where generation ends at the latest.
        stop: strings before which a completion is cut.
        answer_marker: the answer follows its last occurrence; None where the whole completion is the answer.
        differences: what deviates from the protocol of the same name in the literature, and why.
    """

    name: str
    tasks: tuple[str, ...]
    prompt: str | None
    max_new_tokens: int
    stop: tuple[str, ...]
    answer_marker: str | None
    differences: tuple[str, ...]

    def render(self, text: str) -> str:
        return text if self.prompt is None else prompts.render(self.prompt, text)

    def cut(self, completion: str) -> str:
        """`completion` up to the first stop string, for completions that were generated without them."""
        ends = [position for stop in self.stop if (position := completion.find(stop)) >= 0]
        return completion[: min(ends)] if ends else completion


def load_protocol(name: str) -> Protocol:
    """The protocol called `name`; RecipeError where there is none."""
    folder = resources.files(__name__)
    known = sorted(
        file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml")
    )
    if name not in known:
        raise RecipeError(f"--protocol {name}: there is no such protocol; known are {', '.join(known)}.")
    fields = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    lists = {key: tuple(fields[key]) for key in ("tasks", "stop", "differences")}
    return Protocol(name=name, **{**fields, **lists})
