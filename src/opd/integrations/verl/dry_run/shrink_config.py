"""What of a user's verl config has to give way on a laptop, as overrides that come after the user's own."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from opd.errors import ConfigError, DataError
from opd.integrations.verl.dry_run.compose import leaves
from opd.integrations.verl.dry_run.overrides import ACTOR, MODEL, REF, ROLLOUT, Replaced, has_critic
from opd.integrations.verl.dry_run.sizes import put_sizes
from opd.integrations.verl.dry_run.tiny_models import DATA_SOURCE, REWARD, Asked, StandIn, make_prompts

ROWS = 64
"""Of a data file."""
EXTERNAL_LIB = "opd_smoke_libraries"

OFF = {
    "trainer.nnodes": 1,
    "trainer.save_freq": -1,
    "trainer.test_freq": -1,
    "trainer.val_before_train": False,
    "trainer.val_only": False,
    "trainer.resume_mode": "disable",
    "trainer.rollout_data_dir": None,
    "trainer.validation_data_dir": None,
    "trainer.default_hdfs_dir": None,
    "trainer.log_val_generations": 0,
    "trainer.critic_warmup": 0,
    "trainer.logger": ["console", "file"],
    "algorithm.filter_groups.enable": False,
    "global_profiler.tool": None,
    "transfer_queue.backend.storage_backend": "SimpleStorage",
    "data.filter_overlong_prompts": False,
    "data.use_shm": False,
    "reward.reward_model.enable": False,
    "reward_model.enable": None,
    "opd.trace": None,
    "opd.teacher.offload": False,
    f"{MODEL}.use_shm": False,
    f"{MODEL}.use_liger": False,
    f"{MODEL}.use_fused_kernels": False,
    f"{MODEL}.enable_activation_offload": False,
    f"{MODEL}.lora_adapter_path": None,
    f"{MODEL}.mtp.enable": False,
    f"{ACTOR}.profiler.enable": False,
    f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size": 1,
    f"{ACTOR}.ulysses_sequence_parallel_size": 1,
    f"{REF}.ulysses_sequence_parallel_size": 1,
    f"{ROLLOUT}.data_parallel_size": 1,
    f"{ROLLOUT}.pipeline_model_parallel_size": 1,
    f"{ROLLOUT}.expert_parallel_size": 1,
    f"{ROLLOUT}.nnodes": 0,
    f"{ROLLOUT}.max_model_len": None,
    f"{ROLLOUT}.enable_rollout_routing_replay": False,
    f"{ROLLOUT}.quantization": None,
    "actor_rollout_ref.hybrid_engine": True,
}
"""What a dry run leaves out, or a CPU cannot do. A key that the config lacks stays out of it."""
CRITIC = "critic"
TEACHERS = "distillation.teacher_models"
SERVERS = ("vllm", "sglang", "trtllm")
OFFLOADS = ("param_offload", "optimizer_offload", "offload_policy")
ENGINES = (f"{ACTOR}.fsdp_config", f"{REF}.fsdp_config")


def asked_models(config: DictConfig) -> list[Asked]:
    """The models that the config names and the run would load: the student first, then its teachers, then the critic."""
    found = [_asked(config, "student", f"{MODEL}.path")]
    for key, value in leaves(config.get("opd") or OmegaConf.create({}), "opd."):
        section, _, name = key.rpartition(".")
        if name == "model" and value:
            found.append(_asked(config, "teacher" + section.removeprefix("opd.teacher").replace("s.", " "), key))
    for name in _pool(config):
        if not OmegaConf.is_interpolation(config.distillation.teacher_models[name], "model_path"):
            found.append(_asked(config, f"teacher {name}", f"{TEACHERS}.{name}.model_path"))
    if has_critic(config):
        found.append(_asked(config, CRITIC, "critic.model.path"))
    return found


def _pool(config: DictConfig) -> list[str]:
    """The teachers that verl's own servers would hold."""
    if not OmegaConf.select(config, "distillation.enabled"):
        return []
    return [str(name) for name, one in config.distillation.teacher_models.items() if one.get("model_path")]


def _asked(config: DictConfig, role: str, key: str) -> Asked:
    node = OmegaConf.select(config, key.rpartition(".")[0])
    own = {
        name: node.get(old) for name, old in (("config_path", "hf_config_path"), ("tokenizer_path", "tokenizer_path"))
    }
    return Asked(
        role=role,
        key=key,
        path=str(OmegaConf.select(config, key)),
        trust_remote_code=bool(node.get("trust_remote_code")),
        **own,
    )


