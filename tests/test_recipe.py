from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from dynrank_ds.composing import shipped
from dynrank_ds.errors import RecipeError
from dynrank_ds.methods import METHODS
from dynrank_ds.recipe import Recipe, check_recipe, load_recipe
from dynrank_ds.recipe_sections import AdapterSection
from dynrank_ds.zero.config import load_config

VALUES: dict[str, Any] = {
    "model": {"path": "model"},
    "data": {"source": "data.jsonl"},
    "adapter": {"rank": 4},
    "method": {"name": "pe_dyra", "t_i": 4, "interval": 3, "t_f": 5},
    "train": {"steps": 20, "global_batch_size": 12, "learning_rate": 1e-3},
    "output": {"dir": "run"},
}

EXPECTED_DEFAULTS = {
    "lora": (2, 3e-3),
    "weightlora": (2, 3e-3),
    "weightlora_plus": (2, 3e-3),
    "ard_lora": (2, 3e-3),
    "squeeze": (2, 3e-3),
    "pe_dyra": (8, 5e-3),
    "adalora": (8, 5e-3),
    "elalora": (8, 5e-3),
    "increlora": (8, 5e-3),
    "dynamic_dora": (4 / 3, 5e-3),
}
"""Scale, and learning rate at hidden size 576, as dynrank_ds/methods/README.md has them."""


def changed(key: str, value: Any) -> dict[str, Any]:
    """VALUES with section.key set to a value, or a whole section."""
    values = copy.deepcopy(VALUES)
    section, _, field = key.partition(".")
    if field:
        values.setdefault(section, {})[field] = value
    else:
        values[section] = value
    return values


def write(path: Path, values: Any) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_loads_and_so_does_what_it_dumps(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe.dump())
    assert load_recipe(str(resolved)) == recipe
    load_config(recipe.deepspeed.config, bf16=True)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("trian", {}, "unknown key 'trian': did you mean 'train'?"),
        ("train.lerning_rate", 1, "unknown key 'train.lerning_rate': did you mean 'learning_rate'?"),
        ("method.intervall", 3, "unknown key 'method.intervall': did you mean 'interval'?"),
        ("data.xyzzy", 3, "unknown key 'data.xyzzy': known are columns, filter, format,"),
        (
            "data.source",
            {"a": {"source": "x", "share": 0.5, "shar": 1}},
            "unknown key 'data.source.a.shar': did you",
        ),
        ("data.source", {"a": {"source": "x"}}, "'data.source.a.share' is missing"),
        ("data.source", {"a": 5}, "'data.source.a' is 5: input should be a valid dictionary"),
        ("data.source", 5, "'data.source' is 5: input should be a valid string"),
        (
            "data.source",
            {"a": {"source": "$N0NE/x", "share": 0.5}},
            "'data.source.a.source' is '$N0NE/x': the env",
        ),
        ("data.held_out", 1.5, "data.held_out is 1.5: give whole samples, or a share below 1"),
        ("train.held_out_interval", 5, "train.held_out_interval is given, but data.held_out is 0"),
        ("train.steps", "many", "'train.steps' is 'many': input should be a valid integer"),
        ("method.k", 0, "'method.k' is 0: input should be greater than or equal to 1"),
        ("train.learning-rate", 1, "unknown key 'train.learning-rate': did you mean 'learning_rate'?"),
        ("train.steps", True, "'train.steps' is True: this key is not true or false"),
        ("train.learning_rate", True, "'train.learning_rate' is True: this key is not true or false"),
        ("method.interval", True, "'method.interval' is True: this key is not true or false"),
        ("train.steps", 0, "'train.steps' is 0: input should be greater than or equal to 1"),
        (
            "train.learning_rate",
            float("inf"),
            "'train.learning_rate' is inf: input should be a finite number",
        ),
        ("train.betas", [0.9, 1.0], "'train.betas.1' is 1.0: input should be less than 1"),
        ("train.warmup", 1.5, "train.warmup is 1.5: give whole steps, or a fraction of training below 1"),
        ("train.schedule", "step", "'train.schedule' is 'step': input should be 'linear', 'cosine' or"),
        ("train", 5, "'train' is 5: input should be a valid dictionary"),
        ("adapter.targets", 5, "'adapter.targets' is 5: input should be a valid tuple"),
        (
            "adapter.targets",
            "q(",
            "'adapter.targets' is 'q(': no regular expression (missing ),",
        ),
        ("adapter.targets", [], "'adapter.targets' is []: an empty list adapts nothing"),
        ("adapter.layers", [], "'adapter.layers' is []: tuple should have at least 1 item"),
        ("adapter.layers", [-1], "'adapter.layers.0' is -1: input should be greater than or equal to 0"),
        ("adapter.max_rank", 3, "adapter.max_rank 3 is below adapter.rank 4"),
        ("train.epochs", 1.0, "both of train.steps and train.epochs is given: give exactly one"),
        ("train.steps", None, "neither of train.steps and train.epochs is given: give exactly one"),
        ("method", {"name": "pedyra"}, "method.name is 'pedyra': known are lora, pe_dyra"),
        ("method", "lora", "'method' is 'lora': input should be a valid dictionary"),
        ("method.t_i", "soon", "'method.t_i' is 'soon': input should be a valid integer"),
        ("method.mix", 1.5, "'method.mix' is 1.5: input should be less than or equal to 1"),
        (
            "model",
            {"path": "m", "dtype": "fp32", "attention": "flash_attention_2"},
            "model.dtype is fp32: model.attention flash_attention_2 needs bf16",
        ),
    ],
)
def test_a_mistake_is_reported_by_file_key_value_and_what_would_be_right(
    key: str, value: Any, sentence: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "r.yaml", changed(key, value))
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert str(error.value).startswith(f"{path}: {sentence}")
    assert "\n" not in str(error.value)


