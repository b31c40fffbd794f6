"""Protocols: named, versioned files that fix how a benchmark is asked and read.

A published protocol never changes: results name it. A change gets a new version in a new file.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from dynrank_ds import prompts
from dynrank_ds.errors import ModelError, RecipeError
from dynrank_eval.extraction import Rule


@dataclass(frozen=True)
class FewShot:
    """Solved examples before each problem, drawn without return from the task's training rows.

    One generator, seeded once, draws for all problems in order, as lm-eval does.
    """

    n: int
    seed: int
    template: str

    def contexts(self, examples: Sequence[Mapping[str, Any]], problems: int) -> list[str]:
        draw = random.Random(self.seed)
        return [
            "".join(self.template.format_map(row) for row in draw.sample(examples, self.n))
            for _ in range(problems)
        ]


@dataclass(frozen=True)
class Protocol:
    """How the problems of one task become prompts and completions become answers.

    Attributes:
        tasks: the benchmarks it is meant for.
        prompt: text with "{problem}" where the problem goes.
        chat: the prompt is a user's message in the model's own chat template.
        max_new_tokens: where generation ends at the latest.
        stop: strings before which a completion is cut.
        answers: ways to read the answer, by name: rules of which the first that finds something decides. The
            first way makes the score, the others are reported beside it. Empty: the whole completion is the answer.
        graders: what decides whether an answer is right; the first makes the score. Empty: the task's only one.
        code: for tasks that ask for code, what of a completion is the program: "continuation" of the
            prompt, of which EvalPlus' sanitizer keeps what is needed, or the first fenced "block" in it.
        fewshot: solved examples, or None.
        differences: what deviates from the protocol of the same name in the literature, and why.
    """

    name: str
    tasks: tuple[str, ...]
    prompt: str
    chat: bool
    max_new_tokens: int
    stop: tuple[str, ...]
    answers: Mapping[str, tuple[Rule, ...]]
    graders: tuple[str, ...]
    code: str | None
    fewshot: FewShot | None
    differences: tuple[str, ...]

    def render(self, text: str, tokenizer: Any = None) -> str:
        """The prompt around a problem's text; a chat needs the model's tokenizer for its template."""
        prompt = self.prompt.replace("{problem}", text)
        if not self.chat:
            return prompt
        if getattr(tokenizer, "chat_template", None) is None:
            raise ModelError(
                f"--protocol {self.name} needs a chat template, and the model's tokenizer has none; "
                "take another protocol, or a chat model."
            )
        messages = [{"role": "user", "content": prompt}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def cut(self, completion: str) -> str:
        """`completion` up to the first stop string, for completions that were generated without them."""
        ends = [position for stop in self.stop if (position := completion.find(stop)) >= 0]
        return completion[: min(ends)] if ends else completion


def load_protocol(name: str, task: str) -> Protocol:
    """The protocol called `name`, as it is for `task`; RecipeError where there is none."""
    folder = resources.files(__name__)
    known = sorted(
        file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml")
    )
    if name not in known:
        raise RecipeError(f"--protocol {name}: there is no such protocol; known are {', '.join(known)}.")
    common = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    tasks = common.pop("tasks")
    if task not in tasks:
        raise RecipeError(f"--protocol {name} does not fit --task {task}; it is for {', '.join(tasks)}.")
    return _protocol(name, tuple(tasks), {**common, **(tasks[task] or {})})


def _protocol(name: str, tasks: tuple[str, ...], fields: Mapping[str, Any]) -> Protocol:
    answers = {
        way: tuple(Rule.parse(rule) for rule in rules) for way, rules in fields.get("answers", {}).items()
    }
    prompt = prompts.render(fields["prompt"], "{problem}") if "prompt" in fields else fields["template"]
    return Protocol(
        name=name,
        tasks=tasks,
        prompt=prompt,
        chat=fields.get("chat", False),
        max_new_tokens=fields["max_new_tokens"],
        stop=tuple(fields.get("stop", ())),
        answers=answers,
        graders=tuple(fields.get("graders", ())),
        code=fields.get("code"),
        fewshot=FewShot(**fields["fewshot"]) if "fewshot" in fields else None,
        differences=tuple(fields["differences"]),
    )
