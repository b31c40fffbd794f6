"""Grade-school word problems drawn from templates: training rows and held-out problems, no download.

reasoning-gym's gsm_symbolic holds 85 templates of GSM8K problems with worked solutions (after Mirzadeh
et al., GSM-Symbolic, arXiv:2410.05229). Names, things and numbers vary from draw to draw.

    python -m dynrank_ds.data.gsm_symbolic --output data --train 3200
"""

import argparse
import json
import os
import re
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

from dynrank_ds.errors import DataError, DynrankError, MachineError

Generator = Callable[[Random, float], dict[str, Any]]

_NUMBER = r"\d+(?:\.\d+)?"
_BINARY = re.compile(rf"({_NUMBER}) ?([-+*/x]) ?({_NUMBER})")
_EQUATION = re.compile(rf"([\d.+*/x -]+)= ?[€£$]?({_NUMBER})")
_OPERATIONS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "x": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}
# A template that gave nothing new for so many draws is taken to be exhausted.
_BARREN_DRAWS = 500


@dataclass(frozen=True)
class Problem:
    template: int
    question: str
    solution: str
    answer: str

    @property
    def numbers(self) -> tuple[str, ...]:
        """The question's numbers in order: with the template they fix the solution, whatever the names."""
        return tuple(re.findall(_NUMBER, self.question))


@dataclass(frozen=True)
class GsmSymbolicFiles:
    train: Path
    held_out: Path
    unseen: Path


def write_gsm_symbolic(
    output: Path,
    n_train: int = 3200,
    n_held_out: int = 320,
    n_unseen: int = 160,
    n_templates: int = 16,
    n_unseen_templates: int = 8,
    seed: int = 0,
) -> GsmSymbolicFiles:
    """Write three JSONL files into the folder `output`; the same arguments give the same bytes.

    train.jsonl: rows {"query", "response", "template"} in MetaMathQA's form, from the n_templates templates
    with the shortest solutions. gsm_symbolic.jsonl: held-out problems {"task_id", "question", "answer",
    "template"} of those templates. gsm_symbolic_unseen.jsonl: problems of the n_unseen_templates next
    shortest templates, which no training row comes from.

    Each file is balanced over its templates, which take turns, so its first rows are balanced too. No
    question appears twice in a file, and no training row shares both template and numbers with a held-out
    problem, which is stricter than not sharing the question. The held-out files do not depend on n_train.

    Raises DataError where the templates hold too few different problems, or a file of one of these names is there
    with other content; MachineError without reasoning-gym.
    """
    generators = _generators()
    if n_templates + n_unseen_templates > len(generators):
        raise DataError(
            f"{n_templates} templates and {n_unseen_templates} unseen ones were asked for, "
            f"reasoning-gym has {len(generators)} in all"
        )
    ordered = sorted(generators, key=lambda template: (_mean_solution_length(template, generators), template))
    trained = ordered[:n_templates]
    unseen = ordered[n_templates : n_templates + n_unseen_templates]

    held_out_problems = _Draw(generators, seed, "held-out").balanced(trained, n_held_out)
    kept_apart = {(p.template, p.numbers) for p in held_out_problems}
    train_problems = _Draw(generators, seed, "train", kept_apart).balanced(trained, n_train)
    unseen_problems = _Draw(generators, seed, "unseen").balanced(unseen, n_unseen)

    output.mkdir(parents=True, exist_ok=True)
    files = GsmSymbolicFiles(
        output / "train.jsonl", output / "gsm_symbolic.jsonl", output / "gsm_symbolic_unseen.jsonl"
    )
    texts = {
        files.train: _jsonl(map(_training_row, train_problems)),
        files.held_out: _jsonl(_held_out_rows("gsm_symbolic", held_out_problems)),
        files.unseen: _jsonl(_held_out_rows("gsm_symbolic_unseen", unseen_problems)),
    }
    for path, text in texts.items():
        if path.exists() and path.read_bytes() != text.encode():
            raise DataError(f"{path} is there with other content: name another folder, or move it")
    for path, text in texts.items():
        _write(path, text)
    return files


