r"""Evaluates a mathematical expression in plain or LaTeX notation, exactly where it is rational.

What is not rational (roots, \pi, functions, variables) is evaluated with mpmath to 60 digits: two expressions that
agree at several random points to 30 digits are equal for every practical purpose, and unlike a symbolic
comparison this takes milliseconds and drops nothing: what the grammar does not know is refused.
"""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from dynrank_eval.answers.arithmetic import (
    MP,
    UnreadableError,
    Value,
    binomial,
    combined,
    divided,
    factorial,
    logarithm,
    numeric,
    raised,
    real,
    root,
)

# A longer number is no benchmark's answer.
_MOST_DIGITS = 200
_DEEPEST = 60

_NUMBER = re.compile(
    r"[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}(?![0-9])(?:\.[0-9]+)?"
    r"|[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?"
    r"|[0-9]{1,3}(?: +[0-9]{3})+(?![0-9])(?! */ *[0-9])(?:\.[0-9]+)?"
    r"|[0-9]{1,3}(?:'[0-9]{3})+(?![0-9])(?:\.[0-9]+)?"
    r"|[0-9]{1,3}(?:_[0-9]{3})+(?![0-9])(?:\.[0-9]+)?"
    r"|[0-9]+\.[0-9]+|\.[0-9]+|[0-9]+"
)
_REPEATING = re.compile(
    r"(?P<whole>[0-9]{0,20})\.(?P<once>[0-9]{0,12}?)"
    r"(?:\\(?:overline|bar|dot)\s*(?:\{\s*(?P<marked>[0-9]{1,30})\s*\}|(?P<digit>[0-9]))"
    r"|(?P<written>[0-9]{1,12}?)(?P=written){2,}\s*(?:\.\.\.|\\[lc]?dots))"
)
_EXPONENT = re.compile(r"[eE][-+]?[0-9]+(?![A-Za-z0-9.])")
_MIXED = re.compile(r"\s+([0-9]+)\s*/\s*([0-9]+)(?![0-9])")
_MIXED_FRACTION = re.compile(r"\s*\\frac\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))")
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    **{
        name: getattr(MP, name)
        for name in ("sin", "cos", "tan", "sec", "csc", "cot", "sinh", "cosh", "tanh", "exp")
    },
    **{f"arc{name}": getattr(MP, f"a{name}") for name in ("sin", "cos", "tan")},
    "ln": MP.log,
    "log": lambda value: logarithm(value, Fraction(10)),
    "lg": lambda value: logarithm(value, Fraction(10)),
}
_CLOSING = {"(": ")", "{": "}", "[": "]"}


