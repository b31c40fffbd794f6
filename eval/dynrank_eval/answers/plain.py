# ruff: noqa: RUF001
"""One spelling for the many in which mathematics is written: Unicode, LaTeX, Markdown."""

import html
import re
import unicodedata

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿ", "0123456789+-=()n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎", "0123456789+-=()")
_SUPERSCRIPT_RUN = re.compile("(?<=[0-9A-Za-z)}\\]])[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿ]+")
_SUBSCRIPT_RUN = re.compile("(?<=[0-9A-Za-z)}\\]])[₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎]+")
_RAISED_FRACTION = re.compile("([⁰¹²³⁴⁵⁶⁷⁸⁹]+)[⁄/]([₀₁₂₃₄₅₆₇₈₉]+)")
_ENTITY = re.compile("&(?:[A-Za-z]+[0-9]*|#[0-9]+|#x[0-9A-Fa-f]+);")
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys(
            "\u2212\u2010\u2011\u2012\u2013\u2014\u2015\u207b\u208b\ufe58\ufe63\uff0d\u2796", "-"
        ),
        **dict.fromkeys("\u02d7\u2043\u1806\u30fc\uff70", "-"),
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
    r"(?<!\\)\\(?:[,;:> ]|(?:quad|qquad|thinspace|medspace|thickspace|enspace|nobreakspace)(?![A-Za-z])"
    r"|hspace\*?\s*\{[^{}]*\}|m?kern\s*-?[0-9.]+\s*(?:mu|pt|em|ex))|~"
)
_COMMA = re.compile(r"\\math(?:ord|punct)\s*\{,\}|\{,\}")
# What is left of 12{\,}000 and 12\,{000}.
_EMPTY_BRACES = re.compile(r"(?<=[0-9])\{ *\}(?=[0-9])")
_GROUP_IN_BRACES = re.compile(r"(?<=[0-9])([ ,]) *\{([0-9]{3})\}(?![0-9])")
# TeX's own infix commands: {a \over b}.
_INFIX = re.compile(
    r"\{(?P<above>[^{}]*)\\(?P<name>over|choose)(?![A-Za-z])(?P<below>[^{}]*)\}"
    r"|^(?P<above_>[^{}\\=]*)\\(?P<name_>over|choose)(?![A-Za-z])(?P<below_>[^{}\\]*)$"
)
_INFIX_COMMANDS = {"over": "\\frac", "choose": "\\binom"}
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
    text = _ENTITY.sub(lambda entity: html.unescape(entity.group()), text)
    text = _RAISED_FRACTION.sub(_fraction_of_small_digits, _vulgar_fractions(text))
    text = _SUPERSCRIPT_RUN.sub(lambda run: "^{" + run.group().translate(_SUPERSCRIPTS) + "}", text)
    text = _SUBSCRIPT_RUN.sub(lambda run: "_{" + run.group().translate(_SUBSCRIPTS) + "}", text)
    text = "".join(map(_character, text.translate(_CHARACTERS)))
    text = (
        _COMMA.sub(",", text).replace("\\!", "").replace("\\$", "$").replace("\\%", "%").replace("\\_", "_")
    )
    text = _SPACES.sub(" ", _POWER.sub("^", text))
    text = _GROUP_IN_BRACES.sub(r"\1\2", _EMPTY_BRACES.sub(" ", text))
    text = _INFIX.sub(_command_first, text)
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


def _fraction_of_small_digits(match: "re.Match[str]") -> str:
    return f"\\frac{{{match[1].translate(_SUPERSCRIPTS)}}}{{{match[2].translate(_SUBSCRIPTS)}}}"


def _command_first(match: "re.Match[str]") -> str:
    form = "" if match["name"] else "_"
    command = _INFIX_COMMANDS[match[f"name{form}"]]
    return f"{command}{{{match[f'above{form}'].strip()}}}{{{match[f'below{form}'].strip()}}}"
