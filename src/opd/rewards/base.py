"""Rewards by name, and calls of a reward whose errors name the prompt."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import Any, Literal

from opd.errors import ConfigError, DataError, OpdError
from opd.rewards.exact import exact_match
from opd.rewards.limit import TimeLimitError, call_within
from opd.rewards.math_verify import check_installed, math_verify
from opd.rewards.numeric import numeric_answer
from opd.rewards.reasoning_gym import reasoning_gym
from opd.rewards.regex import regex_answer
from opd.types import Prompt, Reward

REGEX_PREFIX = "regex:"
BUILT_IN: dict[str, Reward] = {
    "exact_match": exact_match,
    "numeric_answer": numeric_answer,
    "math_verify": math_verify,
    "reasoning_gym": reasoning_gym,
}


def load_reward(spec: str | Reward) -> Reward:
    """The reward called `exact_match`, `numeric_answer`, `math_verify`, `reasoning_gym`, `regex:<pattern>` or
    `package.module:function`; or a function, as it is.

    Raises ConfigError, also for a function that cannot be called as a reward, and MissingDependencyError for math_verify without its
    package.
    """
    if not isinstance(spec, str):
        _check_signature(getattr(spec, "__name__", type(spec).__name__), spec)
        return spec
    if spec == "math_verify":
        check_installed()
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    if spec.startswith(REGEX_PREFIX):
        return regex_answer(spec.removeprefix(REGEX_PREFIX))
    module_name, colon, function_name = spec.partition(":")
    if not colon or not module_name or not function_name:
        near = get_close_matches(spec, [*BUILT_IN, REGEX_PREFIX], n=1)
        raise ConfigError(
            f"there is no reward {spec!r}.{f' Did you mean {near[0]!r}?' if near else ''} "
            f"Use one of {', '.join(BUILT_IN)}, regex:<pattern>, or package.module:function for your own."
        )
    reward = _import(spec, module_name, function_name)
    _check_signature(spec, reward)
    return reward


def score_reward(
    reward: Reward, prompt: Prompt, response: str, *, finished: bool = True, timeout: float = 0.0
) -> float:
    """The reward as a finite float. Raises DataError, which names the prompt, for a reward that fails, hangs or is not finite.

    `finished` is False for a response cut off at the length limit, and goes to a reward with a parameter of that name.
    `timeout` is in seconds; 0 sets no limit.
    """
    name = getattr(reward, "__name__", type(reward).__name__)
    function = partial(reward, finished=finished) if _takes_finished(reward) else reward
    try:
        value: Any = call_within(timeout, function, prompt, response)
    except OpdError:
        raise
    except TimeLimitError as error:
        raise DataError(
            f"reward {name!r} gave {error} for prompt {prompt.index}. The response was {_excerpt(response)!r}. Fix the function, "
            "raise reward.timeout, or set reward.on_error=zero to count such a response as 0; a run resumes where it stopped."
        ) from error
    except (Exception, SystemExit) as error:  # somebody else's function
        raise DataError(
            f"reward {name!r} failed on prompt {prompt.index}: {type(error).__name__}: {error}. "
            f"The response was {_excerpt(response)!r}. Fix the function; a run resumes where it stopped."
        ) from error
    number = _float(value)
    if not math.isfinite(number):
        raise DataError(
            f"reward {name!r} returned {value!r} for prompt {prompt.index}, which is not a finite number. "
            f"The response was {_excerpt(response)!r}. Fix the function; a run resumes where it stopped."
        )
    return number


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A reward, its time limit, and the handling of its errors."""

    reward: Reward
    timeout: float = 0.0
    """Seconds that one call may take; 0 sets no limit."""
    on_error: Literal["stop", "zero"] = "stop"
    """A call that raises, hangs or returns no finite number ends the run, or counts as 0."""

    def score(self, answered: Sequence[tuple[Prompt, str]], finished: Sequence[bool] | None = None) -> Scores:
        """One reward per (prompt, response). `finished` is False for truncated responses; None means that none is.

        Raises DataError where `on_error` is stop.
        """
        values, failures = [], []
        ended = [True] * len(answered) if finished is None else finished
        for (prompt, response), whole in zip(answered, ended, strict=True):
            try:
                values.append(score_reward(self.reward, prompt, response, finished=whole, timeout=self.timeout))
            except DataError as error:
                if self.on_error == "stop":
                    raise
                values.append(0.0)
                failures.append(str(error))
        return Scores(values=tuple(values), failures=tuple(failures))


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Rewards in the order of the responses, and the errors of those that count as 0."""

    values: tuple[float, ...]
    failures: tuple[str, ...] = ()


def _import(spec: str, module_name: str, function_name: str) -> Any:
    try:
        module = import_module(module_name)
    except Exception as error:  # importing runs somebody else's module
        raise ConfigError(
            f"reward {spec!r}: importing {module_name!r} failed ({type(error).__name__}: {error}). Check the name; a "
            "module beside the recipe is found with PYTHONPATH=. in front of the command."
        ) from error
    if not hasattr(module, function_name):
        near = get_close_matches(function_name, dir(module), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "check the name."
        raise ConfigError(f"reward {spec!r}: module {module_name!r} has no {function_name!r}; {hint}")
    return getattr(module, function_name)


def _check_signature(spec: str, reward: Any) -> None:
    if not callable(reward):
        raise ConfigError(
            f"reward {spec!r} has the type {type(reward).__name__} and is not a function of (prompt, response)."
        )
    if inspect.iscoroutinefunction(reward):
        raise ConfigError(f"reward {spec!r} is async; rewards are called as plain functions, so drop the async.")
    try:
        signature = inspect.signature(reward)
    except ValueError:  # some built-in functions do not tell
        return
    try:
        signature.bind("prompt", "response")
    except TypeError as error:
        raise ConfigError(
            f"reward {spec!r} takes {signature}, but a reward is called as reward(prompt, response): {error}. "
            "Give every further parameter a default."
        ) from error


def _takes_finished(reward: Reward) -> bool:
    try:
        return "finished" in inspect.signature(reward).parameters
    except (TypeError, ValueError):  # some built-in functions do not tell
        return False


def _float(value: Any) -> float:
    """The value as a float; NaN for other types, and for text, which float() would parse."""
    if isinstance(value, (str, bytes)):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a torch tensor of several values
        return math.nan


def _excerpt(text: str) -> str:
    return text if len(text) <= 80 else text[:80] + "…"
