"""Likely causes of a broken rule of the section guard, the likeliest first, each with the key that changes it."""

from __future__ import annotations

SMALLER_STEPS = "the steps are too large (lower optimizer.lr)"
CUT_RESPONSES = "cut responses teach the student not to end (train.drop=[truncated])"

CAUSES: dict[str, tuple[str, str, str]] = {
    "truncated": (
        "the limit is too low for the task (raise rollout.max_new_tokens)",
        CUT_RESPONSES,
        "responses go on after what was asked for (a new run with rollout.stop)",
    ),
    "truncated later": (
        SMALLER_STEPS,
        CUT_RESPONSES,
        "the student learns to give longer answers, and needs room for them (raise rollout.max_new_tokens)",
    ),
    "repetition": (
        "repeating responses are trained on, and a teacher approves of a loop that has begun (train.drop=[repeating])",
        SMALLER_STEPS,
        "responses have more room than the task needs (lower rollout.max_new_tokens)",
    ),
    "length": (
        CUT_RESPONSES,
        SMALLER_STEPS,
        "long responses have more weight than short ones (a new run with objective.reduction=sequence_mean)",
    ),
    "eos_prob": (
        SMALLER_STEPS,
        CUT_RESPONSES,
        "the teacher ends its responses in another way (a new run with other teacher.chat_template_kwargs or another teacher.model)",
    ),
    "entropy": (
        SMALLER_STEPS,
        "the divergence rewards certainty (a new run with objective.divergence=generalized_jsd)",
        "the reward has no counterweight (a new run with rl.reference_kl, or a smaller rl.weight)",
    ),
    "loss": (
        SMALLER_STEPS,
        "single tokens of no probability dominate (objective.teacher_logp_floor=-30)",
        "single batches have large gradients (lower optimizer.max_grad_norm)",
    ),
    "reward": (
        "the teacher is no better than the student at the task (a new run with another teacher.model)",
        "the reward has too little weight beside the teacher (a new run with a larger rl.weight)",
        "cut responses lose their reward (raise rollout.max_new_tokens)",
    ),
    "clipped": (
        SMALLER_STEPS,
        "the teacher gives the student's tokens no probability (a lower objective.teacher_logp_floor)",
        "samples are older than the weights (a new run with rollout.ahead=0)",
    ),
    "sampler_gap": (
        "the engine computes in lower precision (rollout.vllm.args=[--dtype, float32])",
        "the student itself computes in lower precision (train.autocast=none)",
        "samples are older than the weights (a new run with rollout.ahead=0)",
    ),
    "start_kl": (
        SMALLER_STEPS,
        "the teacher is that far from the student (raise guard.start_kl.threshold)",
        "the reward has no counterweight (a new run with rl.reference_kl, or a smaller rl.weight)",
    ),
    "canary": (
        "something in this process writes to the teacher's weights, such as a callback (give it a copy: a new run with teacher.model)",
        "the teacher is meant to move (a new run with teacher.source=ema, or guard.canary.action=off)",
        "weights were damaged on the way between devices (teacher.offload=false)",
    ),
    "canary served": (
        "the server lost its weights in a sleep, or was started again without them (start it again as it was, at teacher.url)",
        "another model answers at that address or under that name (teacher.url, teacher.served_model)",
        "a server of another kind or version answers (teacher.api)",
    ),
}
"""By the rule, or by what Reading.causes says. A key without "a new run" may change on --resume."""


def causes(name: str, number: int) -> str:
    """A sentence with so many causes of an entry of CAUSES."""
    named = "; ".join(CAUSES[name][:number])
    return f"The likeliest cause: {named}." if number == 1 else f"The likeliest causes: {named}."
