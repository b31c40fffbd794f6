"""A Jinja file as `data.format`: its prompt and answer are those of the row, and mistakes in it are reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dynrank_ds.data.formats import FORMATS, find_format
from dynrank_ds.data.rows import Row, UnfitRowError
from dynrank_ds.errors import RecipeError
from dynrank_ds.prompts import PROMPTS
from tests.data.conftest import tokenised

TEMPLATE = (
    "{% for shot in shots %}Q: {{ shot.q }} A: {{ shot.a }}\n{% endfor %}\nQ: {{ question }}\nA:"
    "{% generation %} {{ answer | trim }}{% endgeneration %}\n"
)
SHOTS = [{"q": "1", "a": "one"}, {"q": "2", "a": "two"}]


def written(folder: Path, template: str) -> str:
    (folder / "p.jinja").write_text(template)
    return str(folder / "p.jinja")


def test_the_answer_is_learned_behind_the_prompt(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    format = find_format(written(tmp_path, TEMPLATE))
    row = Row({"shots": SHOTS, "question": "5?", "answer": " The answer is: 17 "}, "row 1")
    sample = tokenised([row], tokenizer, format).sample(0)
    prompt = "Q: 1 A: one\nQ: 2 A: two\nQ: 5?\nA:"
    assert sample.ids[: sample.n_prompt].tolist() == tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(sample.ids[sample.targets]) == " The answer is: 17</s>"


def test_a_shipped_prompt_written_as_a_file_gives_the_same_tokens(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    template = PROMPTS["metamath"].replace("{instruction}", "{{ query }}")
    format = find_format(written(tmp_path, template + "{% generation %} {{ response }}{% endgeneration %}"))
    row = Row({"query": "5 {x}?", "response": "17"}, "row 1")
    own, shipped = (tokenised([row], tokenizer, one).sample(0) for one in (format, FORMATS["metamathqa"]))
    assert own.ids.tolist() == shipped.ids.tolist() and own.targets.tolist() == shipped.targets.tolist()


@pytest.mark.parametrize(
    ("fields", "template", "sentence"),
    [
        ({"question": "q", "answer": "a"}, TEMPLATE, "'shots' is undefined"),
        (
            {"a": 7},
            "{{ a + 'x' }}{% generation %}{{ a }}{% endgeneration %}",
            "refuses it (unsupported operand",
        ),
        ({"shots": [], "question": None, "answer": "a"}, TEMPLATE, "refuses it (a value is null)"),
        ({"shots": [], "question": "q", "answer": " "}, TEMPLATE, "the answer is empty, it must be text"),
        (
            {"a": ["x", "y"]},
            "Q{% for x in a %}{% generation %}{{ x }}{% endgeneration %}{% endfor %}",
            "gives 2 answers",
        ),
        ({"a": "x"}, "Q{% generation %}{{ a }}{% endgeneration %} more", "writes 'more' behind the answer"),
        ({"a": "x"}, "{% generation %}{{ a }}{% endgeneration %}", "the prompt is empty"),
    ],
)
def test_rows_that_the_template_cannot_write_are_unfit(
    fields: dict[str, Any], template: str, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UnfitRowError, match="row 1: ") as error:
        find_format(written(tmp_path, template)).text(Row(fields, "row 1"), None)
    assert sentence in str(error.value)


def test_files_that_are_no_template_are_refused(tmp_path: Path) -> None:
    for template, sentence in (
        ("Q: {{ q }}\n{% if %}", "line 2 is no Jinja"),
        ("Q: {{ q }} A: {{ a }}", "it marks no answer: put {% generation %} before it"),
    ):
        with pytest.raises(RecipeError) as error:
            find_format(written(tmp_path, template))
        assert sentence in str(error.value)
    with pytest.raises(RecipeError, match=r"nowhere.jinja': it cannot be read"):
        find_format("nowhere.jinja")


def test_a_changed_file_is_another_format(tmp_path: Path) -> None:
    before = find_format(written(tmp_path, TEMPLATE)).definition()
    assert find_format(written(tmp_path, " " + TEMPLATE)).definition() != before
