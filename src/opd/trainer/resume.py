"""Changes of a recipe that --resume allows: every key, by its effect on the mathematics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import yaml

from opd.config import Config
from opd.config.optimizer import default_warmup
from opd.config.recipe import build, to_dict, without_idle_defaults
from opd.errors import OpdError, RunFolderError

Effect = Literal["none", "inputs", "evaluation", "later", "all"]
Change = tuple[object, object]
"""The value that the run had, and the one that it goes on with."""

EFFECTS: dict[str, Effect] = {
    # none: speed, memory, rounding, and what is written down. Sampling in other batches, or by another engine, is another draw of the same distribution.
    **dict.fromkeys(
        (
            "student.device",
            "student.attn_implementation",
            "student.gradient_checkpointing",
            "teacher.device",
            "teacher.attn_implementation",
            "teacher.tokens_per_batch",
            "teacher.supply",
            "teacher.offload",
            "teacher.api",
            "teacher.api_key_env",
            "teacher.concurrency",
            "teacher.timeout",
            "teacher.deadline",
            "teacher.canary_every",
            "teacher.cache",
            "rollout.batch_size",
            "rollout.engine",
            "rollout.vllm.mode",
            "rollout.vllm.url",
            "rollout.vllm.api_key_env",
            "rollout.vllm.python",
            "rollout.vllm.args",
            "rollout.vllm.memory_share",
            "rollout.vllm.max_model_len",
            "rollout.vllm.sync_dir",
            "rollout.vllm.start_timeout",
            "rollout.vllm.timeout",
            "rollout.vllm.max_gap",
            "optimizer.offload",
            "optimizer.natural_gradient.keep_graphs",
            "train.tokens_per_microbatch",
            "train.layout",
            "train.loss_memory",
            "train.parallel",
            "guard.first_steps",
            *(
                f"guard.{rule}.{key}"
                for rule in (
                    "length",
                    "eos_prob",
                    "entropy",
                    "loss",
                    "reward",
                    "clipped",
                    "sampler_gap",
                    "canary",
                    "start_kl",
                )
                for key in ("threshold", "patience", "action")
            ),
            "eval.every",
            "eval.extra_temperatures",
            "checkpoint.every",
            "checkpoint.keep",
            "log.progress",
            "log.tensorboard",
            "log.wandb_project",
            "log.trackio_project",
            "log.samples_every",
            "log.samples",
            "log.reward",
            "log.show_samples",
            "save.dtype",
            "save.push_to_hub",
            "save.private",
            "run_dir",
        ),
        "none",
    ),
    # inputs: where something is read from. The fingerprints in the checkpoint say whether it is still the same.
    **dict.fromkeys(
        (
            "student.model",
            "student.revision",
            "student.trust_remote_code",
            "teacher.model",
            "teacher.revision",
            "teacher.trust_remote_code",
            "teacher.url",
            "teacher.served_model",
            "prompts.path",
            "prompts.split",
            "prompts.prompt_column",
            "prompts.answer_column",
            "prompts.response_column",
            "prompts.teacher_column",
            "prompts.user_message",
            "prompts.limit",
            "prompts.reasoning_gym.size",
            "prompts.reasoning_gym.seed",
            "prompts.reasoning_gym.config",
            "prompts.reasoning_gym.chat",
            "rollout.path",
        ),
        "inputs",
    ),
    # evaluation: what is measured. Training does not see it; evaluations start anew, so that no two measures share a table.
    **dict.fromkeys(
        (
            "prompts.eval_path",
            "prompts.eval_split",
            "prompts.reasoning_gym.eval_seed",
            "eval.prompts",
            "eval.samples_per_prompt",
            "eval.temperature",
            "eval.reward",
        ),
        "evaluation",
    ),
    # later: the steps from here on, in what a person may turn while a run goes on, or is advised to by an error.
    **dict.fromkeys(
        (
            "student.dtype",
            "teacher.dtype",
            "objective.teacher_logp_floor",
            "reward.timeout",
            "reward.on_error",
            "rollout.max_new_tokens",
            "optimizer.lr",
            "optimizer.adamw_lr",
            "optimizer.betas",
            "optimizer.weight_decay",
            "optimizer.momentum",
            "optimizer.natural_gradient.damping",
            "optimizer.natural_gradient.trust_region",
            "optimizer.natural_gradient.iterations",
            "optimizer.natural_gradient.probes",
            "optimizer.warmup_steps",
            "optimizer.schedule",
            "optimizer.min_lr_ratio",
            "optimizer.max_grad_norm",
            "train.steps",
            "train.autocast",
            "train.drop",
            # with action=drop they decide which responses are trained on
            *(
                f"guard.{rule}.{key}"
                for rule in ("truncated", "repetition")
                for key in ("threshold", "patience", "action")
            ),
        ),
        "later",
    ),
    # all: what is minimised, on which samples, from which parameters. Another value is another run.
    **dict.fromkeys(
        (
            "student.chat_template_kwargs",
            "student.load_options.quantization",
            "student.load_options.quantization_config",
            "student.lora.rank",
            "student.lora.alpha",
            "student.lora.target_modules",
            "teacher.chat_template_kwargs",
            "teacher.load_options.quantization",
            "teacher.load_options.quantization_config",
            "teacher.source",
            "teacher.ema_decay",
            "mixture.kind",
            "mixture.weights",
            "mixture.weights_end",
            "mixture.schedule_steps",
            "mixture.weights_column",
            "mixture.balance_tokens",
            "prompts.system",
            "prompts.teacher_prompt",
            "prompts.shuffle",
            "objective.divergence",
            "objective.beta",
            "objective.alpha",
            "objective.normalize",
            "objective.support",
            "objective.top_k",
            "objective.tail",
            "objective.always_include",
            "objective.include_sampled",
            "objective.eos_groups",
            "objective.estimator",
            "objective.delivery",
            "objective.baseline",
            "objective.discount",
            "objective.student_temperature",
            "objective.teacher_temperature",
            "objective.scale_by_t2",
            "objective.reduction",
            "objective.fixed_count",
            "objective.clip_range",
            "objective.token_clip",
            "rl.weight",
            "rl.weight_end",
            "rl.distill_weight",
            "rl.distill_weight_end",
            "rl.schedule_steps",
            "rl.reward",
            "rl.advantage",
            "rl.normalize_std",
            "rl.clip_range",
            "rl.clip_high",
            "rl.reference_kl",
            "rl.combine",
            "rl.scale",
            "rollout.horizon_start",
            "rollout.horizon_steps",
            "rollout.temperature",
            "rollout.top_p",
            "rollout.top_k",
            "rollout.stop",
            "rollout.ahead",
            "rollout.importance_cap",
            "rollout.lmbda",
            "rollout.cross_entropy",
            "rollout.off_policy",
            "rollout.source",
            "optimizer.name",
            "optimizer.natural_gradient.parameters",
            "train.prompts_per_step",
            "train.samples_per_prompt",
            "train.token_fraction",
            "seed",
        ),
        "all",
    ),
}
"""Every key of a recipe; those of `teachers.NAME` are those of `teacher`. A key that is not here cannot change on --resume."""


def table_key(key: str) -> str:
    """`teachers.math.model` → `teacher.model`; an entry of a mapping, such as `mixture.weights.math` → `mixture.weights`."""
    parts = key.split(".")
    if parts[0] == "teachers":
        parts = ["teacher", *parts[2:]]
    while len(parts) > 1 and ".".join(parts) not in EFFECTS:
        parts.pop()
    return ".".join(parts) if ".".join(parts) in EFFECTS else key


def effect_of(key: str, config: Config) -> Effect:
    """The effect of another value of `key` on a run that has begun."""
    trained_on = config.rl.rewarded or "correct" in config.train.drop
    if key == "eval.reward" and trained_on and config.rl.reward is None:
        return "all"  # it is the reward that is trained on, too
    return EFFECTS.get(table_key(key), "all")


def compare(saved: Mapping[str, Any], config: Config) -> dict[str, Change]:
    """The keys whose values differ from the recipe that a run was started with, each with both values."""
    try:
        before = _flat(
            to_dict(build(without_idle_defaults(saved)))
        )  # a key that is younger than the run gets its default
    except OpdError:
        before = _flat(saved)
    now = _flat(to_dict(config))
    return {key: (before.get(key), now.get(key)) for key in sorted({*before, *now}) if before.get(key) != now.get(key)}


def check_same_run(changes: Mapping[str, Change], config: Config, run_dir: str, *, has_checkpoint: bool) -> None:
    """Raise RunFolderError where the changed recipe is that of another run."""
    others = {
        key: change for key, change in changes.items() if effect_of(key, config) == "all" or _other_place(key, change)
    }
    if not others:
        return
    instead = (
        "" if has_checkpoint else " There is no checkpoint yet to go on from: --overwrite starts it with this recipe."
    )
    raise RunFolderError(
        f"'{run_dir}' was started with another recipe, so --resume would not continue the same run: {described(others)}. "
        f"Use the recipe it was started with, or a new --run_dir.{instead}"
    )


def _other_place(key: str, change: Change) -> bool:
    """A teacher in this process became one behind a server, or the other way round: no fingerprint compares the two."""
    return table_key(key) == "teacher.url" and not all(change)


def described(changes: Mapping[str, Change]) -> str:
    """The changes in a line, without the folder's own name."""
    return "; ".join(f"{key}: {old!r} → {new!r}" for key, (old, new) in changes.items() if key != "run_dir")