def test_a_recipe_without_a_run_directory_writes_to_one_of_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", {**VALUES, "output": {}})
    assert load_recipe(path).output.dir == "runs/mine"
    assert load_recipe(path, ["output.dir=there"]).output.dir == "there"


@pytest.mark.parametrize("name", METHODS)
def test_scale_and_learning_rate_follow_from_the_method_and_the_models_width(name: str) -> None:
    recipe = check_recipe({**VALUES, "method": {"name": name}, "train": {"steps": 60}}, "r")
    rank_stabilised = recipe.model_copy(
        update={"adapter": recipe.adapter.model_copy(update={"scaling": "root_rank"})}
    )
    scale, rate = EXPECTED_DEFAULTS[name]
    for one in (recipe, recipe.with_defaults(576), rank_stabilised, rank_stabilised.with_defaults(576)):
        assert one.scale == pytest.approx(scale)
    found = [recipe.with_defaults(width).train.peak_rate for width in (64, 576, 1152, 4096)]
    assert found == pytest.approx([rate, rate, rate / 2, rate * 576 / 4096], rel=1e-2)


def test_given_values_stay_and_a_resumed_run_keeps_its_own() -> None:
    given = check_recipe({**VALUES, "adapter": {"alpha": 3.0, "rank": 4}}, "r")
    assert given.with_defaults(64) == given
    bare = check_recipe({**VALUES, "train": {"steps": 20}}, "r")
    before = bare.with_defaults(576).model_dump(mode="json")
    before["adapter"]["alpha"], before["train"]["learning_rate"] = 7.0, 0.5
    resumed = bare.with_defaults(576, before)
    assert (resumed.adapter.alpha, resumed.train.learning_rate) == (7.0, 0.5)


