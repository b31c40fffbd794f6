"""From a row's fields to the text that is trained on, and where in it answers begin."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dynrank_ds.data.chat import ChatFormat
from dynrank_ds.data.own_prompt import ENDINGS, OwnPrompt
from dynrank_ds.data.rows import Row
from dynrank_ds.data.text import Format, Text
from dynrank_ds.errors import RecipeError
from dynrank_ds.prompts import PROMPTS, render


@dataclass(frozen=True)
class PromptFormat(Format):
    """One question and its answer, in a prompt of dynrank_ds.prompts."""

    prompt: str
    question: str
    answer: str

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.question, self.answer)

    def text(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> Text:
        return _answered(render(self.prompt, row.text(self.question)), row.text(self.answer))

    def definition(self) -> str:
        return repr((self, PROMPTS[self.prompt]))


@dataclass(frozen=True)
class AlpacaFormat(Format):
    """Stanford Alpaca's rows: instruction, output, and often an input, which has a prompt of its own."""

    fields = ("instruction", "input", "output")

    def text(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> Text:
        instruction, output = row.text("instruction"), row.text("output")
        for field in ("system", "history"):
            if row.fields.get(field):
                raise row.unfit(
                    "more than an instruction",
                    f"field {field!r} has no place in Alpaca's prompt: write the row as messages, for data.format chat",
                )
        if row.fields.get("input") in (None, ""):
            return _answered(render("alpaca", instruction), output)
        return _answered(render("alpaca_input", instruction, row.text("input")), output)

    def definition(self) -> str:
        return repr((self, PROMPTS["alpaca"], PROMPTS["alpaca_input"]))


@dataclass(frozen=True)
class CompletionFormat(Format):
    """A prompt and its completion, byte for byte: nothing is added or stripped but the end-of-text token."""

    fields = ("prompt", "completion")

    def text(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> Text:
        prompt = row.raw_text("prompt")
        return Text(prompt + row.raw_text("completion"), (prompt,))

    def definition(self) -> str:
        return repr(self)


def _answered(prompt: str, answer: str) -> Text:
    """Return prompt and answer, which starts with the one space that a model writes after a prompt."""
    return Text(f"{prompt} {answer}", (prompt,))


def find_format(name: str) -> Format:
    """Return the format of this name, or of this Jinja file.

    Raises:
        RecipeError: there is none.
    """
    if name.endswith(ENDINGS):
        return OwnPrompt.load(name)
    if name not in FORMATS:
        raise RecipeError(
            f"data.format is '{name}': known are {', '.join(sorted(FORMATS))}, or a file that ends in {ENDINGS[0]}"
        )
    return FORMATS[name]


FORMATS: dict[str, Format] = {
    # The prompts of MetaMath's and of PiSSA's evaluation: dynrank-eval's protocols metamath-v1 and pissa-v1.
    "metamathqa": PromptFormat(prompt="metamath", question="query", answer="response"),
    "codefeedback": PromptFormat(prompt="alpaca", question="query", answer="answer"),
    "alpaca": AlpacaFormat(),
    "chat": ChatFormat(),
    "completion": CompletionFormat(),
}