def continued(config: Config, changes: Mapping[str, Change]) -> tuple[Config, Mapping[str, Change]]:
    """The recipe to go on with, and how it differs: a micro-batch that the recipe leaves open stays, for the same rounding. A warm-up
    that nobody chose stays that of the first start when the run grows, because to begin it again would take the rate back."""
    tokens, left_open = changes.get("train.tokens_per_microbatch", (None, 0))
    if left_open is None:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, tokens_per_microbatch=tokens))
        changes = {name: change for name, change in changes.items() if name != "train.tokens_per_microbatch"}
    key = "optimizer.warmup_steps"
    if "train.steps" not in changes or key not in changes:
        return config, changes
    (old, new), name = changes[key], config.optimizer.name
    unchosen = all(
        w == default_warmup(name, int(str(n))) for w, n in zip(changes[key], changes["train.steps"], strict=True)
    )
    if not unchosen or int(str(old)) > int(str(new)):
        return config, changes
    kept = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, warmup_steps=old))
    return kept, {name: change for name, change in changes.items() if name != key}


def notes(changes: Mapping[str, Change], config: Config) -> list[str]:
    """Warnings about the changes, beside their values."""
    found = []
    if "train.steps" in changes:
        moving = {
            "optimizer.schedule": config.optimizer.schedule != "constant",
            "rl.weight_end and rl.distill_weight_end": config.rl.schedule_steps is None
            and (config.rl.weight_end is not None or config.rl.distill_weight_end is not None),
            "mixture.weights_end": config.mixture.schedule_steps is None and bool(config.mixture.weights_end),
            "rollout.horizon_start": config.rollout.horizon_steps is None and config.rollout.horizon_start is not None,
        }
        over = [name for name, moves in moving.items() if moves]
        if over:
            found.append(
                f"{', '.join(over)} move over train.steps, so from here on they are where a run of {config.train.steps} steps has them."
            )
    if any(effect_of(key, config) == "evaluation" for key in changes) or "rollout.max_new_tokens" in changes:
        found.append(
            "evaluations measure something else from here on, so they start anew; the table has no row from before."
        )
    return found


def read_saved(path: Any) -> dict[str, Any]:
    """A run's config.yaml. Raises RunFolderError when it cannot be read."""
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(saved, dict):
            raise ValueError("it is not a recipe")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunFolderError(
            f"'{path}' cannot be read: {error}. Restore the recipe the run was started with, or start a new --run_dir."
        ) from error
    return saved


def _flat(data: object, prefix: str = "") -> dict[str, object]:
    """Dotted keys; a section that is not there has none."""
    if not isinstance(data, dict):
        return {prefix[:-1]: data}
    flat: dict[str, object] = {}
    for key, value in data.items():
        if value is not None or f"{prefix}{key}" not in ("student.lora", "teacher"):
            flat |= _flat(value, f"{prefix}{key}.")
    return flat