def test_all_missing_keys_are_named_at_once() -> None:
    with pytest.raises(RecipeError) as error:
        check_recipe({}, "r.yaml")
    assert str(error.value) == (
        "r.yaml: 'model.path', 'data.source', 'method.name', 'output.dir', 'train.steps' or 'train.epochs' are missing"
    )
    values = changed("train", {"lerning_rate": 1e-3, "seed": -1})
    values["output"] = {}
    with pytest.raises(RecipeError) as error:
        check_recipe(values, "r.yaml")
    assert str(error.value) == (
        "r.yaml: 'train.seed' is -1: input should be greater than or equal to 0 (and 1 more); "
        "'output.dir', 'train.steps' or 'train.epochs' are missing"
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "train: {steps: 3}\ndata: {}\ntrain:\n  steps: 4",
            "'train' stands twice in one mapping, in lines 1 and 3",
        ),
        (
            "train:\n  steps: 3\n  seed: 1\n  steps: 4",
            "'steps' stands twice in one mapping, in lines 2 and 4",
        ),
        ("data:\n  filter: {lang: a, lang: b}", "'lang' stands twice in one mapping, in lines 2 and 2"),
    ],
)
def test_a_key_given_twice_is_refused_with_its_lines(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as error:
        load_recipe(str(path))
    assert str(error.value) == f"{path}: the key {sentence}: remove one of the two"
    with pytest.raises(RecipeError, match=r"override 'data.filter=.*: the key 'a' stands twice"):
        load_recipe("quickstart", ["data.filter={a: 1, a: 2}"])


def test_variables_in_paths_are_expanded_as_the_home_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    monkeypatch.delenv("NOWHERE", raising=False)
    keys = ("model.path", "data.source", "output.dir", "deepspeed.config", "eval.data_dir")
    for key in keys:
        section, field = key.split(".")
        for written, expected in (
            ("$SCRATCH/x", f"{tmp_path}/x"),
            ("~/${SCRATCH}", f"{Path.home()}/{tmp_path}"),
        ):
            recipe = load_recipe("quickstart", [f"{key}={written}"])
            assert getattr(getattr(recipe, section), field) == expected
        with pytest.raises(
            RecipeError, match=rf"'{key}' is '\$NOWHERE/x': the environment variable NOWHERE is not set"
        ):
            load_recipe("quickstart", [f"{key}=$NOWHERE/x"])
    base = tmp_path / "base.yaml"
    write(base, VALUES)
    assert load_recipe(write(tmp_path / "r.yaml", {"base": "$SCRATCH/base.yaml"})).train.steps == 20


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train: [1\nmodel: 2", "is not valid YAML: while parsing a flow sequence"),
        ("? [1, 2]\n: 3", "is not valid YAML: while constructing a mapping"),
        ("- model", "holds list, not sections such as model: and train:"),
        ("", "holds NoneType, not sections"),
    ],
)
def test_a_file_that_is_no_recipe_is_reported(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as error:
        load_recipe(str(path))
    assert sentence in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_that_is_neither_file_nor_recipe_is_reported_with_the_shipped_recipes() -> None:
    with pytest.raises(RecipeError, match=r"recipe 'quickstrat' is neither a file nor one of .*quickstart"):
        load_recipe("quickstrat")


def test_a_base_gives_what_the_recipe_leaves_open(tmp_path: Path) -> None:
    below = write(tmp_path / "below.yaml", VALUES)
    above = write(tmp_path / "above.yaml", {"base": below, "train": {"steps": 7}, "adapter": {"alpha": 3.0}})
    recipe = load_recipe(above)
    assert (recipe.train.steps, recipe.train.learning_rate) == (7, 1e-3)
    assert (recipe.adapter.rank, recipe.adapter.alpha) == (4, 3.0)
    assert recipe.method.name == "pe_dyra"


def test_another_method_takes_nothing_from_the_bases_method(tmp_path: Path) -> None:
    below = write(tmp_path / "below.yaml", VALUES)
    above = write(tmp_path / "above.yaml", {"base": below, "method": {"name": "lora"}})
    assert load_recipe(above).method.model_dump() == {"name": "lora"}
    assert load_recipe(below, ["method.name=lora"]).method.model_dump() == {"name": "lora"}
    same = load_recipe(below, ["method.k=3"]).method
    assert same.name == "pe_dyra" and (same.k, same.interval) == (3, 3)


def test_bases_in_a_circle_are_reported(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    write(one, {"base": str(two)})
    write(two, {"base": str(one)})
    with pytest.raises(RecipeError, match=r"its bases form a circle: .*one.yaml -> .*two.yaml -> .*one.yaml"):
        load_recipe(str(one))


def part(path: Path, **values: Any) -> str:
    return write(path, values)


def test_of_several_bases_the_later_wins_and_the_recipe_over_all(tmp_path: Path) -> None:
    part(tmp_path / "model.yaml", **VALUES)
    part(tmp_path / "method.yaml", method={"name": "lora"}, train={"steps": 7}, adapter={"alpha": 2.0})
    above = part(tmp_path / "r.yaml", base=["model.yaml", "method.yaml"], adapter={"rank": 2})
    recipe = load_recipe(above)
    assert (recipe.train.steps, recipe.train.learning_rate) == (7, 1e-3)
    assert (recipe.adapter.rank, recipe.adapter.alpha) == (2, 2.0)
    assert recipe.method.model_dump() == {"name": "lora"}


def test_parts_joined_by_plus_are_a_recipe_with_a_directory_of_its_own(tmp_path: Path) -> None:
    model = part(tmp_path / "mine.yaml", model={"path": "mine"}, train=VALUES["train"] | {"steps": None})
    recipe = load_recipe(f"{model}+metamathqa+lora", ["train.seed=3"])
    assert (recipe.model.path, recipe.train.seed, recipe.method.name) == ("mine", 3, "lora")
    assert recipe.output.dir == "runs/mine_metamathqa_lora"
    assert load_recipe("quickstart+lora").output.dir == "runs/quickstart/run"  # the recipe's own


def test_numbers_of_a_pair_count_only_where_both_are_composed(tmp_path: Path) -> None:
    pair = {"other": {"train": {"steps": 5}}, "another": {"train": {"steps": 6}}}
    part(tmp_path / "one.yaml", **VALUES, **{"with": pair})
    part(tmp_path / "derived.yaml", base="one.yaml", adapter={"rank": 3})
    part(tmp_path / "other.yaml", adapter={"alpha": 2.0})
    part(tmp_path / "last.yaml", train={"steps": 9})
    steps = {
        name: load_recipe(part(tmp_path / "r.yaml", base=[f"{one}.yaml" for one in name.split()])).train.steps
        for name in ("one", "one other", "other one", "derived other", "one other last")
    }
    assert steps == {"one": 20, "one other": 5, "other one": 5, "derived other": 5, "one other last": 9}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"base": 5}, "base is 5: give the name or path of a recipe, or a list of them"),
        ({"base": ["quickstart", {"a": 1}]}, "give the name or path of a recipe, or a list of them"),
        ({"with": ["quickstart"]}, "with is ['quickstart']: give sections for each name"),
        ({"with": {"quickstart": 5}}, "give sections for each name"),
        ({"base": "lorra"}, "recipe 'lorra' is neither a file nor one of "),
    ],
)
def test_a_wrong_composition_is_refused(values: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path / "r.yaml", values))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_missing_part_is_reported_with_those_that_exist() -> None:
    with pytest.raises(RecipeError, match=r"recipe 'lorra' is neither .* methods: adalora, .*, lora, "):
        load_recipe("llama2_7b+metamathqa+lorra")


