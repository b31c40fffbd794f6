"""Protocols: named, versioned files that fix how a benchmark is asked and read.

A published protocol never changes: results name it. A change gets a new version in a new file. There are two families:
`dynrank-*` and `chat-*` are ours and judge what an answer says; the others bear the name of a paper or tool, and their
newest versions do what that script does, its errors included.
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

_SPLITTER = "dynrank-eval-reply-goes-here"


@dataclass(frozen=True)
class FewShot:
    """Solved examples before each problem: always the same, or drawn without replacement from the training rows.

    One generator, seeded once, draws for all problems in order, as lm-eval does.

    Attributes:
        examples: the examples where they are always the same; else empty.
    """

    n: int
    template: str
    seed: int = 0
    examples: Sequence[Mapping[str, Any]] = ()

    def contexts(self, examples: Sequence[Mapping[str, Any]], problems: int) -> list[str]:
        """Return the text before each of `problems` problems; `examples` are the training rows."""
        if self.examples:
            return ["".join(self.template.format_map(row) for row in self.examples[: self.n])] * problems
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
        form: the problem's text in one of its other forms (`Problem.forms`); None: as it is.
        chat: the prompt is a user's message in the model's own chat template.
        reply_prefix: for a chat, how the model's reply begins; empty: the reply is the model's own.
        max_new_tokens: where generation ends at the latest.
        stop: strings before which generation ends.
        cuts_completions: whether completions that were generated elsewhere are cut at `stop` as well.
        reader: how the answer is read from a completion: "rules" (those in `answers`), "stated" (from first
            principles), or the name of the script that is repeated.
        answers: ways to read the answer, by name: rules of which the first that finds something decides. The
            first way makes the score, the others are reported beside it. Empty: the whole completion is the answer.
        graders: what decides whether an answer is right; the first makes the score. Empty: the task's only one.
        code: for tasks that ask for code, which rule makes a program of a completion (`dynrank_eval.tasks.code`).
        fewshot: solved examples, or None.
        temperature, top_p, samples: how completions are drawn unless the user says otherwise.
        problem_ids: the first and last number of the problems that are asked; None: all.
        differences: what deviates from the protocol of the same name in the literature, and why.
        known_errors: what the repeated script gets wrong, and this protocol with it.
    """

    name: str
    tasks: tuple[str, ...]
    prompt: str
    form: str | None
    chat: bool
    reply_prefix: str
    max_new_tokens: int
    stop: tuple[str, ...]
    cuts_completions: bool
    reader: str
    answers: Mapping[str, tuple[Rule, ...]]
    graders: tuple[str, ...]
    code: str | None
    fewshot: FewShot | None
    temperature: float
    top_p: float
    samples: int
    problem_ids: tuple[int, int] | None
    differences: tuple[str, ...]
    known_errors: tuple[str, ...]

    def render(self, text: str, tokenizer: Any = None) -> str:
        """Return the prompt around a problem's text; a chat needs the model's tokenizer for its template."""
        prompt = self.prompt.replace("{problem}", text.strip() if self.reply_prefix else text)
        if not self.chat:
            return prompt
        if getattr(tokenizer, "chat_template", None) is None:
            raise ModelError(
                f"--protocol {self.name} needs a chat template, and the model's tokenizer has none; "
                "take another protocol, or a chat model."
            )
        messages = [{"role": "user", "content": prompt}]
        if self.reply_prefix:
            # As EvalPlus: the template renders a whole reply, of which only the beginning is kept.
            messages.append(
                {"role": "assistant", "content": f"{self.reply_prefix}\n```python\n{_SPLITTER}\n```\n"}
            )
            return str(tokenizer.apply_chat_template(messages, tokenize=False)).split(_SPLITTER)[0]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def cut(self, completion: str) -> str:
        """Return a given completion up to the first stop string where the protocol cuts such completions."""
        if not self.cuts_completions:
            return completion
        ends = [position for stop in self.stop if (position := completion.find(stop)) >= 0]
        return completion[: min(ends)] if ends else completion


def protocol_names() -> list[str]:
    """Return the names of all protocols."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_protocol(name: str, task: str) -> Protocol:
    """Return the protocol called `name`, as it is for `task`; RecipeError where there is none."""
    known = protocol_names()
    if name not in known:
        raise RecipeError(f"--protocol {name}: there is no such protocol; known are {', '.join(known)}.")
    common = yaml.safe_load((resources.files(__name__) / f"{name}.yaml").read_text(encoding="utf-8"))
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
        form=fields.get("form"),
        chat=fields.get("chat", False),
        reply_prefix=fields.get("reply_prefix", ""),
        max_new_tokens=fields["max_new_tokens"],
        stop=tuple(fields.get("stop", ())),
        cuts_completions=fields.get("cuts_completions", True),
        reader=fields.get("reader", "rules"),
        answers=answers,
        graders=tuple(fields.get("graders", ())),
        code=fields.get("code"),
        fewshot=FewShot(**fields["fewshot"]) if "fewshot" in fields else None,
        temperature=fields.get("temperature", 0.0),
        top_p=fields.get("top_p", 1.0),
        samples=fields.get("samples", 1),
        problem_ids=tuple(fields["problem_ids"]) if "problem_ids" in fields else None,
        differences=tuple(fields.get("differences", ())),
        known_errors=tuple(fields.get("known_errors", ())),
    )
