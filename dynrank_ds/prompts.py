"""The prompts that models are trained and evaluated with: one definition for both.

Each template is a contract with published numbers: change none, add a new name instead.
"""

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
}


def render(name: str, instruction: str) -> str:
    """The prompt called `name` around `instruction`, which may itself contain braces."""
    return PROMPTS[name].replace("{instruction}", instruction)