def test_overrides_are_yaml_and_the_last_one_wins(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", VALUES)
    overrides = ["train.steps=5", "train.steps=6", "train.learning_rate=2e-3", "adapter.targets=[q_proj]"]
    recipe = load_recipe(path, [*overrides, "method.t_i=0.25", "data.limit=null", "eval.tasks=[gsm8k]"])
    assert (recipe.train.steps, recipe.train.learning_rate) == (6, 2e-3)
    assert recipe.adapter.targets == ("q_proj",) and recipe.eval.tasks == ("gsm8k",)
    assert recipe.method.model_dump()["t_i"] == 0.25 and recipe.data.limit is None


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("steps=5", "override 'steps=5' is not of the form section.key=value"),
        ("train.steps", "override 'train.steps' is not of the form section.key=value"),
        ("train.steps=[1", "override 'train.steps=[1': the value is not valid YAML"),
        (
            "data.filter={lang:python}",
            "override 'data.filter={lang:python}': a key has no value: YAML takes a space",
        ),
        ("train.stepz=5", "unknown key 'train.stepz': did you mean 'steps'?"),
        ("train.steps=few", "'train.steps' is 'few': input should be a valid integer"),
    ],
)
def test_a_wrong_override_is_reported(override: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path / "r.yaml", VALUES), [override])
    assert sentence in str(error.value)


