"""The settings of a user's verl config that give way on a laptop, as overrides that come after the user's own.

Batches and lengths are cut down with their ratios kept, and refused where they do not go together.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from opd.errors import ConfigError, DataError
from opd.integrations.verl.dry_run.compose import ACTOR, MODEL, REF, ROLLOUT, ConfigOverrides, has_critic, leaves
from opd.integrations.verl.dry_run.tiny_models import DATA_SOURCE, REWARD, RequestedModel, StandIn, make_prompts

PROMPTS = 4
"""Per step."""
SAMPLES = 2
"""Per prompt, where the user has more than one: enough for an advantage within a group."""
PROMPT_TOKENS, RESPONSE_TOKENS = 64, 16


def shrink_sizes(changes: ConfigOverrides) -> None:
    """Set as many updates per step and micro-batches per update as the user has, up to two of each."""
    n = changes.get(f"{ROLLOUT}.n")
    samples = min(n, SAMPLES)
    batch, world = changes.get("data.train_batch_size"), _world(changes.config)
    own_lengths = (changes.get("data.max_prompt_length"), changes.get("data.max_response_length"))
    lengths = (min(own_lengths[0], PROMPT_TOKENS), min(own_lengths[1], RESPONSE_TOKENS))
    own_tokens, tokens = sum(own_lengths), sum(lengths)
    changes.values |= {"data.train_batch_size": PROMPTS, f"{ROLLOUT}.n": samples}
    if changes.get("data.gen_batch_size") is not None:
        changes.set("data.gen_batch_size", min(changes.get("data.gen_batch_size"), PROMPTS))
    for section, prefix in (("data", "max_"), (ROLLOUT, "")):
        changes.values |= {
            f"{section}.{prefix}{side}_length": lengths[i] for i, side in enumerate(("prompt", "response"))
        }
    changes.row("batch", f"{batch} prompts × {n}", f"{PROMPTS} × {samples}")
    for section in (ACTOR, "critic") if has_critic(changes.config) else (ACTOR,):
        mini = changes.get(f"{section}.ppo_mini_batch_size")
        small = PROMPTS if mini >= batch else PROMPTS // 2
        changes.set(f"{section}.ppo_mini_batch_size", small)
        micro = _shrink_micro_batch(
            changes, section, "ppo_", (mini * n // world, small * samples), (own_tokens, tokens)
        )
        if changes.has(f"{section}.ppo_epochs"):
            changes.set(f"{section}.ppo_epochs", min(changes.get(f"{section}.ppo_epochs"), 2))
        if section == ACTOR:
            changes.row("mini-batch", mini, small)
            if micro is not None:
                changes.row("micro-batch", *micro)
    for section, prefix in ((ROLLOUT, "log_prob_"), (REF, "log_prob_"), ("critic", "forward_")):
        _shrink_micro_batch(changes, section, prefix, (batch * n // world, PROMPTS * samples), (own_tokens, tokens))
    for rewards in (
        "reward.reward_kwargs",
        "reward_model.reward_kwargs",
    ):  # DAPO's penalty for long responses, in tokens
        if changes.get(f"{rewards}.max_resp_len") is not None:
            changes.set(f"{rewards}.max_resp_len", lengths[1])
        if changes.get(f"{rewards}.overlong_buffer_cfg.len") is not None:
            changes.set(f"{rewards}.overlong_buffer_cfg.len", lengths[1] // 2)
    changes.row("lengths", " + ".join(map(str, own_lengths)), " + ".join(map(str, lengths)))


def _shrink_micro_batch(
    changes: ConfigOverrides, section: str, prefix: str, samples: tuple[int, int], tokens: tuple[int, int]
) -> tuple[int, int] | None:
    """Set two micro-batches where the user has several, else one; returns the user's size and the new one.

    `samples` of a mini-batch and `tokens` of a sample are the user's and the new number.
    """
    (whole, here), (own_length, length), sizes = samples, tokens, None
    for name in ("micro_batch_size_per_gpu", "micro_batch_size"):
        key = f"{section}.{prefix}{name}"
        micro = changes.get(key)
        if micro is not None:
            changes.set(key, max(1, here // 2) if micro < whole else here)
            sizes = (micro, changes.values[key])
    key = f"{section}.{prefix}max_token_len_per_gpu"
    most = changes.get(key)
    if most is not None and changes.get(f"{ACTOR}.use_dynamic_bsz"):
        changes.set(key, max(length, here * length // 2) if most < whole * own_length else here * length)
    return sizes


def _world(config: DictConfig) -> int:
    """Data-parallel workers of the actor."""
    actor = config.actor_rollout_ref.actor
    sequence = max(
        actor.fsdp_config.get("ulysses_sequence_parallel_size") or 1, actor.get("ulysses_sequence_parallel_size") or 1
    )
    return max(1, config.trainer.n_gpus_per_node * config.trainer.nnodes // sequence)


COUNTS = (
    "data.train_batch_size",
    "data.max_prompt_length",
    "data.max_response_length",
    "trainer.nnodes",
    "trainer.n_gpus_per_node",
    f"{ROLLOUT}.n",
    f"{ACTOR}.ppo_mini_batch_size",
    "critic.ppo_mini_batch_size",
)
COUNTS_OR_NOTHING = (f"{ACTOR}.ppo_micro_batch_size_per_gpu", "critic.ppo_micro_batch_size_per_gpu")


def check_sizes(config: DictConfig) -> None:
    """Raise ConfigError for batches of the user's own that verl's workers would refuse: smaller ones cannot show it."""
    for key in (*COUNTS, *COUNTS_OR_NOTHING):
        value = OmegaConf.select(config, key)
        if (type(value) is not int or value < 1) and not (value is None and key in COUNTS_OR_NOTHING):
            raise ConfigError(f"{key}={value} must be a whole number above 0.")
    n, world = config.actor_rollout_ref.rollout.n, _world(config)
    sections: list[tuple[str, Mapping[str, Any]]] = [(ACTOR, config.actor_rollout_ref.actor)]
    sections += [("critic", config.critic)] if has_critic(config) else []
    for name, section in sections:
        mini, micro = section["ppo_mini_batch_size"], section["ppo_micro_batch_size_per_gpu"]
        if mini * n % world:
            raise ConfigError(
                f"{name}.ppo_mini_batch_size={mini} × rollout.n={n} is {mini * n} samples, which {world} data-parallel workers cannot share "
                f"equally; make it a multiple of {world}."
            )
        own = mini * n // world
        if not section["use_dynamic_bsz"] and micro is not None and own % micro:
            raise ConfigError(
                f"{name}.ppo_micro_batch_size_per_gpu={micro} does not divide the {own} samples of a mini-batch that each of {world} "
                f"data-parallel workers has ({mini} prompts × {n} samples / {world}); use a divisor of {own}."
            )


ROWS = 64
"""Of a data file."""
EXTERNAL_LIB = "opd_smoke_libraries"
CRITIC = "critic"
TEACHERS = "distillation.teacher_models"
SERVERS = ("vllm", "sglang", "trtllm")
OFFLOADS = ("param_offload", "optimizer_offload", "offload_policy")
PARALLEL_SIZES = ("tensor_model_parallel_size", "data_parallel_size", "pipeline_model_parallel_size")
ASYNCHRONOUS = {
    "colocate_async": "sync",
    "separate_async": "sync",
    "opd_colocate_async": "opd_sync",
    "opd_separate_async": "opd_sync",
}
"""Trainers that need GPUs for rollouts beside the update, and the one that stands in."""
OWN_FILES = {"hf_config_path": "config_path", "tokenizer_path": "tokenizer_path"}
"""verl's keys beside a model's path, and the fields of a requested model."""


def requested_models(config: DictConfig) -> list[RequestedModel]:
    """The models that the config names and the run would load: the student first, then its teachers, then the critic."""
    found = [_requested(config, "student", f"{MODEL}.path")]
    for key, value in _opd_leaves(config):
        section, _, name = key.rpartition(".")
        if name == "model" and value:
            found.append(_requested(config, "teacher" + section.removeprefix("opd.teacher").replace("s.", " "), key))
    for name in _served_teachers(config):
        if not OmegaConf.is_interpolation(config.distillation.teacher_models[name], "model_path"):
            found.append(_requested(config, f"teacher {name}", f"{TEACHERS}.{name}.model_path"))
    if has_critic(config):
        found.append(_requested(config, CRITIC, "critic.model.path"))
    return found


def _opd_leaves(config: DictConfig) -> list[tuple[str, Any]]:
    return list(leaves(config.get("opd") or OmegaConf.create({}), "opd."))


def _served_teachers(config: DictConfig) -> list[str]:
    """The teachers that verl's own servers would hold."""
    if not OmegaConf.select(config, "distillation.enabled"):
        return []
    return [str(name) for name, one in config.distillation.teacher_models.items() if one.get("model_path")]


