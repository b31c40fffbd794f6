"""PiSSA's cut of code against a transcription of its code_process.py: there is no package."""

from dynrank_eval.tasks import get_task
from dynrank_eval.transcriptions import pissa
from tests.eval.transcriptions.replies import code_replies


def plain_pissa(output: str) -> str:
    """The loop's body, with str.find in place of str.index."""
    completion = output.replace("\r", "")
    start = completion.find("```python")
    if start >= 0:
        completion = completion[start:].strip().replace("```python", "")
        end = completion.find("\n```")
        completion = completion if end < 0 else completion[:end].strip()
    for sign in ('if __name__ == "__main__":', "# Example usage", "assert"):
        end = completion.find(sign)
        completion = completion if end < 0 else completion[:end].strip()
    return completion


def test_pissas_programs() -> None:
    differ, count = [], 0
    for problem in get_task("humaneval").load(None):
        prompt = problem.forms["raw"]
        body = problem.reference["solution"].removeprefix(prompt)
        for reply in code_replies(prompt, body, problem.reference["names"]):
            double = reply + '\nif __name__ == "__main__":\n    assert True\n'
            for text in (reply, double, reply.replace("\n", "\r\n"), f"{reply}\n```python\nx = 1\n```"):
                count += 1
                if pissa.code(text) != plain_pissa(text):
                    differ.append(text)
    assert differ == [] and count > 10_000
