"""A recipe's keys in the words of verl's command line, for advice that the single-machine trainer and the plugin share."""

from __future__ import annotations

import re

MODEL, ACTOR, ROLLOUT = (f"actor_rollout_ref.{name}" for name in ("model", "actor", "rollout"))
WARM_UP = "supervised training on the teacher's answers first"
PHRASES = {
    "rollout.lmbda: 0.5 with rollout.off_policy: teacher, to warm up on teacher samples first": WARM_UP,
    "rollout.lmbda: 0.5 with rollout.off_policy: teacher": WARM_UP,
    "rollout.stop: strings that end an answer": "prompts that ask for short answers",
    "; or rollout.stop": "",
    "teacher.chat_template_kwargs and student.chat_template_kwargs: the same values, unless each format is its model's own": (
        "data.apply_chat_template_kwargs, by which the student's template writes what the teacher was trained with: the teacher reads the "
        "student's prompts here"
    ),
    "a new run with rollout.stop": "a new run with prompts that ask for short answers",
    "train.drop=[truncated]": "raise data.max_response_length",
    "train.drop=[repeating]": "a new run with a larger opd.rl.weight and a reward that counts repetition",
    "a new run with objective.reduction=sequence_mean": f"a new run with {ACTOR}.loss_agg_mode=seq-mean-token-mean",
    "other teacher.chat_template_kwargs": "other data.apply_chat_template_kwargs",
    "a new run with rl.reference_kl": f"a new run with {ACTOR}.use_kl_loss=true",
    "a new run with rollout.ahead=0": "a new run with trainer.v1.trainer_mode=opd_sync",
    "rollout.vllm.args=[--dtype, float32]": f"{ROLLOUT}.dtype=float32",
    "train.autocast=none": f"{ACTOR}.fsdp_config.mixed_precision.param_dtype=fp32",
    "student.chat_template_kwargs": "data.apply_chat_template_kwargs",
    "student.model": f"{MODEL}.path",
    "rollout.max_new_tokens": "data.max_response_length",
    "rollout.temperature": f"{ROLLOUT}.temperature",
    "optimizer.lr": f"{ACTOR}.optim.lr",
    "optimizer.max_grad_norm": f"{ACTOR}.optim.clip_grad",
    "prompts.path": "data.train_files",
    "prompts.prompt_column": "data.prompt_key",
}
"""What a recipe says, and what stands for it in verl; the longest first where one begins another."""
OWN = ("objective.", "teacher.", "teachers.", "mixture.", "rl.weight", "guard.")
"""Keys of the plugin too, with opd. before them."""


def in_verl_words(text: str) -> str:
    """`text` with the keys of verl's command line in place of a recipe's."""
    for phrase in sorted(PHRASES, key=len, reverse=True):
        text = text.replace(phrase, PHRASES[phrase])
    for key in OWN:
        text = _prefixed(text, key)
    return text


def as_override(text: str) -> str:
    """Advice in which `key: value` of a recipe is an override of verl's."""
    text = re.sub(r"\b((?:opd|data|actor_rollout_ref)\.[\w.]+): (?=[\[\d])", r"\1=", in_verl_words(text))
    return re.sub(r"=\[\[[\d, \[\]]*\]\]", lambda found: found[0].replace(" ", ""), text)


def _prefixed(text: str, key: str) -> str:
    """`opd.` before each place where the key begins a word."""
    first, *rest = text.split(key)
    for part in rest:
        begins = not first or not (first[-1].isalnum() or first[-1] in "._'/")
        first += f"{'opd.' if begins else ''}{key}{part}"
    return first
