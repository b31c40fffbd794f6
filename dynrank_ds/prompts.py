"""The prompts that models are trained and evaluated with: one definition for both.

Each template is a contract with published numbers: change none, add a new name instead.
"""

import re

_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)

PROMPTS: dict[str, str] = {
    # MetaMath, eval_gsm8k.py and train_math.py.
    "metamath": _ALPACA + " Let's think step by step.",
    # Stanford Alpaca without input; PiSSA trains and evaluates with it.
    "alpaca": _ALPACA,
    # Stanford Alpaca with input.
    "alpaca_input": (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    ),
}


def render(name: str, instruction: str, input: str = "") -> str:
    """Return the prompt called `name` around its texts, which may themselves contain braces."""
    texts = {"{instruction}": instruction, "{input}": input}
    return re.sub(r"\{instruction\}|\{input\}", lambda place: texts[place.group()], PROMPTS[name])