def model_overrides(models: Sequence[StandIn]) -> dict[str, Any]:
    """The paths of the stand-ins in place of the user's."""
    values: dict[str, Any] = {}
    for model in models:
        values[model.asked.key] = model.folder
        section = model.asked.key.rpartition(".")[0]
        values |= {
            f"{section}.{name}": None
            for name, own in (
                ("hf_config_path", model.asked.config_path),
                ("tokenizer_path", model.asked.tokenizer_path),
            )
            if own is not None
        }
    return values


def replace(config: DictConfig, models: Sequence[StandIn], *, folder: Path, steps: int) -> Replaced:
    """Everything that gives way. `folder` takes the files that are made up."""
    done = Replaced(config)
    for model in models:
        if model.asked.role != CRITIC:
            done.rows.append((model.asked.role, model.asked.path, model.told))
    done.values |= model_overrides(models)
    _data(done, folder)
    _reward(done, folder)
    put_sizes(done)
    _machine(done, folder)
    for key, value in OFF.items():
        if done.has(key):
            done.put(key, value)
    done.put("trainer.total_training_steps", steps)
    done.put("trainer.total_epochs", steps)  # an epoch has a step at the least
    done.put("trainer.default_local_dir", str(folder / "checkpoints"))
    return done


def _machine(done: Replaced, folder: Path) -> None:
    text = files("opd.integrations.verl.plugin.conf").joinpath("opd_device/cpu.yaml").read_text(encoding="utf-8")
    for key, value in leaves(OmegaConf.create(yaml.safe_load(text))):
        done.put(key, value)
    own, ours = done.get(f"{MODEL}.external_lib"), done.values[f"{MODEL}.external_lib"]
    if own not in (None, ours):
        lines = [f"import {name}\n" for name in (own if OmegaConf.is_list(own) else [own])]
        (folder / f"{EXTERNAL_LIB}.py").write_text(f"{''.join(lines)}import {ours}\n", encoding="utf-8")
        done.put(f"{MODEL}.external_lib", EXTERNAL_LIB)
    if has_critic(done.config):
        done.put("critic.enable", False)
        done.put("algorithm.adv_estimator", "grpo")
        done.rows.append(
            ("critic", "on", "left out: verl loads value models with FlashAttention alone; advantages are grpo's")
        )
    for engine in ENGINES:
        done.values |= {f"{engine}.{name}": False for name in OFFLOADS}
    for key, value in leaves(done.config.get("opd") or OmegaConf.create({}), "opd."):
        if key.endswith(".attn_implementation") and value is not None:
            done.put(key, "sdpa")
        if key.endswith(".offload") and value:
            done.put(key, False)
    if done.get(f"{MODEL}.lora_rank") or done.get(f"{MODEL}.lora.rank"):
        done.put(f"{MODEL}.lora.merge", True)  # the only weights of an adapter that the rollout here takes
    _put_pool(done)
    mode = done.get("trainer.v1.trainer_mode")
    if mode in ("colocate_async", "separate_async"):
        done.put("trainer.v1.trainer_mode", "sync")
        done.rows.append(("trainer", str(mode), "sync"))
    gpus = f"{done.get('trainer.nnodes')} × {done.get('trainer.n_gpus_per_node')} × {done.get('trainer.device')}"
    done.rows.append(("machine", gpus, "one process on the CPU, float32"))
    done.rows.append(("rollout", str(done.get(f"{ROLLOUT}.name")), "transformers"))


def _put_pool(done: Replaced) -> None:
    """One server for each teacher, on a GPU that Ray is told of."""
    names = _pool(done.config)
    if not names:
        return
    done.values |= {"distillation.nnodes": 1, "distillation.n_gpus_per_node": len(names)}
    done.put("ray_kwargs.ray_init.num_gpus", 1 + len(names))
    for name in names:
        section = f"{TEACHERS}.{name}"
        if done.get(f"{section}.num_replicas"):
            done.put(f"{section}.num_replicas", 1)
        if done.get(f"{section}.inference.name") in SERVERS:
            done.put(f"{section}.inference.name", "transformers")
        done.put(f"{section}.inference.dtype", "float32")
        done.put(f"{section}.inference.max_model_len", None)
        for key in ("tensor_model_parallel_size", "data_parallel_size", "pipeline_model_parallel_size"):
            done.put(f"{section}.inference.{key}", 1)
        for key in ("prompt_length", "response_length"):
            done.put(f"{section}.inference.{key}", done.values[f"{ROLLOUT}.{key}"])


