"""Studies: read, checked before anything runs, expanded into runs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from dynrank_ds.errors import DataError, RecipeError
from dynrank_ds.study.definition import Run, load_study, points, recipe_of, tuning_runs
from dynrank_ds.study.work import check_problems
from tests.support.studies import write_study

STUDIES = Path(__file__).resolve().parents[2] / "recipes/studies"


def test_grid_gives_every_combination_with_a_name_and_a_recipe_of_its_own(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path))
    study = study.model_copy(
        update={
            "arms": {
                **study.arms,
                "lora": study.arms["lora"].model_copy(
                    update={"grid": {"train.learning_rate": [1e-3, "3e-3"], "adapter.rank": [2, 4]}}
                ),
            }
        }
    )
    found = points(study, "lora")
    assert [one.label for one in found] == [
        "learning_rate=0.001,rank=2",
        "learning_rate=0.001,rank=4",
        "learning_rate=3e-3,rank=2",
        "learning_rate=3e-3,rank=4",
    ]
    assert len({run.name for run in tuning_runs(study, "lora")}) == 4
    recipe, _ = recipe_of(study, Run(found[2], seed=7), tmp_path / "run")
    assert (recipe.train.learning_rate, recipe.adapter.rank, recipe.train.seed) == (3e-3, 2, 7)
    assert (recipe.method.name, recipe.train.steps) == ("lora", 8)


def test_problems_that_tune_and_decide_are_counted(tmp_path: Path) -> None:
    assert check_problems(load_study(write_study(tmp_path))) == (3, 5)


def test_a_problem_that_tunes_and_decides_is_refused(tmp_path: Path) -> None:
    final = {"tasks": ["gsm_symbolic"], "data_dir": str(tmp_path), "skip": 2, "seeds": [1]}
    study = load_study(write_study(tmp_path, final=final))
    with pytest.raises(
        DataError, match=r"1 of the 3 tuning problems are final problems too, such as '2 \+ 1\?'"
    ):
        check_problems(study)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": "lor"}, "reference is lor: give one of lora, pe_dyra"),
        ({"overrides": {"train.seed": 3}}, "train.seed is given for lora: a study sets it itself"),
        ({"overrides": {"train.step": 3}}, "recipe.yaml: unknown key 'train.step': did you mean 'steps'?"),
        ({"arms": {}}, "arms: Dictionary should have at least 2 items"),
        ({"arm": {}}, "arm: Extra inputs are not permitted"),
        ({"budget": {"by": "time"}}, "budget.by: Input should be 'parameters', 'steps' or 'seconds'"),
        (
            {"tuning": {"tasks": ["gsm_symbolic"], "seeds": []}},
            "tuning.seeds: List should have at least 1 item",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_mistakes_in_a_study_are_one_sentence(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_study(tmp_path, **change)
    with pytest.raises(RecipeError) as raised:
        load_study(path)
    assert message in str(raised.value) and len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_resize_by_two_sizes_is_refused(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    path.write_text(path.read_text().replace("parameters: 4000", "parameters: 4000\n      rank: 2"))
    with pytest.raises(RecipeError, match="exactly one of the keys rank, parameters, keep"):
        load_study(path)


def test_a_file_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("about: [")
    with pytest.raises(RecipeError, match=r"study.yaml is not valid YAML"):
        load_study(tmp_path / "study.yaml")


@pytest.mark.parametrize("name", sorted(path.stem for path in STUDIES.glob("*.yaml")))
def test_every_shipped_study_is_valid_and_compares_arms_of_one_budget(name: str) -> None:
    study = load_study(STUDIES / f"{name}.yaml")
    assert study.reference == "lora" and len(study.arms) >= 4 and len(study.final.seeds) == 3
    for arm in study.arms:
        rates = [float(str(rate)) for rate in study.arms[arm].grid["train.learning_rate"]]
        assert rates == sorted(rates) and len(rates) >= 3, arm
        # Half a decade apart.
        assert all(2.8 < high / low < 3.6 for low, high in itertools.pairwise(rates)), arm
        recipe, _ = recipe_of(study, tuning_runs(study, arm)[0], Path("run"))
        final_rank = recipe.method.final_mean_rank(recipe.adapter.rank) or recipe.adapter.rank
        reference, _ = recipe_of(study, tuning_runs(study, "lora")[0], Path("run"))
        assert final_rank == reference.adapter.rank or study.arms[arm].resize or arm in UNEVEN, arm


UNEVEN = ("ard_lora", "weightlora_plus")
"""Arms whose size follows from what they learn: the report says where it is not the budget."""
