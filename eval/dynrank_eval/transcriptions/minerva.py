"""Minerva's MATH answers (Lewkowycz et al. 2022, App. D) as in lm-evaluation-harness 0.4.13, minerva_math 3.1."""

import re

_FINAL = re.compile(r"Final Answer: The final answer is(.*?). I hope it is correct.")
_SUBSTITUTIONS = [
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    ("\\$", ""),
    ("\\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (",\\text{and}", ","),
    ("\\text{and}", ","),
    ("\\text{m}", "\\text{}"),
]
_REMOVED = [
    "square",
    "ways",
    "integers",
    "dollars",
    "mph",
    "inches",
    "ft",
    "hours",
    "km",
    "units",
    "\\ldots",
    "sue",
    "points",
    "feet",
    "minutes",
    "digits",
    "cents",
    "degrees",
    "cm",
    "gm",
    "pounds",
    "meters",
    "meals",
    "edges",
    "students",
    "childrentickets",
    "multiples",
    "\\text{s}",
    "\\text{.}",
    "\\text{\ns}",
    "\\text{}^2",
    "\\text{}^3",
    "\\text{\n}",
    "\\text{}",
    "\\mathrm{th}",
    "^\\circ",
    "^{\\circ}",
    "\\;",
    ",\\!",
    "{,}",
    '"',
    "\\dots",
]


def extract_answer(completion: str) -> str | None:
    """Return what the first "Final Answer: The final answer is ..." says; None where there is none."""
    match = _FINAL.search(completion + "I hope it is correct.")
    return match[1].strip() if match else None


def gold(solution: str) -> str | None:
    """Return what the solution's last box holds, as lm-eval finds it; None where it has no closed box."""
    if "\\boxed " in solution:
        return solution.split("\\boxed ")[-1].split("$")[0]
    start = solution.rfind("\\boxed")
    if start < 0 or not solution.startswith("\\boxed{", start):
        return None
    depth = 0
    for place in range(start, len(solution)):
        depth += (solution[place] == "{") - (solution[place] == "}")
        if depth == 0 and solution[place] == "}":
            return solution[start + len("\\boxed{") : place]
    return None


def normalize(answer: str) -> str:
    """Return an answer without units and formatting, with braces around every argument."""
    answer = answer.split("=")[-1]
    words = [expression for expression in _REMOVED if expression.isalpha()]
    for word in words:
        answer = re.sub(rf"(?<!\\)\b{word}\b", "", answer)
    for before, after in _SUBSTITUTIONS:
        answer = answer.replace(before, after)
    for expression in _REMOVED:
        if expression in words:
            # Not inside of LaTeX's commands: "ft" stays in \\left.
            parts = re.split(r"(\\[a-zA-Z]+)", answer)
            parts[::2] = [part.replace(expression, "") for part in parts[::2]]
            answer = "".join(parts)
        else:
            answer = answer.replace(expression, "")
    answer = re.sub(r"(.*?)(\$)(.*?)(\$)(.*)", "$\\3$", answer)
    for command in ("text", "textbf", "overline"):
        answer = re.sub(rf"(\\{command}\{{)(.*?)(\}})", "\\2", answer)
    answer = re.sub(r"(\\boxed\{)(.*)(\})", "\\2", answer)
    answer = re.sub(r"(frac)([^{])(.)", "frac{\\2}{\\3}", answer)
    answer = re.sub(r"(sqrt)(\[[^\]]*\])(\w)", "\\1\\2{\\3}", answer)
    answer = re.sub(r"(sqrt)(?!\[)([^{])", "sqrt{\\2}", answer).replace("$", "")
    return answer.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+", answer) else answer
