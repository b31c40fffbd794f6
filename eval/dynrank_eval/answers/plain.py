# ruff: noqa: RUF001
"""One spelling for the many in which mathematics is written: Unicode, LaTeX, Markdown."""

import re
import unicodedata

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿ", "0123456789+-=()n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎", "0123456789+-=()")
_SUPERSCRIPT_RUN = re.compile("(?<=[0-9A-Za-z)}\\]])[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿ]+")
_SUBSCRIPT_RUN = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎]+")
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\u2015\u207b\ufe58\ufe63\uff0d\u2796", "-"),
        **dict.fromkeys("\u2795\uff0b\ufb29", "+"),
        **dict.fromkeys("×✕✖⨯", "\\times "),
        **dict.fromkeys("·⋅∙•", "\\cdot "),
        **dict.fromkeys("÷∕", "/"),
        **dict.fromkeys("’‘′ʼ", "'"),
        **dict.fromkeys(
            "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a", " "
        ),
        **dict.fromkeys("\u202f\u205f\u3000", " "),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad\u2061\u2062\u2063\u2064", ""),
        "⁄": "/",
        "√": "\\sqrt ",
        "∛": "\\sqrt[3] ",
        "∜": "\\sqrt[4] ",
        "π": "\\pi ",
        "∞": "\\infty ",
        "±": "\\pm ",
        "≤": "\\le ",
        "≥": "\\ge ",
        "≠": "\\ne ",
        "≈": "\\approx ",
        "∪": "\\cup ",
        "∩": "\\cap ",
        "∈": "\\in ",
        "∅": "\\emptyset ",
        "°": "^\\circ ",
        "º": "^\\circ ",
        "⟨": "\\langle ",
        "⟩": "\\rangle ",
    }
)
_SPACES = re.compile(
    r"(?<!\\)\\(?:[,;:> ]|(?:quad|qquad|thinspace|medspace|thickspace|enspace|nobreakspace)(?![A-Za-z]))|~"
)
_SIZES = re.compile(r"\\(?:left|right|bigl|bigr|Bigl|Bigr|biggl|biggr|big|Big|bigg|Bigg|middle)(?![A-Za-z])")
_IGNORED = re.compile(r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|hfill|boldmath)(?![A-Za-z])")
_FRACTIONS = re.compile(r"\\(?:d|t|c|x)?frac(?![A-Za-z])|\\(?:nice|s)frac(?![A-Za-z])")
_WORDS = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mbox|hbox|mathrm|mathbf|mathit|mathsf|bm|boldsymbol|emph|operatorname)"
    r"\*?(?![A-Za-z])\s*"
)
_POWER = re.compile(r"(?<=[0-9)])\s*\*\*\s*(?=[0-9(-])")
_EMPHASIS = re.compile(r"\*\*|__|`")


def plain(text: str) -> str:
    r"""Return `text` in ASCII where it has an equivalent, with one LaTeX command for each idea.

    Vulgar fractions become \frac, superscripts ^{...}, every dash "-", every space " ", every decimal digit 0 to 9;
    \text, \mathrm and their kin become \text; sizes and emphasis go.
    """
    text = _vulgar_fractions(text)
    text = _SUPERSCRIPT_RUN.sub(lambda run: "^{" + run.group().translate(_SUPERSCRIPTS) + "}", text)
    text = _SUBSCRIPT_RUN.sub(lambda run: "_{" + run.group().translate(_SUBSCRIPTS) + "}", text)
    text = "".join(map(_character, text.translate(_CHARACTERS)))
    text = text.replace("{,}", ",").replace("\\!", "").replace("\\$", "$").replace("\\%", "%")
    text = _SPACES.sub(" ", _POWER.sub("^", text))
    text = _IGNORED.sub("", _SIZES.sub("", text))
    text = _FRACTIONS.sub(r"\\frac", text)
    text = _WORDS.sub(r"\\text", text)
    return _EMPHASIS.sub("", text)


def _vulgar_fractions(text: str) -> str:
    written = []
    for character in text:
        parts = unicodedata.normalize("NFKD", character).split("⁄") if ord(character) > 127 else []
        if len(parts) == 2 and all(part.isdecimal() for part in parts):
            written.append(f"\\frac{{{parts[0]}}}{{{parts[1]}}}")
        else:
            written.append(character)
    return "".join(written)


def _character(character: str) -> str:
    if ord(character) < 128:
        return character
    digit = unicodedata.decimal(character, None)
    if digit is not None:
        return str(digit)
    return unicodedata.normalize("NFKC", character)
