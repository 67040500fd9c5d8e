"""Reward for a response whose final number equals the number of the answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from opd.errors import DataError
from opd.rewards.boxes import last_box
from opd.rewards.exact import required_answer
from opd.types import Prompt

MAX_DIGITS = 400
"""Limit of a number's length; Python itself refuses to read beyond 4300 digits."""
MAX_EXPONENT_LENGTH = 4
"""Sign included: 1e9999 is exact and quick, 1e999999999 would fill the memory."""

_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_NUMBER = re.compile(
    # after a digit, a letter or a closing bracket a minus is a subtraction or a hyphen
    rf"(?:(?<![\w)\]}}])(?P<sign>[-+]))?[$€£]?(?<![A-Za-z_0-9])(?P<numerator>{_UNSIGNED})"
    rf"(?:\s?/\s?(?P<denominator>{_UNSIGNED}))?\s?(?P<percent>%)?"
)
_LATEX_FRACTION = re.compile(r"(?P<whole>[0-9]+\s*)?\\[dt]?frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))")
_UNIT = re.compile(
    r"\^\s*\{?\s*\\circ\s*\}?|\\(?:text|textrm|mathrm|mbox|textbf)\s*\{(?P<words>[^{}]*)\}(?:\s*\^\s*(?:\{[^{}]*\}|[0-9]))?"
)
_NO_NUMBER = re.compile(r"\\sqrt|\\pi|\^")
"""Operators in a box, whose value is then not the last number."""
_GSM8K = re.compile(r"^####[ \t]*(?P<found>[^\n]*?)[ \t]*\n", re.MULTILINE)
_ANSWER = re.compile(
    rf"\banswer\b[\s*_]*(?:is\b|[:=])[\s:=*_$(\\]*(?P<found>[-+]?[$€£]?{_UNSIGNED}(?:\s?/\s?{_UNSIGNED})?\s?%?)(?=[.,;:!?)*_$\\]*\s)",
    re.IGNORECASE,
)
"""An answer in words, and the mark that ends its number."""


@dataclass(frozen=True)
class Number:
    """An exact value; 50% has value 50 and percent set."""

    value: Fraction
    percent: bool = False


def numeric_answer(prompt: Prompt, response: str, finished: bool = True) -> float:
    """1 when the number of the response equals the number of the answer, exactly; else 0.

    The number is the one in the last \\boxed{}, or else the last. A response cut off at the length limit (`finished` is False)
    needs a mark before the cut: a \\boxed{}, a line of its own after ####, "answer is" or "answer:", or the number alone.

    Reads signs, thousands commas, decimals, exponents, fractions (3/4 and LaTeX), currency and percent signs. A number
    in percent equals itself with or without the sign, and its hundredth: 50% = 50 and 50% = 0.5, but 50 ≠ 0.5.
    """
    answer = given_number(required_answer(prompt, "numeric_answer"))
    if answer is None:
        raise DataError(
            f"the answer of prompt {prompt.index} is {prompt.answer!r}, which holds no number for reward "
            "'numeric_answer'; fix the row, or use exact_match."
        )
    found = given_number(response) if finished else marked_number(response)
    return float(found is not None and same_number(found, answer))


def given_number(text: str) -> Number | None:
    """The number in the last box, or the last number of a text without a box; None without any."""
    box = last_box(text)
    return last_number(text) if box is None else _number_in_box(box)


def marked_number(text: str) -> Number | None:
    """The number that a text marks as its answer before its end; None without a mark."""
    box = last_box(text)
    if box is not None:
        return _number_in_box(box)
    if _NUMBER.fullmatch(text.strip()):
        return last_number(text)
    lines = [match for match in _GSM8K.finditer(text) if _NUMBER.fullmatch(match["found"])]
    marks = sorted([*lines, *_ANSWER.finditer(text)], key=lambda match: match.start())
    return last_number(marks[-1]["found"]) if marks else None


def _number_in_box(held: str) -> Number | None:
    value = held.rpartition("=")[2]
    bare = _UNIT.sub(" ", value)
    if not re.search(r"[0-9]", bare):
        bare = _UNIT.sub(lambda unit: f" {unit['words'] or ''} ", value)
    return None if _NO_NUMBER.search(bare) else last_number(bare)


def last_number(text: str) -> Number | None:
    """The last number in a text; None without any, or for one that divides by zero or is too long."""
    plain = text.replace("\N{MINUS SIGN}", "-").replace("{,}", ",").replace("\\%", "%").replace("\\$", "$")
    matches = list(_NUMBER.finditer(_LATEX_FRACTION.sub(_fraction, plain)))
    if not matches:
        return None
    sign, numerator, denominator, percent = matches[-1].group("sign", "numerator", "denominator", "percent")
    above, below = _value(numerator), _value(denominator or "1")
    if above is None or not below:
        return None
    return Number(-above / below if sign == "-" else above / below, percent is not None)


def _fraction(match: re.Match[str]) -> str:
    whole, braced, digit, below_braced, below_digit = match.groups()
    above, below = braced if digit is None else digit, below_braced if below_digit is None else below_digit
    if whole is None:
        return f"{above}/{below}"
    if above.isdecimal() and below.isdecimal() and len(whole + above + below) <= MAX_DIGITS:
        return f"{int(whole) * int(below) + int(above)}/{below}"
    return f"{whole} {above}/{below}"


def same_number(first: Number, second: Number) -> bool:
    if first.percent == second.percent or first.value == second.value:
        return first.value == second.value
    in_percent, plain = (first, second) if first.percent else (second, first)
    return in_percent.value == 100 * plain.value


def _value(number: str) -> Fraction | None:
    digits, _, exponent = number.lower().partition("e")
    if len(digits) > MAX_DIGITS or len(exponent) > MAX_EXPONENT_LENGTH:
        return None
    return Fraction(number.replace(",", ""))