@dataclass
class Expression:
    """A recursive-descent evaluation of one text from a position on.

    Attributes:
        text: in the form that `plain` gives.
        variables: values of single letters; None where a letter ends the expression, as a unit does.
        position: of the next character; after `value`, of the first that does not belong to the expression.
    """

    text: str
    variables: Mapping[str, Value] | None = None
    position: int = 0
    depth: int = 0

    def value(self) -> Value:
        """Evaluate the longest expression at the position; UnreadableError where there is none."""
        total = self._term()
        while (sign := self._peek()) in ("+", "-") and self._operand_follows(self._after_space() + 1):
            self._skip(sign)
            term = self._term()
            total = combined(operator.add if sign == "+" else operator.sub, total, term)
        return total

    def at_end(self) -> bool:
        return self._after_space() == len(self.text)

    def _term(self) -> Value:
        product = self._signed()
        while True:
            if self._takes_operator("*", "\\cdot", "\\times", "\\ast") or self._takes_letter_times():
                product = combined(operator.mul, product, self._signed())
            elif self._peek() == "/" and self._operand_follows(self._after_space() + 1):
                self._skip("/")
                product = divided(product, self._signed())
            elif self._takes_operator("\\div"):
                product = divided(product, self._signed())
            elif self._implicit_factor_follows():
                product = combined(operator.mul, product, self._power())
            else:
                return product

    def _signed(self) -> Value:
        negative = False
        while (sign := self._peek()) in ("+", "-") and sign:
            self._skip(sign)
            negative ^= sign == "-"
        value = self._power()
        return -value if negative else value

    def _power(self) -> Value:
        base = self._atom()
        while self._takes("!"):
            base = factorial(base)
        if self._takes("^\\circ", "^{\\circ}"):
            return numeric(base) * MP.pi / 180
        if self._takes("^"):
            exponent = self._argument()
            return raised(base, exponent)
        return base

    def _atom(self) -> Value:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise UnreadableError
        value = self._deep_atom()
        self.depth -= 1
        return value

    def _deep_atom(self) -> Value:
        self.position = self._after_space()
        character = self._peek()
        if character.isdigit() or character == ".":
            return self._numeral()
        if character in ("(", "{", "["):
            self._skip(character)
            inner = self.value()
            if not self._takes(_CLOSING[character]):
                raise UnreadableError
            return inner
        if character == "|":
            self._skip("|")
            inner = self.value()
            if not self._takes("|"):
                raise UnreadableError
            return abs(inner)
        if character == "\\":
            return self._command()
        return self._letters()

    def _numeral(self) -> Value:
        if repeating := _REPEATING.match(self.text, self.position):
            self.position = repeating.end()
            return _repeating(repeating)
        match = _NUMBER.match(self.text, self.position)
        if match is None or len(match.group()) > _MOST_DIGITS:
            raise UnreadableError
        self.position = match.end()
        value = Fraction(re.sub("[^0-9.]", "", match.group()))
        exponent = _EXPONENT.match(self.text, self.position)
        if exponent and "." not in exponent.group():
            self.position = exponent.end()
            return raised(Fraction(10), Fraction(int(exponent.group()[1:]))) * value
        if "." not in match.group():
            return value + self._fraction_beside()
        return value

    def _fraction_beside(self) -> Fraction:
        """Return the proper fraction that makes a mixed number of the whole number before it, else 0."""
        match = _MIXED_FRACTION.match(self.text, self.position) or _MIXED.match(self.text, self.position)
        if match is None:
            return Fraction(0)
        above, below = (int(group) for group in match.groups() if group is not None)
        if not 0 < above < below:
            return Fraction(0)
        self.position = match.end()
        return Fraction(above, below)

    def _command(self) -> Value:
        for name in ("\\frac", "\\binom", "\\dbinom", "\\tbinom"):
            if self._takes(name):
                above, below = self._argument(one_digit=True), self._argument(one_digit=True)
                return divided(above, below) if name == "\\frac" else binomial(above, below)
        if self._takes("\\sqrt"):
            degree = Fraction(2)
            if self._takes("["):
                degree = self.value()
                if not self._takes("]"):
                    raise UnreadableError
            return root(self._argument(), degree)
        if self._takes("\\pi"):
            return +MP.pi
        if self._takes("\\infty"):
            return MP.inf
        if self._takes("\\lfloor"):
            return self._between("\\rfloor", lambda value: Fraction(int(MP.floor(real(value)))))
        if self._takes("\\lceil"):
            return self._between("\\rceil", lambda value: Fraction(int(MP.ceil(real(value)))))
        if self._takes("\\lvert", "\\mid"):
            return self._between("\\rvert", abs)
        command = re.compile(r"\\([A-Za-z]+)").match(self.text, self.position)
        if command is None:
            raise UnreadableError
        self.position = command.end()
        if command[1] in _FUNCTIONS:
            return self._function(command[1])
        if self.variables is not None and command.group() in self.variables:
            return self.variables[command.group()]
        raise UnreadableError

    def _between(self, end: str, function: Callable[[Any], Any]) -> Value:
        inner = self.value()
        if not self._takes(end):
            raise UnreadableError
        return function(inner)

    def _function(self, name: str) -> Value:
        base = self._argument() if name == "log" and self._takes("_") else None
        power = self._argument() if self._takes("^") else None
        argument = self._power() if self._peek() in ("(", "{") else self._term()
        if isinstance(argument, Fraction) and argument == 0 and name in ("sin", "tan", "sinh", "tanh"):
            value: Any = Fraction(0)
        else:
            value = (
                logarithm(argument, base)
                if base is not None
                else _FUNCTIONS[name](argument if name in ("log", "lg") else numeric(argument))
            )
        return value if power is None else raised(value, power)

    def _letters(self) -> Value:
        word = re.compile("[A-Za-z]+").match(self.text, self.position)
        if word is None:
            raise UnreadableError
        if word.group().lower() == "sqrt":
            self.position = word.end()
            return root(self._argument(), Fraction(2))
        if word.group().lower() == "pi":
            self.position = word.end()
            return +MP.pi
        if self.variables is None:
            raise UnreadableError
        if word.group() in _FUNCTIONS:
            self.position = word.end()
            return self._function(word.group())
        letter = word.group()[0]
        if letter not in self.variables:
            raise UnreadableError
        self.position += 1
        if self.text.startswith("_", self.position):
            raise UnreadableError
        return self.variables[letter]

    def _argument(self, one_digit: bool = False) -> Value:
        r"""Evaluate what a command or ^ applies to: a group, a letter, a command, or digits.

        LaTeX takes one digit; but "\\sqrt 12", "√12" and "2^10" mean the whole number, as people write them.
        """
        self.position = self._after_space()
        character = self._peek()
        if character in ("{", "("):
            return self._atom()
        if character == "-":
            self._skip("-")
            return -self._atom()
        if character.isdigit():
            if not one_digit and self.text[self.position - 1] in " ^)":
                match = re.compile("[0-9]+").match(self.text, self.position)
                assert match is not None
                self.position = match.end()
                return Fraction(match.group())
            self.position += 1
            return Fraction(character)
        return self._atom()

    def _implicit_factor_follows(self) -> bool:
        place = self._after_space()
        rest = self.text[place : place + 12]
        if rest[:1] in ("(", "{") and self.variables is None:
            # In prose a parenthesis after a space is a remark, and one that begins with a word is a unit.
            return place == self.position and re.match(r"[({]\s*(?:[-+0-9.({]|\\(?!text))", rest) is not None
        if rest[:1] in ("(", "{") or rest.startswith(("\\frac", "\\sqrt", "\\pi", "\\binom")):
            return not rest.startswith(("{\\text", "(\\text"))
        if self.variables is None or not rest:
            return False
        command = re.match(r"\\[A-Za-z]+", self.text[place : place + 20])
        if command:
            return command.group() in self.variables or command.group()[1:] in _FUNCTIONS
        return rest[0].isalpha()

    def _operand_follows(self, place: int) -> bool:
        while place < len(self.text) and self.text[place] in " \n\t+-$":
            place += 1
        rest = self.text[place : place + 8]
        if self.variables is not None:
            return bool(rest)
        return bool(re.match(r"[0-9.({]|\\frac|\\sqrt|\\pi|sqrt", rest)) and not re.match(
            r"\.(?![0-9])", rest
        )

    def _takes_letter_times(self) -> bool:
        """Take "x" for a times sign where it stands between numbers: 3 x 10^4."""
        if self.variables is not None:
            return False
        match = re.compile(r"\s*[xX]\s*(?=[0-9])").match(self.text, self.position)
        if match is None:
            return False
        self.position = match.end()
        return True

    def _takes(self, *words: str) -> bool:
        place = self._after_space()
        for word in words:
            if self.text.startswith(word, place):
                end = place + len(word)
                if word[-1].isalpha() and self.text[end : end + 1].isalpha():
                    continue
                self.position = end
                return True
        return False

    def _takes_operator(self, *words: str) -> bool:
        r"""Take an operator where an operand follows it: "3 \times as many" is 3."""
        before = self.position
        if not self._takes(*words):
            return False
        if self.variables is None and not self._operand_follows(self._after_space()):
            self.position = before
            return False
        return True

    def _skip(self, character: str) -> None:
        self.position = self._after_space() + len(character)

    def _peek(self) -> str:
        place = self._after_space()
        return self.text[place : place + 1]

    def _after_space(self) -> int:
        place = self.position
        while place < len(self.text) and self.text[place] in " \t\n$":
            place += 1
        return place


def _repeating(decimal: "re.Match[str]") -> Fraction:
    r"""Return the value of 0.1\overline{6} or 0.1666..."""
    once, period = decimal["once"], decimal["marked"] or decimal["digit"] or decimal["written"]
    start = Fraction(f"{decimal['whole'] or 0}.{once or 0}")
    return start + Fraction(int(period), 10 ** len(once) * (10 ** len(period) - 1))
