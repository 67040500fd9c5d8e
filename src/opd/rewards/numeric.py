"""The last number of the response is the number of the answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from opd.errors import DataError
from opd.rewards.exact import required_answer
from opd.types import Prompt

MAX_DIGITS = 400
"""A longer number is no answer; Python itself refuses to read beyond 4300 digits."""
MAX_EXPONENT_LENGTH = 4
"""Sign included: 1e9999 is exact and quick, 1e999999999 would fill the memory."""

_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_NUMBER = re.compile(
    # after a digit, a letter or a closing bracket a minus is a subtraction or a hyphen
    rf"(?:(?<![\w)\]}}])(?P<sign>[-+]))?[$€£]?(?<![A-Za-z_0-9])(?P<numerator>{_UNSIGNED})"
    rf"(?:\s?/\s?(?P<denominator>{_UNSIGNED}))?\s?(?P<percent>%)?"
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")


@dataclass(frozen=True)
class Number:
    """An exact value; 50% has value 50 and percent set."""

    value: Fraction
    percent: bool = False


def numeric_answer(prompt: Prompt, response: str) -> float:
    """1 when the last number of the response equals the last number of the answer, exactly; else 0.

    Reads signs, thousands commas, decimals, exponents, fractions (3/4 and LaTeX), currency and percent signs. A number
    in percent equals itself with or without the sign, and its hundredth: 50% = 50 and 50% = 0.5, but 50 ≠ 0.5.
    """
    answer = last_number(required_answer(prompt, "numeric_answer"))
    if answer is None:
        raise DataError(
            f"the answer of prompt {prompt.index} is {prompt.answer!r}, which holds no number for reward "
            "'numeric_answer'; mend the row, or use exact_match."
        )
    found = last_number(response)
    return float(found is not None and same_number(found, answer))


def last_number(text: str) -> Number | None:
    """The last number in a text; None when there is none, or when it divides by zero or is too long to be one."""
    plain = text.replace("\N{MINUS SIGN}", "-").replace("{,}", ",").replace("\\%", "%").replace("\\$", "$")
    matches = list(_NUMBER.finditer(_LATEX_FRACTION.sub(r"\1/\2", plain)))
    if not matches:
        return None
    sign, numerator, denominator, percent = matches[-1].group("sign", "numerator", "denominator", "percent")
    above, below = _value(numerator), _value(denominator or "1")
    if above is None or not below:
        return None
    return Number(-above / below if sign == "-" else above / below, percent is not None)


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
