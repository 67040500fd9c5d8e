"""Batches and lengths of a dry run: cut down for a CPU with their ratios kept, and refused where they do not go together."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from opd.errors import ConfigError
from opd.integrations.verl.dry_run.overrides import ACTOR, REF, ROLLOUT, ConfigOverrides, has_critic

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
    _overlong(changes)
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


def _overlong(changes: ConfigOverrides) -> None:
    """DAPO's penalty for long responses is measured in tokens."""
    for section in ("reward.reward_kwargs", "reward_model.reward_kwargs"):
        if changes.get(f"{section}.max_resp_len") is not None:
            changes.set(f"{section}.max_resp_len", changes.values["data.max_response_length"])
        if changes.get(f"{section}.overlong_buffer_cfg.len") is not None:
            changes.set(f"{section}.overlong_buffer_cfg.len", changes.values["data.max_response_length"] // 2)


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