def _requested(config: DictConfig, role: str, key: str) -> RequestedModel:
    node = OmegaConf.select(config, key.rpartition(".")[0])
    return RequestedModel(
        role=role,
        key=key,
        path=str(OmegaConf.select(config, key)),
        trust_remote_code=bool(node.get("trust_remote_code")),
        **{name: node.get(theirs) for theirs, name in OWN_FILES.items()},
    )


def model_overrides(models: Sequence[StandIn]) -> dict[str, Any]:
    """The paths of the stand-ins in place of the user's."""
    values: dict[str, Any] = {}
    for model in models:
        section = model.requested.key.rpartition(".")[0]
        values[model.requested.key] = model.folder
        given = [key for key, name in OWN_FILES.items() if getattr(model.requested, name) is not None]
        values |= {f"{section}.{key}": None for key in given}
    return values


def replace(config: DictConfig, models: Sequence[StandIn], *, folder: Path, steps: int) -> ConfigOverrides:
    """Everything that gives way. `folder` takes the files that are made up."""
    changes = ConfigOverrides(config)
    for model in models:
        if model.requested.role != CRITIC:
            changes.row(model.requested.role, model.requested.path, model.description)
    changes.values |= model_overrides(models)
    _data(changes, folder)
    _reward(changes, folder)
    shrink_sizes(changes)
    _machine(changes, folder)
    left_out = files("opd.integrations.verl.dry_run").joinpath("left_out.yaml").read_text(encoding="utf-8")
    dotted = leaves(OmegaConf.create(left_out))  # pyright: ignore[reportArgumentType]
    changes.values |= {key: value for key, value in dotted if changes.has(key)}
    changes.set("trainer.total_training_steps", steps)
    changes.set("trainer.total_epochs", steps)  # an epoch has a step at the least
    changes.set("trainer.default_local_dir", str(folder / "checkpoints"))
    return changes


