"""Arguments of a Distiller → a Config, and the objects that take the place of what it names.

An argument is a name, a section, a dict that would make one, or an object; for an object the config holds a description, which is
what config.yaml says of it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.config import Config, EvalConfig, PromptsConfig, RewardConfig, StudentConfig, TeacherConfig
from opd.errors import ConfigError
from opd.rewards import load_reward
from opd.rewards.base import BUILT_IN
from opd.samplers.base import Sampler
from opd.teachers.base import Teacher
from opd.tokenizer import load_tokenizer
from opd.trainer.from_config import Given
from opd.trainer.load_models import GivenModel

ModelSection = TypeVar("ModelSection", StudentConfig, TeacherConfig)

ONE_WORD = {"objective": "divergence", "optimizer": "name", "mixture": "kind"}
"""Sections that a text alone may stand for, and the key that it sets."""
DTYPES = ("float32", "bfloat16", "float16")


def config_and_given(
    *,
    student: Any,
    teacher: Any = None,
    teachers: Mapping[str, Any] | None = None,
    prompts: Any,
    eval_prompts: Any = None,
    reward: Any = None,
    sampler: Sampler | None = None,
    **sections: Any,
) -> tuple[Config, Given]:
    """The config that the arguments make, and the objects among them. Raises ConfigError for what is neither a name nor usable."""
    learner, given_student = _model(student, StudentConfig, "student")
    if teacher is not None and teachers:
        raise ConfigError("teacher is one teacher and teachers are several; give one of the two.")
    named = {name: (one, f"teachers.{name}") for name, one in (teachers or {}).items()}
    if teacher is not None:
        named = {"teacher": (teacher, "teacher")}
    taught = {name: _model(one, TeacherConfig, role) for name, (one, role) in named.items()}
    given_teachers = {name: given for name, (_, given) in taught.items() if given is not None}
    _refuse_student_as_teacher(given_student, given_teachers)
    _check_members("sampler", sampler, Sampler)
    section, rows, eval_rows = _prompts(prompts, eval_prompts)
    given = {key: _one_word(key, value) for key, value in sections.items() if value is not None}
    rewards: dict[str, Any] = {}
    _rewards(reward, given, rewards)
    given |= {"teacher": taught["teacher"][0]} if teacher is not None else {}
    given |= {"teachers": {name: one for name, (one, _) in taught.items()}} if teachers else {}
    return Config(student=learner, prompts=section, **given), Given(
        student=given_student,
        teachers=given_teachers,
        prompts=rows,
        eval_prompts=eval_rows,
        rewards=rewards,
        sampler=sampler,
    )


def _one_word(key: str, value: Any) -> Any:
    return {ONE_WORD[key]: value} if key in ONE_WORD and isinstance(value, str) else value


# --- models -----------------------------------------------------------------------------------------------------------


def _model(value: Any, section: type[ModelSection], role: str) -> tuple[ModelSection, Any]:
    """A student or a teacher as its section, and as the object that it is."""
    if isinstance(value, section):
        return value, None
    keys = dict(value) if isinstance(value, Mapping) else {"model": value}
    model = keys.get("model")
    if model is None or isinstance(model, (str, os.PathLike)):
        return section(**keys), None
    given = _given(model, role)
    kind = type(given.model if isinstance(given, GivenModel) else given).__name__
    if isinstance(given, GivenModel):
        keys = {"dtype": _dtype(given.model), "device": str(given.model.device), **keys}
    return section(**{**keys, "model": f"<object {kind}>"}), given


def _dtype(model: PreTrainedModel) -> str:
    name = str(model.dtype).removeprefix("torch.")
    return name if name in DTYPES else "float32"


def _given(value: Any, role: str) -> Any:
    """A GivenModel, or a teacher as it is."""
    if isinstance(value, (tuple, list)) and len(value) == 2:
        model, tokenizer = value
        if isinstance(model, PreTrainedModel) and isinstance(tokenizer, PreTrainedTokenizerBase):
            return GivenModel(model=model, tokenizer=tokenizer)
    if isinstance(value, PreTrainedModel):
        if not value.name_or_path:
            raise ConfigError(
                f"{role} is a {type(value).__name__} that was loaded from nowhere, so its tokenizer cannot be found; give both: "
                f"{role}=(model, tokenizer)."
            )
        return GivenModel(model=value, tokenizer=load_tokenizer(value.name_or_path, role=role))
    if role != "student" and hasattr(value, "score"):
        _check_members(role, value, Teacher)
        return value
    own = "" if role == "student" else ", or an object with the members of opd.Teacher"
    raise ConfigError(
        f"{role} cannot be {_shown(value)}; give a folder or hub name, a model of transformers with its tokenizer, {role}=(model, tokenizer), "
        f"a {'StudentConfig' if role == 'student' else 'TeacherConfig'} or a dict{own}."
    )


def _shown(value: Any) -> str:
    """A value in an error: a model's own repr fills pages."""
    if isinstance(value, (tuple, list)):
        return f"({', '.join(type(item).__name__ for item in value)})"
    return repr(value) if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"


