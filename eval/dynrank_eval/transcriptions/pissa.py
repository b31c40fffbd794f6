"""PiSSA's code_process.py (github.com/GraphPKU/PiSSA, revision 0c1b5c3): the program in a reply."""

_ENDS = (('__name__ == "__main__"', 'if __name__ == "__main__":'), ("# Example usage",) * 2, ("assert",) * 2)


def code(completion: str) -> str:
    r"""Return the first ```python block, else the whole reply, up to what only tries the function out.

    It is cut at the word assert wherever it stands, in a docstring too.
    """
    text = completion.replace("\r", "")
    if "```python" in text:
        text = text[text.index("```python") :].strip().replace("```python", "")
        if "\n```" in text:
            text = text[: text.index("\n```")].strip()
    for sign, end in _ENDS:
        if sign in text:
            # Where __main__ is compared in another form, the script ends with an exception; here nothing is cut.
            text = text[: text.index(end)].strip() if end in text else text
    return text