def _machine(changes: ConfigOverrides, folder: Path) -> None:
    device = files("opd.integrations.verl.plugin.conf").joinpath("opd_device/cpu.yaml")
    changes.values |= dict(leaves(OmegaConf.create(device.read_text(encoding="utf-8"))))
    own, ours = changes.get(f"{MODEL}.external_lib"), changes.values[f"{MODEL}.external_lib"]
    if own not in (None, ours):
        lines = [f"import {name}\n" for name in (own if OmegaConf.is_list(own) else [own])]
        (folder / f"{EXTERNAL_LIB}.py").write_text(f"{''.join(lines)}import {ours}\n", encoding="utf-8")
        changes.set(f"{MODEL}.external_lib", EXTERNAL_LIB)
    if has_critic(changes.config):
        changes.values |= {"critic.enable": False, "algorithm.adv_estimator": "grpo"}
        changes.row(
            "critic", "on", "left out: verl loads value models with FlashAttention alone; advantages are grpo's"
        )
    for section in (ACTOR, REF):
        changes.values |= {f"{section}.fsdp_config.{name}": False for name in OFFLOADS}
    for key, value in _opd_leaves(changes.config):
        if key.endswith(".attn_implementation") and value is not None:
            changes.set(key, "sdpa")
        if key.endswith(".offload") and value:
            changes.set(key, False)
        if key.startswith("opd.guard.") and value == "stop":
            changes.set(key, "warn")
            changes.row("guard", f"{key}=stop", "warn: short answers of random models break any rule")
    if changes.get(f"{MODEL}.lora_rank") or changes.get(f"{MODEL}.lora.rank"):
        changes.set(f"{MODEL}.lora.merge", True)  # the only weights of an adapter that the rollout here takes
    _teacher_servers(changes)
    mode = changes.get("trainer.v1.trainer_mode")
    if mode in ASYNCHRONOUS:
        changes.set("trainer.v1.trainer_mode", ASYNCHRONOUS[mode])
        changes.row("trainer", mode, ASYNCHRONOUS[mode])
    nodes, gpus, device = (changes.get(f"trainer.{key}") for key in ("nnodes", "n_gpus_per_node", "device"))
    changes.row("machine", f"{nodes} × {gpus} × {device}", "one process on the CPU, float32")
    changes.row("rollout", changes.get(f"{ROLLOUT}.name"), "transformers")


def _teacher_servers(changes: ConfigOverrides) -> None:
    """One server for each teacher, on a GPU that Ray is told of."""
    names = _served_teachers(changes.config)
    if not names:
        return
    changes.values |= {"distillation.nnodes": 1, "distillation.n_gpus_per_node": len(names)}
    changes.set("ray_kwargs.ray_init.num_gpus", 1 + len(names))
    for name in names:
        server = f"{TEACHERS}.{name}.inference"
        if changes.get(f"{TEACHERS}.{name}.num_replicas"):
            changes.set(f"{TEACHERS}.{name}.num_replicas", 1)
        if changes.get(f"{server}.name") in SERVERS:
            changes.set(f"{server}.name", "transformers")
        changes.values |= {f"{server}.dtype": "float32", f"{server}.max_model_len": None}
        changes.values |= {f"{server}.{key}": 1 for key in PARALLEL_SIZES}
        lengths = ("prompt_length", "response_length")
        changes.values |= {f"{server}.{key}": changes.values[f"{ROLLOUT}.{key}"] for key in lengths}