def _refuse_student_as_teacher(student: Any, teachers: Mapping[str, Any]) -> None:
    for name, teacher in teachers.items():
        if isinstance(teacher, GivenModel) and student is not None and teacher.model is student.model:
            raise ConfigError(
                f"The teacher '{name}' is the very model that is trained, so it would change with every step. Give a copy of it "
                "(copy.deepcopy), or say how the student teaches itself: teacher={'source': 'student'}, 'ema' or 'adapter_off'."
            )


def _check_members(role: str, value: Any, protocol: type) -> None:
    """Raise ConfigError for an object that lacks members of a protocol."""
    members = [name for name in vars(protocol) if not name.startswith("_")]
    missing = [name for name in members if value is not None and not hasattr(value, name)]
    if missing:
        raise ConfigError(
            f"{role} is a {type(value).__name__} without {', '.join(missing)}, which opd.{protocol.__name__} has; add what is missing."
        )


# --- prompts and rewards ----------------------------------------------------------------------------------------------


def _prompts(prompts: Any, eval_prompts: Any) -> tuple[PromptsConfig, Iterable[Any] | None, Iterable[Any] | None]:
    """The section, and the rows of training and of evaluation where they are objects."""
    _refuse_splits("prompts", prompts)
    if isinstance(prompts, PromptsConfig):
        keys = {field.name: getattr(prompts, field.name) for field in dataclasses.fields(prompts)}
    else:
        keys = dict(prompts) if isinstance(prompts, Mapping) else {"path": prompts}
    if eval_prompts is not None:
        keys["eval_path"] = eval_prompts
    rows = {}
    for key in ("path", "eval_path"):
        value = keys.get(key)
        if value is not None and not isinstance(value, (str, os.PathLike)):
            rows[key] = _rows(key, value)
            keys[key] = f"<{type(value).__name__} of {len(rows[key])} rows>"
    return PromptsConfig(**keys), rows.get("path"), rows.get("eval_path")


def _rows(key: str, value: Any) -> Any:
    name = "prompts" if key == "path" else "eval_prompts"
    _refuse_splits(name, value)
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise ConfigError(
            f"{name} cannot be {_shown(value)}; give a file, a datasets.Dataset, a list of dicts such as {{'prompt': …, 'answer': …}}, or a list "
            "of texts."
        )
    return value if hasattr(value, "__len__") else list(value)


def _refuse_splits(name: str, value: Any) -> None:
    splits = (
        [str(split) for split, part in value.items() if hasattr(part, "column_names")]
        if isinstance(value, Mapping)
        else []
    )
    if splits:
        raise ConfigError(
            f"{name} has the splits {', '.join(splits)}; give one of them, e.g. {name}=data['{splits[0]}']."
        )


def _rewards(reward: Any, sections: dict[str, Any], rewards: dict[str, Any]) -> None:
    """Put every reward under the keys of a recipe that name one. Functions go into `rewards` under their description."""
    for key in ("eval", "rl"):
        section = sections.get(key)
        if isinstance(section, Mapping) and callable(section.get("reward")):
            sections[key] = {**section, "reward": _described(section["reward"], rewards)}
    if isinstance(reward, (Mapping, RewardConfig)):
        sections["reward"] = reward  # how rewards are called, as in a recipe
    elif reward is not None:
        name = reward if isinstance(reward, str) else _described(reward, rewards)
        section = sections.get("eval", {})
        if isinstance(section, EvalConfig):
            sections["eval"] = dataclasses.replace(section, reward=name)
        else:
            sections["eval"] = {**section, "reward": name}


def _described(reward: Callable[..., float], rewards: dict[str, Any]) -> str:
    """The name of a reward that has one in recipes, and else a description."""
    load_reward(reward)  # refuses what cannot be called as one
    known = next((name for name, function in BUILT_IN.items() if function is reward), None)
    if known is not None:
        return known
    name = f"<function {getattr(reward, '__module__', '')}.{getattr(reward, '__qualname__', type(reward).__name__)}>"
    rewards[name] = reward
    return name
