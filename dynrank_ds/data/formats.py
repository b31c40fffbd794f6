"""From a row's fields to the text of a prompt and of its answer."""

from dataclasses import dataclass

from dynrank_ds.data.sources import Row
from dynrank_ds.prompts import render


@dataclass(frozen=True)
class Format:
    """Which prompt of dynrank_ds.prompts a data set is trained with, and which fields fill it."""

    prompt: str
    question: str
    answer: str

    def texts(self, row: Row) -> tuple[str, str]:
        """(prompt, answer); DataError naming the row where a field is missing, no text, or empty.

        The answer starts with the one space that a model writes after the prompt's last word, so that
        prompt + answer is the text of prompt and completion at evaluation.
        """
        return render(self.prompt, row.text(self.question)), " " + row.text(self.answer)


FORMATS: dict[str, Format] = {
    "metamathqa": Format(prompt="metamath", question="query", answer="response"),
}