@dataclass
class _Draw:
    """Distinct problems from one stream of random numbers, none with the numbers of `kept_apart`.

    Each draw has its own generator, seeded by a text that names split, template and draw: reasoning-gym's
    own data set seeds row i with seed + i, so that neighbouring seeds share problems.
    """

    generators: dict[int, Generator]
    seed: int
    split: str
    kept_apart: set[tuple[int, tuple[str, ...]]] = field(default_factory=set)

    def balanced(self, templates: list[int], count: int) -> list[Problem]:
        """Return `count` problems, drawn from the templates in turn."""
        each, rest = divmod(count, len(templates))
        per_template = [self.problems(t, each + (i < rest)) for i, t in enumerate(templates)]
        return [own[turn] for turn in range(each + 1) for own in per_template if turn < len(own)]

    def problems(self, template: int, count: int) -> list[Problem]:
        found: dict[str, Problem] = {}
        draw = newest = 0
        while len(found) < count and draw - newest < _BARREN_DRAWS:
            draw += 1
            random = Random(f"{self.seed}/{self.split}/{template}/{draw}")
            problem = _problem(template, self.generators[template](random, 1.0))
            if (
                problem
                and problem.question not in found
                and (template, problem.numbers) not in self.kept_apart
            ):
                found[problem.question] = problem
                newest = draw
        if len(found) < count:
            raise DataError(
                f"gsm_symbolic template {template} gives only {len(found)} different {self.split} problems, "
                f"{count} were asked for: ask for fewer or use more templates"
            )
        return list(found.values())


def _generators() -> dict[int, Generator]:
    try:
        from reasoning_gym.arithmetic.gsm_symbolic import gsm_symbolic
    except ImportError as error:
        raise MachineError("the package reasoning-gym is not installed: pip install reasoning-gym") from error
    known = gsm_symbolic.GSMSymbolicDataset(gsm_symbolic.GSMSymbolicDatasetConfig(seed=0, size=1)).generators
    return {template: known[template] for template in gsm_symbolic.tasks_ok}


def _mean_solution_length(template: int, generators: dict[int, Generator]) -> float:
    return mean(
        len(generators[template](Random(f"length/{template}/{i}"), 1.0)["metadata"]["answer_cot"])
        for i in range(200)
    )


def _problem(template: int, example: dict[str, Any]) -> Problem | None:
    """Return the example without its '#### N' line; None where its solution is wrong.

    Some templates round silently (half of 3 tubes of paint is 1), so that solution and answer are false.
    """
    solution, _, final = example["metadata"]["answer_cot"].rpartition("\n#### ")
    answer = example["answer"].replace(",", "")
    if final.replace(",", "") != answer or not _equations_hold(solution):
        return None
    return Problem(template, example["question"], solution.strip(), answer)


def _equations_hold(solution: str) -> bool:
    """Return whether every equation of two plain numbers in the text is true to the cent."""
    for left, right in _EQUATION.findall(solution.replace(",", "")):
        binary = _BINARY.fullmatch(left.strip())
        if binary is None:
            continue
        a, operator, b = binary.groups()
        if operator == "/" and Fraction(b) == 0:
            return False
        if abs(_OPERATIONS[operator](Fraction(a), Fraction(b)) - Fraction(right)) > Fraction(1, 100):
            return False
    return True


def _training_row(problem: Problem) -> dict[str, object]:
    response = f"{problem.solution}\nThe answer is: {problem.answer}"
    return {"query": problem.question, "response": response, "template": problem.template}


def _held_out_rows(name: str, problems: list[Problem]) -> Iterator[dict[str, object]]:
    for number, problem in enumerate(problems):
        yield {
            "task_id": f"{name}/{number}",
            "question": problem.question,
            "answer": problem.answer,
            "template": problem.template,
        }


def _jsonl(rows: Iterable[dict[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write(path: Path, text: str) -> None:
    # A name of its own: processes that start together write the same file.
    unfinished = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dynrank_ds.data.gsm_symbolic",
        description="Write training rows and held-out problems of gsm_symbolic.",
        epilog="example: python -m dynrank_ds.data.gsm_symbolic --output data --train 3200",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the three JSONL files")
    parser.add_argument("--train", type=int, default=3200, help="training rows")
    parser.add_argument(
        "--held-out", type=int, default=320, help="held-out problems of the trained templates"
    )
    parser.add_argument("--unseen", type=int, default=160, help="problems of templates never trained on")
    parser.add_argument(
        "--templates", type=int, default=16, help="trained templates, shortest solutions first"
    )
    parser.add_argument("--unseen-templates", type=int, default=8, help="templates never trained on")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    for name, value in vars(chosen).items():
        if name not in ("output", "seed") and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, it must be at least 1")
    try:
        files = write_gsm_symbolic(
            chosen.output,
            n_train=chosen.train,
            n_held_out=chosen.held_out,
            n_unseen=chosen.unseen,
            n_templates=chosen.templates,
            n_unseen_templates=chosen.unseen_templates,
            seed=chosen.seed,
        )
    except DynrankError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{files.train}\n{files.held_out}\n{files.unseen}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
