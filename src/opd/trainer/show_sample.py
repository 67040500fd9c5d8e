"""One sampled answer in the terminal, every few steps."""

from __future__ import annotations

from collections.abc import Sequence

from opd.data.rendering import Renderer
from opd.reporting.progress import Progress
from opd.types import LossOutput, Rollout


def show_sample(
    progress: Progress,
    step: int,
    rollouts: Sequence[Rollout],
    out: LossOutput,
    rewards: Sequence[float] | None,
    renderer: Renderer,
) -> None:
    """Show the first rollout of a step, whose prompts were shuffled: prompt and answer with their special tokens, reward, mean
    reverse KL."""
    if not rollouts:
        return
    rollout = rollouts[0]
    facts = [f"step {step + 1}: one of {len(rollouts):,} sampled answers"]
    facts += [] if rewards is None else [f"reward {rewards[0]:g}"]
    kl = next((values for one, values in out.per_token if one.id == rollout.id), None)
    facts += [f"mean KL {values.mean().item():.3g} nats" for values in [kl] if values is not None and values.numel()]
    facts += [f"{len(rollout.response_ids):,} tokens" + ("" if rollout.finished else ", cut off")]
    prompt, answer = renderer.decode_all(rollout.prompt_ids), renderer.decode_all(rollout.response_ids)
    progress.sample(" · ".join(facts), prompt, answer)
