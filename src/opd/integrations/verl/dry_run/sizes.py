"""Batches and lengths: cut down to what a CPU does in seconds, with their ratios kept; and refused where they do not go together."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from opd.errors import ConfigError
from opd.integrations.verl.dry_run.overrides import ACTOR, REF, ROLLOUT, Replaced, has_critic

PROMPTS = 4
"""Per step."""
SAMPLES = 2
"""Per prompt, where the user has more than one: enough for an advantage within a group."""
PROMPT_TOKENS, RESPONSE_TOKENS = 64, 16


def put_sizes(done: Replaced) -> None:
    """As many updates per step and micro-batches per update as the user has, up to two of each."""
    n = done.get(f"{ROLLOUT}.n")
    samples = min(n, SAMPLES)
    batch, world = done.get("data.train_batch_size"), _world(done.config)
    tokens = (done.get("data.max_prompt_length"), done.get("data.max_response_length"))
    length = (min(tokens[0], PROMPT_TOKENS), min(tokens[1], RESPONSE_TOKENS))
    done.put("data.train_batch_size", PROMPTS)
    done.put(f"{ROLLOUT}.n", samples)
    if done.get("data.gen_batch_size") is not None:
        done.put("data.gen_batch_size", min(done.get("data.gen_batch_size"), PROMPTS))
    for section, keys in (
        ("data", ("max_prompt_length", "max_response_length")),
        (ROLLOUT, ("prompt_length", "response_length")),
    ):
        done.values |= {f"{section}.{key}": value for key, value in zip(keys, length, strict=True)}
    told = []
    for section in (ACTOR, "critic") if has_critic(done.config) else (ACTOR,):
        mini = done.get(f"{section}.ppo_mini_batch_size")
        small = PROMPTS if mini >= batch else PROMPTS // 2
        done.put(f"{section}.ppo_mini_batch_size", small)
        micro = _pieces(done, section, "ppo_", mini * n // world, small * samples, sum(tokens), sum(length))
        if done.has(f"{section}.ppo_epochs"):
            done.put(f"{section}.ppo_epochs", min(done.get(f"{section}.ppo_epochs"), 2))
        if section == ACTOR:
            told = [(mini, small), micro]
    whole, here = batch * n // world, PROMPTS * samples
    for section, prefix in ((ROLLOUT, "log_prob_"), (REF, "log_prob_"), ("critic", "forward_")):
        _pieces(done, section, prefix, whole, here, sum(tokens), sum(length))
    _overlong(done)
    done.rows.append(("batch", f"{batch} prompts × {n}", f"{PROMPTS} × {samples}"))
    done.rows.append(("mini-batch", str(told[0][0]), str(told[0][1])))
    if told[1] is not None:
        done.rows.append(("micro-batch", str(told[1][0]), str(told[1][1])))
    done.rows.append(("lengths", " + ".join(map(str, tokens)), " + ".join(map(str, length))))


def _pieces(
    done: Replaced, section: str, prefix: str, whole: int, here: int, tokens: int, length: int
) -> tuple[int, int] | None:
    """Micro-batches of `here` samples where the user has `whole`: two when the user has several, else one."""
    told = None
    for name in ("micro_batch_size_per_gpu", "micro_batch_size"):
        key = f"{section}.{prefix}{name}"
        micro = done.get(key)
        if micro is not None:
            done.put(key, max(1, here // 2) if micro < whole else here)
            told = (micro, done.values[key])
    key = f"{section}.{prefix}max_token_len_per_gpu"
    most = done.get(key)
    if most is not None and done.get("actor_rollout_ref.actor.use_dynamic_bsz"):
        done.put(key, max(length, here * length // 2) if most < whole * tokens else here * length)
    return told


def _overlong(done: Replaced) -> None:
    """DAPO's penalty for long responses is measured in tokens."""
    for section in ("reward.reward_kwargs", "reward_model.reward_kwargs"):
        if done.get(f"{section}.max_resp_len") is not None:
            done.put(f"{section}.max_resp_len", done.values["data.max_response_length"])
        if done.get(f"{section}.overlong_buffer_cfg.len") is not None:
            done.put(f"{section}.overlong_buffer_cfg.len", done.values["data.max_response_length"] // 2)


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