def recipe(**train: Any) -> Recipe:
    return check_recipe({**VALUES, "train": {**VALUES["train"], **train}}, "r.yaml")


def test_accumulation_follows_from_micro_batch_and_processes() -> None:
    assert [recipe(micro_batch_size=2).accumulation(n) for n in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(RecipeError, match=r"global_batch_size 12 is no multiple of .* 2 x 4 processes = 8"):
        recipe(micro_batch_size=2).accumulation(4)


def test_epochs_become_steps_of_the_global_batch() -> None:
    assert recipe().total_steps(1000) == 20
    assert recipe(steps=None, epochs=1.5).total_steps(100) == 12  # 12.5 to the even side
    assert recipe(steps=None, epochs=0.01).total_steps(100) == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            '{"train_batch_size": 8}',
            "sets 'train_batch_size': remove it, the recipe's train.global_batch_size",
        ),
        ('{"optimizer": {}}', "sets 'optimizer': remove it, the recipe's train decides it"),
        ('{"zero_optimization": {"stage": 0}}', "has zero_optimization.stage 0: give 1, 2 or 3"),
        (
            '{"zero_optimization": {"stage": 1}}',
            "has zero_optimization.stage 1 with model.dtype bf16: give stage 2, or fp32",
        ),
        ('{"zero_optimization": true}', "has zero_optimization.stage None: give 1, 2 or 3"),
        ("[]", "holds list, not a JSON object"),
        ("{", "is not JSON: "),
    ],
)
def test_a_deepspeed_configuration_that_cannot_be_used_is_reported(
    text: str, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(RecipeError) as error:
        load_config(str(path), bf16=True)
    assert str(error.value).startswith(f"deepspeed.config {path} {sentence}")


def test_a_missing_deepspeed_configuration_is_reported_with_those_that_exist() -> None:
    with pytest.raises(RecipeError, match=r"deepspeed.config is 'zero9': neither a file nor one of .*zero3"):
        load_config("zero9", bf16=True)


@pytest.mark.parametrize(
    ("max_rank", "rank", "sides", "expected"),
    [
        (None, 8, (900, 900), 512),
        (None, 600, (900, 900), 600),
        (16, 8, (900, 900), 16),
        (None, 8, (900, 7), 7),
    ],
)
def test_a_module_may_grow_to_512_or_the_rank_it_begins_with_or_what_the_recipe_says(
    max_rank: int | None, rank: int, sides: tuple[int, int], expected: int
) -> None:
    assert AdapterSection(max_rank=max_rank, rank=rank).largest_rank(*sides) == expected


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("moves: prune", "method.k is auto with method.moves prune and method.module_mean after: it prunes"),
        ("module_mean: before", "method.k is auto with method.moves both and method.module_mean before: it"),
        ("conserve: parameters", "method.conserve is parameters with method.moves both and method.k auto"),
    ],
)
def test_options_that_k_auto_would_ignore_are_refused(method: str, sentence: str, tmp_path: Path) -> None:
    key, value = method.split(": ")
    with pytest.raises(RecipeError, match=sentence):
        load_recipe("quickstart", ["method.k=auto", f"method.{key}={value}"])
