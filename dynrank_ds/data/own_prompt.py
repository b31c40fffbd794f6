"""Prompts of the user's own: a Jinja file over the fields of a row, whose answer stands in a generation block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from dynrank_ds.data.rows import Row
from dynrank_ds.data.text import TEMPLATE_FAULTS, Format, Text
from dynrank_ds.errors import RecipeError

ENDINGS = (".jinja", ".jinja2", ".j2")
_BEGIN, _END = "\ue000dynrank-answer-begins\ue000", "\ue000dynrank-answer-ends\ue000"


class _Generation(Extension):
    """`{% generation %}answer{% endgeneration %}`, the block by which chat templates mark what is learned."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own form

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{_BEGIN}{caller()}{_END}"


def _text_of(value: Any) -> Any:
    if value is None:
        raise TemplateError("a value is null")
    return value


@dataclass(frozen=True)
class OwnPrompt(Format):
    """The text of a Jinja template, in which every field of the row is a variable.

    The answer and the end-of-text token behind it are learned; what stands before is the prompt, byte for byte.
    """

    path: str
    template: str

    @classmethod
    def load(cls, path: str) -> OwnPrompt:
        """Return the format in a file.

        Raises:
            RecipeError: there is none, it is no Jinja, or it does not mark one answer.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            _environment().parse(text)
        except OSError as error:
            raise RecipeError(f"data.format is '{path}': it cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise RecipeError(f"data.format is '{path}': not UTF-8 text") from error
        except TemplateSyntaxError as error:
            raise RecipeError(
                f"data.format is '{path}': line {error.lineno} is no Jinja ({error.message})"
            ) from error
        if "endgeneration" not in text:
            raise RecipeError(
                f"data.format is '{path}': it marks no answer: put {{% generation %}} before it and "
                "{% endgeneration %} behind it"
            )
        return cls(path, text)

    def text(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> Text:
        fields = {str(name): value for name, value in row.fields.items()}
        try:
            marked = _environment().from_string(self.template).render(fields)
        except (TemplateError, *TEMPLATE_FAULTS) as error:
            raise row.unfit("refused by the template", f"{self.path} refuses it ({error})") from error
        if marked.count(_BEGIN) != 1 or marked.count(_END) != 1:
            raise row.unfit(
                "not one answer", f"{self.path} gives {marked.count(_BEGIN)} answers, it must give one"
            )
        prompt, _, rest = marked.partition(_BEGIN)
        answer, _, after = rest.partition(_END)
        if after.strip():
            raise row.unfit(
                "text behind the answer", f"{self.path} writes {after.strip()[:40]!r} behind the answer"
            )
        row.checked(answer, "the answer")
        return Text(row.checked(prompt, "the prompt") + answer, (prompt,))

    def definition(self) -> str:
        return f"own prompt 1: {self.template}"


def _environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        extensions=[_Generation],
        finalize=_text_of,
    )
