"""The benchmark of the evaluator."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynrank_ds.bench.evaluation import measure_eval
from dynrank_ds.errors import DynrankError, RecipeError
from dynrank_ds.recipe import load_recipe
from tests.support.launch import quick_benchmark
from tests.support.recipes import write_recipe
from tests.support.scoring import write_rows
from tests.support.tiny import write_talking_model


def test_a_recipe_without_tasks_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe(str(write_recipe(tmp_path)))
    with pytest.raises(RecipeError, match=r"eval\.tasks and eval\.data_dir must be given"):
        next(measure_eval(recipe, True))


def test_an_evaluation_that_fails_is_reported_with_its_error(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vllm is not installed")
    tasks = ["eval.tasks=[gsm_symbolic]", f"eval.data_dir={tmp_path / 'nowhere'}"]
    recipe = load_recipe(str(write_recipe(tmp_path)), tasks)
    with pytest.raises(
        DynrankError, match=r"dynrank-eval run ended with 2: .*nowhere: there is no such folder"
    ):
        next(measure_eval(recipe, True))


@pytest.mark.slow
def test_engines_and_bare_vllm_are_timed_on_the_recipes_problems(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vllm is not installed")
    path = write_recipe(tmp_path)
    model = write_talking_model(tmp_path / "talking")
    rows = [{"task_id": str(n), "question": f"{n} + 1?", "answer": str(n + 1)} for n in range(40)]
    write_rows(tmp_path / "gsm_symbolic.jsonl", rows)
    other = tmp_path / "eval.yaml"
    other.write_text(
        f"base: {path}\nmodel: {{path: {model}}}\neval: {{tasks: [gsm_symbolic], data_dir: {tmp_path}}}\n"
    )
    printed = quick_benchmark("eval", other)
    for what in ("dynrank-eval run, engines: 1", "dynrank-eval run, engines: 2", "evaluation / bare vLLM"):
        assert f"eval       {what}" in printed
    assert printed.count("prompts/s") == 2 and printed.count("for 32") == 2