def _data(done: Replaced, folder: Path) -> None:
    train, rows = _readable(done, "data.train_files")
    if train is None:
        key, sources = _routes(done.config)
        made = make_prompts(
            folder / "prompts.parquet",
            prompt_key=done.get("data.prompt_key"),
            source_key=key,
            sources=sources,
            rows=ROWS,
        )
        train = [str(made)]
        here = "not on this machine: made-up sums"
    else:
        least = done.get("data.train_batch_size")
        if rows is not None and rows < least:
            raise DataError(
                f"data.train_files hold {rows} prompts, fewer than data.train_batch_size={least}: verl would not start a step. Give more "
                "prompts, or a smaller batch."
            )
        here = f"{ROWS} of {rows} prompts" if rows is not None and rows > ROWS else "the same"
    val, _ = _readable(done, "data.val_files")
    done.put("data.train_files", train)
    done.put("data.val_files", val or train)
    for key in ("data.train_max_samples", "data.val_max_samples"):
        own = done.get(key)
        done.put(key, min(own, ROWS) if own is not None and own > 0 else ROWS)
    done.rows.append(("prompts", _listed(done.get("data.train_files")), here))


def _routes(config: DictConfig) -> tuple[str, list[str]]:
    """The column that says which teacher a sample goes to, and what it may hold."""
    opd = config.get("opd")
    if opd is not None and opd.mixture.kind == "routing":
        return str(opd.prompts.teacher_column), list(opd.teachers)
    pool = _pool(config)
    if len(pool) > 1:
        return str(config.distillation.teacher_key), [str(config.distillation.teacher_models[n].key) for n in pool]
    return "data_source", [DATA_SOURCE]


def _readable(done: Replaced, key: str) -> tuple[list[str] | None, int | None]:
    """The data files that a key names, when all are here, and how many rows they have."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    named = done.get(key)
    named = OmegaConf.to_container(named) if OmegaConf.is_config(named) else named
    paths = [Path(str(one)).expanduser() for one in (named if isinstance(named, list) else [named])]
    if not all(path.is_file() for path in paths):
        return None, None
    rows, column = 0, done.get("data.prompt_key")
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


def _reward(done: Replaced, folder: Path) -> None:
    section = next(
        (s for s in ("custom_reward_function", "reward.custom_reward_function") if done.get(f"{s}.path")), None
    )
    own = None if section is None else str(done.get(f"{section}.path"))
    is_model = bool(done.get("reward.reward_model.enable") or done.get("reward_model.enable"))
    if own is not None and (own.startswith("pkg://") or Path(own.removeprefix("file://")).is_file()):
        done.rows.append(("reward", own, "the same" if not is_model else "the same, without the reward model"))
        return
    if own is None and not is_model and done.values["data.train_files"][0] != str(folder / "prompts.parquet"):
        done.rows.append(("reward", "verl's own, by data_source", "the same"))
        return
    made = folder / "reward.py"
    made.write_text(REWARD, encoding="utf-8")
    if done.get("custom_reward_function.path"):
        done.values |= {"custom_reward_function.path": None, "custom_reward_function.name": None}
    done.values |= {
        "reward.custom_reward_function.path": str(made),
        "reward.custom_reward_function.name": "compute_score",
    }
    if own is None and not is_model:
        done.rows.append(("reward", "verl's own, by data_source", "made-up prompts: the share of digits"))
    else:
        done.rows.append(("reward", own or "a reward model", "not on this machine: the share of digits"))


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if OmegaConf.is_list(value) else str(value)


def check_given(config: DictConfig) -> None:
    """Raise ConfigError for what verl has no default for, or this dry run no substitute."""
    if OmegaConf.is_missing(config.actor_rollout_ref.rollout, "name"):
        raise ConfigError(f"{ROLLOUT}.name is not set, and verl has no default for it; set vllm or sglang.")
    engine = OmegaConf.select(config, "model_engine", default="dp")
    strategy = config.actor_rollout_ref.actor.strategy
    if engine != "dp" or strategy not in ("fsdp", "fsdp2"):
        raise ConfigError(
            f"model_engine={engine} with strategy={strategy} is no FSDP, and a CPU runs nothing else; the dry run would show nothing of it."
        )
