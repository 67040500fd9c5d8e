"""The recipe of an evaluation: what a command line names, as the sections that a run of it would have. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd.cli.named import Named
from opd.cli.options import Given, Option
from opd.config.prompts import PromptsConfig
from opd.config.recipe import merge, parse_overrides
from opd.config.train import EvalConfig
from opd.data.prompts import load_prompts
from opd.data.rows import read_rows
from opd.errors import ConfigError, ModelError

SECTIONS = ("student", "teacher", "teachers", "mixture", "prompts", "objective", "reward", "eval", "seed")
"""Those of a recipe that an evaluation takes as they are."""
KEYS = {
    "rollout": ("max_new_tokens", "batch_size", "stop"),
    "train": ("samples_per_prompt", "tokens_per_microbatch", "layout", "autocast", "loss_memory"),
    "log": ("samples",),
}
"""The keys that it takes of the other sections."""
NO_TEACHER = {"rl.weight": 1.0, "rl.distill_weight": 0.0, "train.samples_per_prompt": 2}
"""What a recipe without a teacher needs in order to be one. Nothing is trained, and no evaluation reads it."""
NO_REWARD = "none"
OF_SERVERS = {"objective.support": "teacher_top_k", "objective.tail": "sampled"}
"""The objective of a teacher whose server sends log-probs of some tokens."""
MODEL_OPTIONS = (
    Option(
        name="--teacher", value="MODEL|URL", help="a folder, a hub name, or the address of opd serve-teacher or vLLM"
    ),
    Option(name="--device", value="DEVICE", help="auto, cpu, cuda, cuda:1 (auto)"),
    Option(name="--dtype", value="DTYPE", help="auto, float32, bfloat16; auto is bfloat16 on a GPU"),
)


def teacher_words(value: str) -> dict[str, Any]:
    """The keys of a recipe that `--teacher VALUE` stands for."""
    if value.startswith(("http://", "https://")):
        return {"teacher.url": value}
    return {"teacher.model": value}


def sections(subject: Named, given: Given) -> dict[str, Any]:
    """Nested sections of the model, with `--teacher`, `--device`, `--dtype`, `--seed` and `--section.key value` put in. Nothing has
    checked them yet."""
    words = _taken(subject.recipe) if subject.recipe else {"student": {"dtype": "auto"}}
    overrides: dict[str, Any] = {"student.model": subject.model}
    if subject.trained:  # adapters are merged into the weights, which are ordinary ones
        overrides |= {"student.lora": None, "student.load_options": {}, "student.revision": None}
    if given.get("teacher"):
        words = {key: value for key, value in words.items() if key not in ("teacher", "teachers", "mixture")}
        overrides |= teacher_words(given.get("teacher"))
    overrides |= {f"student.{key}": given.get(key) for key in ("device", "dtype") if given.get(key)}
    overrides |= {"seed": given.get("seed")} if given.get("seed") is not None else {}
    words = merge(words, overrides)
    words = merge(words, parse_overrides(given.recipe))
    if not words.get("teacher") and not words.get("teachers"):
        words.pop("teacher", None)
        words = merge(words, NO_TEACHER)
    return words


def refuse_lost_teacher(subject: Named, words: Mapping[str, Any]) -> None:
    """Raise ModelError for a teacher that is the student itself, whose weights a finished student does not hold."""
    teachers = {"teacher": words.get("teacher"), **(words.get("teachers") or {})}
    for section in teachers.values():
        source = section.get("source") if isinstance(section, Mapping) else None
        if subject.checkpoint is None and subject.run is not None and source not in (None, "model"):
            raise ModelError(
                f"The teacher of '{subject.name}' is its own student (teacher.source={source}), as it was during the run, and student/ holds "
                f"the trained weights alone. Give a checkpoint, {subject.run / 'checkpoints'}/step-…, or another teacher: --teacher MODEL."
            )


def with_prompts(words: dict[str, Any], path: str | None, limit: int | None) -> dict[str, Any]:
    """The sections with held-out prompts, which are all that an evaluation reads. `path` comes before those of the recipe, and all of
    its rows are taken unless there is a `limit`."""
    section = words.get("prompts") or {}
    section = section if isinstance(section, Mapping) else {}
    given_path = path is not None
    if path is None:
        path, split = section.get("eval_path"), section.get("eval_split", "test")
        if path is None:
            raise ConfigError("There are no held-out prompts: give --prompts FILE, or prompts.eval_path in the recipe.")
    else:
        split = section.get("eval_split", "test") if path.startswith("hub:") else section.get("split", "train")
    overrides: dict[str, Any] = {f"prompts.{key}": path for key in ("path", "eval_path")}
    overrides |= {f"prompts.{key}": split for key in ("split", "eval_split")}
    words = merge(words, overrides | {"eval.every": 1, "train.prompts_per_step": 1})
    if limit is None and given_path:
        limit = _count(words["prompts"])
    if limit is not None:
        words["eval"]["prompts"] = limit
    words["prompts"]["limit"] = words["eval"].get("prompts", EvalConfig.prompts)
    return words


def first_has_answer(words: Mapping[str, Any]) -> bool:
    """The first row has a reference answer, which the usual rewards compare with."""
    section = PromptsConfig(**words["prompts"])
    return load_prompts(section.path, **{**section.training(), "limit": 1})[0].answer is not None


def _count(section: Mapping[str, Any]) -> int:
    """Rows of the file; one without any is refused where its prompts are read."""
    return max(1, sum(1 for _ in read_rows(section["path"], section["split"])))


def objective_of_servers(words: Mapping[str, Any]) -> dict[str, str]:
    """The keys of an objective that the teacher's server can answer, where the sections say none and it sends log-probs alone."""
    teacher = words.get("teacher") or {}
    alone = bool(teacher.get("url")) and (teacher.get("api") or "vllm") != "opd"
    return OF_SERVERS if alone and "objective" not in words else {}


def _taken(recipe: Mapping[str, Any]) -> dict[str, Any]:
    words: dict[str, Any] = {key: recipe[key] for key in SECTIONS if key in recipe}
    for name, keys in KEYS.items():
        section = recipe.get(name)
        if isinstance(section, Mapping):
            words[name] = {key: section[key] for key in keys if key in section}
    return words
