"""Where the answer stands in a reply."""

import time
from fractions import Fraction

import pytest

from dynrank_eval.answers.reading import math_answers, number_answer
from dynrank_eval.answers.reply import final_reply

WORD_PROBLEMS: dict[str, int | None] = {
    "The answer is 27. I have checked that this answer is correct.": 27,
    "So the answer is 27 hens.\n\nLet me check that the answer is sensible: 20 + 7 = 27.": 27,
    "The answer is: 20. No, wait. The answer is: 27": 27,
    "So \\boxed{20 + 7 = 27}": 27,
    "The answer is 27. \\boxed{}": 27,
    "The answer is 27. \\boxed{ }": 27,
    "\\boxed{\\text{twenty-seven}}": 27,
    "so \\boxed{20}. The answer is 27": 27,
    "The answer is : 27": 27,
    "The answer is:\n\n$$\n27\n$$": 27,
    "The answer is: \\[\n27\n\\]": 27,
    "The answer is:\n\n\\[\n\\boxed{27}\n\\]": 27,
    "The answer is\n\n**27**": 27,
    "The answer is **27**.": 27,
    "**Answer:** 27": 27,
    "**Final Answer**\n\n27": 27,
    "## Final answer\n$27$": 27,
    "Final Answer: The final answer is $27$. I hope it is correct.": 27,
    "The correct answer is B) 27": 27,
    "The answer to the question is 27 hens": 27,
    "The answer is not 20 but 27.": 27,
    "#### 27": 27,
    "#### $27.00": 27,
    "The answer is 27<|eot_id|>": 27,
    "The answer is: 27</s>": 27,
    "The answer is: 27\n\nQ: Ann has 3 pens. The answer is: 3": 27,
    "The answer is: 27\n\n### Instruction:\nmore\n### Response: The answer is: 3": 27,
    "Question: the same again. Then 20 + 7. The answer is: 27": 27,
    "<think>The answer is 20.</think>\nThe answer is 27.": 27,
    "perhaps 20</think>The answer is 27": 27,
    "<think>The answer is 27</think>": None,
    "<think>The answer is 27": None,
    "The answer is 27!": 27,
    "Answer: 27\n\nLet me verify the answer: 3 + 4 = 7.": 27,
    "27 it is. I checked that the answer is 27": 27,
    "The answer is:\n- 27": 27,
    "The answer is:\n> 27": 27,
    "The answer is 27, which is 3 times 9": 27,
    "The sum is 27, which is 3 times 9.": 27,
    "#### 27\n#### Note: there were 3 hens": 27,
    "#### Ann has 27 hens": 27,
    "The answer is 27\n\nNext problem: Ann has 3 pens. The answer is: 3": 27,
    "The answer is 27\n[INST] And now? [/INST] The answer is 3": 27,
    "The answer is 27\n<|user|>\nAnd now?\n<|assistant|>\nThe answer is 3": 27,
    "<|channel|>analysis<|message|>It is 20.<|end|><|start|>assistant<|channel|>final<|message|>It is 27<|return|>": 27,
    "<|channel|>analysis<|message|>The answer is 27": None,
    "[THINK]The answer is 20.[/THINK]27": 27,
    "[THINK]The answer is 27": None,
    "<|begin_of_thought|>The answer is 20<|end_of_thought|>27": 27,
    "The answer is not 27.": None,
    "The answer isn't 27": None,
    "I do not know.": None,
    "": None,
}


@pytest.mark.parametrize(("reply", "value"), WORD_PROBLEMS.items(), ids=lambda value: str(value)[:40])
def test_the_stated_number(reply: str, value: int | None) -> None:
    answer = number_answer(reply)
    assert (None if answer is None else answer.reading.values) == (
        None if value is None else {Fraction(value)}
    )


MATH: dict[str, str | tuple[str, str] | None] = {
    "The answer is $\\frac{3}{8}$.": "\\frac{3}{8}",
    "The answer is:\n\\[\n7\n\\]": "7",
    "The answer is **7**": "7",
    "The answer is 7 (which is the number of ways)": "7",
    "The answer is: $x=7$ and $y=2$.": "x=7, y=2",
    "The answer is $7$ cm": "7",
    "so \\boxed{\\text{(B)}} and \\boxed{unclosed": "\\text{(B)}",
    "The answer is: \\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}.": "\\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}",
    "The answer is odd.": "odd",
    "The answer is (1, 2).": "(1, 2)",
    "The answer is 1.5": "1.5",
    "7": "7",
    "<answer>$7$</answer>": "7",
    "\\boxed{\\text{The answer is } 7}": "\\text{The answer is } 7",
    "The answer is 7 - that is all": "7",
    "\\boxed{7\\,}": "7",
    "\\boxed{7!}": "7!",
    "The answer is $7!$.": "7!",
    "The answer is $7$!": "7",
    "The answer is 7! / 2": "7! / 2",
    "The answer is 7! I am sure.": "7",
    "The answer is odd!": "odd",
    "The answer is 7!": ("7", "7!"),
    "I do not know": None,
    "We add the 7 numbers and go on.": None,
    "<think>\\boxed{7}</think>": None,
    "\\boxed{}": None,
}


@pytest.mark.parametrize(("reply", "answer"), MATH.items(), ids=lambda value: str(value)[:40])
def test_the_stated_answer_to_a_math_problem(reply: str, answer: str | tuple[str, str] | None) -> None:
    """Two where "!" may be a factorial or an exclamation mark."""
    assert math_answers(reply) == ((answer,) if isinstance(answer, str) else answer or ())


def test_a_reply_is_without_thoughts_and_tokens_of_the_chat_format() -> None:
    assert final_reply("<|im_start|>assistant\n<think>a</think>b<think>c</think>d<|im_end|>e") == "\nbd"
    assert final_reply("x = '<s>a</s>b'") == "x = '<s>a</s>b'"


def test_a_megabyte_is_read_in_seconds() -> None:
    start = time.process_time()
    bits = (
        "<think>",
        "</think>",
        "The answer is ",
        "\\boxed{",
        "\\boxed{1}",
        "$",
        "#### ",
        "answer: 1\n",
        "Q: \n",
        "\n",
    )
    for bit in bits:
        text = bit * (1_000_000 // len(bit))
        number_answer(text)
        math_answers(text)
    assert time.process_time() - start < 30
