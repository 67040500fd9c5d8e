"""verl's config as a recipe, as far as the doctor's checks read one: models, prompts, sampling, and the ends of answers."""

# pyright: reportMissingImports=false
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from opd.config.run import RunSettings
from opd.config.sections import parse_section
from opd.integrations.verl.dry_run.compose import ConfigOverrides
from opd.integrations.verl.dry_run.shrink_config import data_routes, readable, requested_models
from opd.integrations.verl.dry_run.tiny_models import RequestedModel, make_prompts, why_unreadable
from opd.integrations.verl.plugin.settings import SOLE, Settings, parse
from opd.losses.settings import ObjectiveSettings

OF_THE_ENDS = ("eos_groups", "teacher_logp_floor")
"""Keys of the objective that the checks read."""


@dataclass(frozen=True, kw_only=True)
class DoctorsRecipe:
    """What the checks look at, and what of it is on this machine."""

    settings: RunSettings | None
    """None where nothing is distilled, or a model's config or tokenizer is not on this machine."""
    absent: tuple[str, ...]
    """A sentence's subject for everything that is not here, such as "teacher '/nfs/teacher' (no config and tokenizer on this disk)"."""
    made_up: bool
    """The prompts are sums, because the data files are not here."""
    notes: tuple[str, ...]
    """What the checks do not follow."""
    max_prompt_tokens: int
    """data.max_prompt_length."""
    workers: int
    """GPUs that share the models' weights."""


def doctors_recipe(config: DictConfig, folder: Path) -> DoctorsRecipe:
    """Raises OpdError for settings of opd's that are wrong, and DataError for data files without their column.

    `folder` takes prompts that are made up in place of files that are not here.
    """
    settings, _ = parse(OmegaConf.to_container(config.opd, resolve=True))  # pyright: ignore[reportArgumentType]
    models = {one.role: one for one in requested_models(config) if one.role.startswith(("student", "teacher"))}
    reasons = {role: why_unreadable(one) for role, one in models.items()}
    absent = [f"{role} '{models[role].path}' ({reason})" for role, reason in reasons.items() if reason]
    prompts, made_up, notes = _prompts(config, folder)
    notes += [f"{one.role}'s tokenizer_path and hf_config_path" for one in models.values() if _has_other_files(one)]
    known = settings.rl.distilled and not absent
    return DoctorsRecipe(
        settings=parse_section(RunSettings, _tree(config, settings, prompts, folder)) if known else None,
        absent=tuple(absent),
        made_up=made_up,
        notes=tuple(notes),
        max_prompt_tokens=config.data.max_prompt_length,
        workers=max(1, config.trainer.nnodes * config.trainer.n_gpus_per_node),
    )


def _has_other_files(model: RequestedModel) -> bool:
    return model.config_path is not None or model.tokenizer_path is not None


def _prompts(config: DictConfig, folder: Path) -> tuple[str, bool, list[str]]:
    """The first data file, whether it is made up, and what is left out."""
    paths, _ = readable(ConfigOverrides(config), "data.train_files")
    if paths is None:
        column, sources = data_routes(config)
        made = make_prompts(
            folder / "doctor.parquet", prompt_key=config.data.prompt_key, source_key=column, sources=sources
        )
        return str(made), True, []
    return paths[0], False, [f"data.train_files after the first ({len(paths) - 1})"] if len(paths) > 1 else []


def _tree(config: DictConfig, settings: Settings, prompts: str, folder: Path) -> dict[str, Any]:
    model, rollout, data = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout, config.data
    template = OmegaConf.to_container(data.get("apply_chat_template_kwargs") or OmegaConf.create({}))
    reads = {"chat_template_kwargs": template}
    student = {"model": str(model.path), "trust_remote_code": bool(model.get("trust_remote_code")), **reads}
    if any(one.is_student for one in settings.all_teachers.values()):
        student["lora"] = {"rank": model.get("lora_rank") or 1}
    teachers = {
        name: {
            "source": one.source,
            "trust_remote_code": one.trust_remote_code,
            **({} if one.is_student else {"model": one.model, **reads}),
        }
        for name, one in settings.all_teachers.items()
    }
    alone = list(teachers) == [SOLE]
    mixture = {"kind": settings.mixture.kind, "weights": settings.mixture.weights} if len(teachers) > 1 else {}
    objective = {name: getattr(settings.objective, name) for name in OF_THE_ENDS}
    plain = {name: value for name, value in objective.items() if value != getattr(ObjectiveSettings(), name)}
    return {
        "student": student,
        **({"teacher": teachers[SOLE]} if alone else {"teachers": teachers, "mixture": mixture}),
        "prompts": {
            "path": prompts,
            "prompt_column": data.prompt_key,
            **({"teacher_column": settings.prompts.teacher_column} if settings.mixture.kind == "routing" else {}),
        },
        "objective": plain,
        "rollout": {
            "max_new_tokens": data.max_response_length,
            "temperature": rollout.temperature,
            "top_p": rollout.top_p,
            "top_k": max(0, rollout.top_k),
        },
        "eval": {"every": 0},
        "run_dir": str(folder / "run"),
    }
