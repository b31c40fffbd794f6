"""Perturbed replies whose verdicts are compared with the packages'; seeds are fixed."""

import random
import re

_PIECES = ["#### ", "####", "The answer is ", "The answer is: ", "$", ",", ".", "-", "%", "/", " ", "\n", "A"]
_PIECES += ["a lot", "="]
_LEADS = ["So ", "", "1 + 1 = 2. ", "**", "\\boxed{"]


def number_replies(golds: list[str], each: int) -> list[list[str]]:
    """Return `each` replies for each gold number, of markers, signs, the gold and other numbers."""
    draw = random.Random(0)
    made = []
    for gold in golds:
        row = []
        for _ in range(each):
            words = [draw.choice([*_PIECES, gold, gold, str(draw.randint(0, 2000))]) for _ in range(8)]
            row.append(draw.choice(_LEADS) + "".join(words))
        made.append(row)
    return made


_FINAL = "Final Answer: The final answer is {}. I hope it is correct."
_WAYS = [
    _FINAL.replace("{}", "${}$"),
    _FINAL,
    _FINAL.replace("{}", "$x = {}$"),
    _FINAL.replace("{}", "${}\\text{{ cm}}^2$"),
    _FINAL.replace("{}", "\\boxed{{{}}}"),
    "Final Answer: The final answer is ${}$",
    "Final Answer: The final answer is $7$. I hope it is correct. " + _FINAL,
    "The answer is ${}$.",
    "So \\boxed{{{}}}.\n" + _FINAL.replace("{}", "$0$"),
]
_CHANGES = [
    lambda text, draw: text,
    lambda text, draw: text.replace("\\frac", "\\dfrac"),
    lambda text, draw: re.sub(r"\\frac\{([^{}]+)\}\{([^{}]+)\}", r"(\1)/(\2)", text),
    lambda text, draw: re.sub(r"\\frac\{(\d)\}\{(\d)\}", r"\\frac\1\2", text),
    lambda text, draw: re.sub(r"\\sqrt\{(\w)\}", r"\\sqrt\1", text),
    lambda text, draw: re.sub(r"^(\d+)$", r"\1.0", text),
    lambda text, draw: re.sub(r"^(\d+)$", r"\1,000", text),
    lambda text, draw: text.replace(" ", ""),
    lambda text, draw: f"-({text})",
    lambda text, draw: f"2({text})/2",
    lambda text, draw: re.sub(r"\d(?!.*\d)", lambda m: str((int(m.group()) + 1) % 10), text),
    lambda text, draw: f"{text} {draw.choice(['units', 'degrees', 'ways', 'dollars', 'ft'])}",
]


def math_replies(golds: list[str], each: int) -> list[list[str]]:
    """Return `each` replies for each MATH answer: the answer changed in one of 12 ways, stated in one of 9."""
    draw = random.Random(0)
    return [
        [draw.choice(_WAYS).format(draw.choice(_CHANGES)(gold, draw)) for _ in range(each)] for gold in golds
    ]


def code_replies(prompt: str, body: str, entry: str) -> list[str]:
    """Return replies to a HumanEval problem: a right body and what models make of it."""
    broken = re.sub(r"\d+", lambda m: str(int(m.group()) + 1), body, count=1)
    program = prompt + body
    return [
        body,
        "\n" + body,
        broken,
        body.replace("return", "returns", 1),
        body + "\nprint(1)\n",
        body + f"\n\ndef other(x):\n    return {entry}",
        body + "\n\nif __name__ == '__main__':\n    1 / 0\n",
        body + "\n```\nThat is all.",
        body + "\n# Example usage\nassert False\n",
        program,
        f"```python\n{program}\n```",
        f"Here it is:\n```python\n{program}\n```\nIt works.",
        f"```python\n{program}\nassert {entry} is not None\n```",
        body.replace("    ", "\t"),
        "    pass\n",
        "",
    ]
