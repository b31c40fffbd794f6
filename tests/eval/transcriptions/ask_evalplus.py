"""Run by the interpreter that has EvalPlus: its prompts, what its sanitizer keeps, and its verdicts.

usage: ask_evalplus.py QUESTION.json ANSWER.json
"""

import json
import sys
from types import SimpleNamespace

from evalplus.codegen import run_codegen
from evalplus.evaluate import check_correctness
from evalplus.gen.util import trusted_exec
from evalplus.provider.utility import EOS, extra_eos_for_direct_completion, make_raw_chat_prompt
from evalplus.sanitize import sanitize


def chat(messages, tokenize):
    return "".join(f"<{message['role']}>{message['content']}</{message['role']}>" for message in messages)


def prompts(problems):
    """The base prompt, and the chat prompt with the sentences that stand in run_codegen."""
    sentences = [
        text for text in run_codegen.__code__.co_consts if isinstance(text, str) and text.endswith(":")
    ]
    instruction = next(text for text in sentences if text.startswith("Please provide a self-contained"))
    reply = next(
        text for text in sentences if text.startswith("Below is a Python script with a self-contained f")
    )
    tokenizer = SimpleNamespace(chat_template="some", apply_chat_template=chat)
    for problem in problems:
        base = problem["prompt"].strip() + "\n"
        yield base, make_raw_chat_prompt(base, instruction, reply, tokenizer)


def verdict(problem, solution):
    code = problem["prompt"] + problem["canonical_solution"]
    expected = {}
    for part in ("base", "plus"):
        results, seconds = trusted_exec(
            code, problem[f"{part}_input"], problem["entry_point"], record_time=True
        )
        expected |= {part: results, f"{part}_time": seconds}
    found = check_correctness("humaneval", 0, problem, solution, expected, fast_check=True)
    return [found["base"][0], found["plus"][0]]


def main(question):
    answer = {
        "prompts": list(prompts(question["problems"])),
        "stops": {"chat": [*EOS, "\n```\n"]},
        "sanitized": [sanitize(code, name) for code, name in question["sanitize"]],
        "verdicts": [],
    }
    for dataset in ("humaneval", "mbpp"):
        answer["stops"][dataset] = [*EOS, *extra_eos_for_direct_completion(dataset)]
    for problem, solutions in zip(question["problems"], question["solutions"], strict=True):
        kept = [sanitize(solution, problem["entry_point"]) for solution in solutions]
        answer["verdicts"].append([verdict(problem, solution) for solution in kept])
    return answer


if __name__ == "__main__":
    with open(sys.argv[1]) as asked:
        answer = main(json.load(asked))
    with open(sys.argv[2], "w") as answered:
        json.dump(answer, answered)