def _data(changes: ConfigOverrides, folder: Path) -> None:
    train, rows = readable(changes, "data.train_files")
    if train is None:
        column, sources = data_routes(changes.config)
        prompt_key = changes.get("data.prompt_key")
        path = folder / "prompts.parquet"
        train = [str(make_prompts(path, prompt_key=prompt_key, source_key=column, sources=sources, rows=ROWS))]
        here = "not on this machine: made-up sums"
    else:
        least = changes.get("data.train_batch_size")
        if rows is not None and rows < least:
            raise DataError(
                f"data.train_files hold {rows} prompts, fewer than data.train_batch_size={least}: verl would not start a step. Give more "
                "prompts, or a smaller batch."
            )
        here = f"{ROWS} of {rows} prompts" if rows is not None and rows > ROWS else "the same"
    val, _ = readable(changes, "data.val_files")
    changes.values |= {"data.train_files": train, "data.val_files": val or train}
    for key in ("data.train_max_samples", "data.val_max_samples"):
        own = changes.get(key)
        changes.set(key, min(own, ROWS) if own is not None and own > 0 else ROWS)
    named = changes.get("data.train_files")
    changes.row("prompts", ", ".join(map(str, named)) if OmegaConf.is_list(named) else named, here)


def data_routes(config: DictConfig) -> tuple[str, list[str]]:
    """The column that says which teacher a sample goes to, and its values."""
    opd = config.get("opd")
    if opd is not None and opd.mixture.kind == "routing":
        return str(opd.prompts.teacher_column), list(opd.teachers)
    served = _served_teachers(config)
    if len(served) > 1:
        return str(config.distillation.teacher_key), [str(config.distillation.teacher_models[n].key) for n in served]
    return "data_source", [DATA_SOURCE]


def readable(changes: ConfigOverrides, key: str) -> tuple[list[str] | None, int | None]:
    """The data files that a key names, when all are here, and how many rows they have."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    named = changes.get(key)
    named = OmegaConf.to_container(named) if OmegaConf.is_config(named) else named
    paths = [Path(str(one)).expanduser() for one in (named if isinstance(named, list) else [named])]
    if not all(path.is_file() for path in paths):
        return None, None
    rows, column = 0, changes.get("data.prompt_key")
    for path in paths:
        if path.suffix != ".parquet":
            return [str(one.resolve()) for one in paths], None
        try:
            metadata = pq.read_metadata(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{key}={path} cannot be read as parquet: {str(error)[:200]}.") from error
        names = metadata.schema.to_arrow_schema().names
        if column not in names:
            raise DataError(
                f"{key}={path} has no column '{column}' (data.prompt_key), it has {', '.join(names)}; name the prompts' column."
            )
        rows += metadata.num_rows
    return [str(one.resolve()) for one in paths], rows


def _reward(changes: ConfigOverrides, folder: Path) -> None:
    places = ("custom_reward_function", "reward.custom_reward_function")
    own = next((str(path) for path in (changes.get(f"{place}.path") for place in places) if path), None)
    is_model = bool(changes.get("reward.reward_model.enable") or changes.get("reward_model.enable"))
    if own is not None and (own.startswith("pkg://") or Path(own.removeprefix("file://")).is_file()):
        changes.row("reward", own, "the same, without the reward model" if is_model else "the same")
        return
    is_verls = own is None and not is_model
    if is_verls and changes.values["data.train_files"][0] != str(folder / "prompts.parquet"):
        changes.row("reward", "verl's own, by data_source", "the same")
        return
    made = folder / "reward.py"
    made.write_text(REWARD, encoding="utf-8")
    if changes.get(f"{places[0]}.path"):
        changes.values |= {f"{places[0]}.path": None, f"{places[0]}.name": None}
    changes.values |= {f"{places[1]}.path": str(made), f"{places[1]}.name": "compute_score"}
    if is_verls:
        changes.row("reward", "verl's own, by data_source", "made-up prompts: the share of digits")
    else:
        changes.row("reward", own or "a reward model", "not on this machine: the share of digits")


def check_given(config: DictConfig) -> None:
    """Raise ConfigError for a key that verl has no default for, and for an engine that no CPU runs."""
    if OmegaConf.is_missing(config.actor_rollout_ref.rollout, "name"):
        raise ConfigError(f"{ROLLOUT}.name is not set, and verl has no default for it; set vllm or sglang.")
    engine = OmegaConf.select(config, "model_engine", default="dp")
    strategy = config.actor_rollout_ref.actor.strategy
    if engine != "dp" or strategy not in ("fsdp", "fsdp2"):
        raise ConfigError(
            f"model_engine={engine} with strategy={strategy} is no FSDP, and a CPU runs nothing else; the dry run would show nothing of it."
        )
