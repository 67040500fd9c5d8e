"""Reward for a response whose last match of a pattern is the answer."""

from __future__ import annotations

import re

from opd.errors import ConfigError
from opd.rewards.exact import required_answer
from opd.types import Prompt, Reward


def regex_answer(pattern: str) -> Reward:
    """A reward of 1 when the pattern's last match in the response is the answer, apart from white space around it.

    With a group in the pattern, the group is compared: `####\\s*(.+)`. Dots match line ends only after `(?s)`. In a response
    cut off at the length limit, a match that reaches the cut may be half of one; it counts only if it is the whole response.
    """
    if not pattern:
        raise ConfigError("reward 'regex:' has no pattern; write regex:<pattern>, such as regex:####\\s*(.+).")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"reward 'regex:{pattern}' is not a regular expression: {error}.") from error
    if compiled.groups > 1:
        raise ConfigError(
            f"reward 'regex:{pattern}' has {compiled.groups} groups, so which one is the answer cannot be told; "
            "keep one, and write the others as (?:…)."
        )

    def reward(prompt: Prompt, response: str, finished: bool = True) -> float:
        answer = required_answer(prompt, f"regex:{pattern}")
        matches = [
            match
            for match in compiled.finditer(response)
            if finished or match.end(compiled.groups) < len(response) or match.group(compiled.groups) == response
        ]
        if not matches:
            return 0.0
        found = matches[-1].group(compiled.groups) or ""
        return float(found.strip() == answer.strip())

    return reward
