"""A teacher in verl's own servers: their log-probs come with the micro-batch, and opd's losses are computed from them.

verl asks its vLLM or SGLang servers for `prompt_logprobs` while rollouts still run. Row t of `teacher_ids` and
`teacher_logprobs` is about the token after t, at temperature 1: its top_k likeliest tokens, or with support=sampled that
very token. The last row of a sequence is a dummy, and no response token reads it.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from verl.trainer.distillation.losses import distillation_ppo_loss
from verl.utils.fs import copy_to_local
from verl.workers.utils.losses import ppo_loss

from opd.errors import ConfigError, ModelError, NonFiniteError
from opd.integrations.verl.plugin.alignment import ResponseTokens
from opd.integrations.verl.plugin.model_checks import common_vocabulary, read_model
from opd.integrations.verl.plugin.settings import Settings, TeacherSettings
from opd.integrations.verl.plugin.teachers.base import TargetSlice
from opd.losses._shapes import Float, Int
from opd.losses.partial import support_of
from opd.teachers.vocabulary import VocabularyMatch
from opd.types import SampledTarget, TopKTarget

FIELDS = ("teacher_ids", "teacher_logprobs")
"""verl's names in a micro-batch: jagged over sequences, [tokens, k] without padding."""
MASS_ROUNDING = 1e-2
"""By how much probabilities of bf16 servers may add up to more than 1."""


class ServedLogProbs:
    """Reads the scores that came with the micro-batch: no forward pass, no memory."""

    def __init__(self, settings: Settings, engine: Any) -> None:
        (self.teacher,) = settings.all_teachers.values()
        self.objective = settings.objective
        self.vocabulary = vocabulary_of(self.teacher, engine)
        self.rows = rows_of(self.teacher)

    def prepare(
        self, _inputs: Mapping[str, Any], micro_batch: Any, tokens: ResponseTokens
    ) -> AbstractContextManager[Sequence[TargetSlice]]:
        """The target of the response tokens. Raises an OpdError for scores that no teacher gives."""
        name, sampled = self.teacher.model, self.objective.support == "sampled"
        ids, teacher_logp = sent(micro_batch, tokens)
        asked = 1 if sampled else self.objective.top_k
        if ids.shape[-1] != asked:
            raise ModelError(
                f"teacher '{name}' sent {ids.shape[-1]} log-probs per token, and opd asked for {asked}; start with +opd=pool, which sets "
                "what verl's servers are asked for."
            )
        teacher_logp = teacher_logp.float()
        refuse_nonsense(ids, teacher_logp, name)
        if not sampled:
            return nullcontext([TargetSlice(target=in_vocabulary(ids, teacher_logp, self.vocabulary))])
        refuse_other_tokens(ids, tokens, name)
        return nullcontext([TargetSlice(target=SampledTarget(teacher_logp=teacher_logp[:, 0]))])

    def offload(self) -> None:
        """Nothing: the teacher is in the server."""


def vocabulary_of(teacher: TeacherSettings, engine: Any) -> VocabularyMatch:
    """The token ids that verl's student and a teacher in a server have in common, from the teacher's config and tokenizer."""
    model = read_model(copy_to_local(teacher.model), teacher.trust_remote_code, "opd.teacher.model")
    return common_vocabulary(engine.model_config, replace(model, path=teacher.model))


def rows_of(teacher: TeacherSettings) -> int:
    """The number of ids that a teacher in a server has an embedding for, from its config."""
    config = AutoConfig.from_pretrained(copy_to_local(teacher.model), trust_remote_code=teacher.trust_remote_code)
    return config.get_text_config().vocab_size


def sent(micro_batch: Any, tokens: ResponseTokens) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
    """Token ids and scores of the response tokens, as a server sent them."""
    missing = [name for name in FIELDS if name not in micro_batch]
    if missing:
        raise ConfigError(
            f"the micro-batch has no {' and no '.join(missing)}: verl asked no teacher server. Start with +opd=pool, which sets "
            "distillation.enabled=true."
        )
    ids, scores = (micro_batch[name].values().index_select(0, tokens.packed_index) for name in FIELDS)
    return ids.long(), scores


def refuse_other_tokens(ids: Int[Tensor, "tokens 1"], tokens: ResponseTokens, name: str) -> None:
    """Raise where the server's own word for what it scored is not what was sampled."""
    wrong = ids[:, 0] != tokens.ids
    if bool(wrong.any()):
        raise ModelError(
            f"teacher '{name}' scored other tokens than were sampled, at {int(wrong.sum())} of {len(ids)} response tokens: its server "
            "shifts or changes what it is sent. No update was made."
        )


def in_vocabulary(
    ids: Int[Tensor, "tokens k"], teacher_logp: Float[Tensor, "tokens k"], vocabulary: VocabularyMatch
) -> TopKTarget:
    """The target on tokens that the student has. What the teacher gave to others is shared out, as where their logits are −inf."""
    unknown = ids >= vocabulary.size
    if vocabulary.invalid_ids:
        unknown |= torch.isin(ids, torch.tensor(vocabulary.invalid_ids, device=ids.device))
    lost = torch.where(unknown, teacher_logp.exp(), 0.0).sum(-1, keepdim=True)
    if bool(unknown.all(-1).any()):
        raise ModelError(
            "all tokens that the teacher finds likely at some position are unknown to the student; raise opd.objective.top_k, or use a teacher of "
            "the student's vocabulary."
        )
    rest = torch.log1p(-lost.clamp_max(1 - torch.finfo(lost.dtype).eps))
    kept = torch.where(unknown, -torch.inf, teacher_logp - rest)
    likeliest_first = kept.sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, likeliest_first.indices)
    # A repeated token counts once, where it stands first: so the places of unknown tokens are filled and say nothing.
    return TopKTarget(
        ids=torch.where(likeliest_first.values == -torch.inf, ids[:, :1], ids), teacher_logp=likeliest_first.values
    )


def refuse_nonsense(ids: Int[Tensor, "tokens k"], teacher_logp: Float[Tensor, "tokens k"], name: str) -> None:
    """Raise for NaN and for probabilities above 1, in every micro-batch; `sanity_check` looks at the rest."""
    if not ids.numel():
        return
    bad = (teacher_logp.isnan() | (teacher_logp == torch.inf)).any(-1)
    if bool(bad.any()):
        raise NonFiniteError(
            f"teacher '{name}' sent NaN or infinite log-probs at {int(bad.sum())} of {len(bad)} response tokens; no update was made. "
            "Look at its server's dtype (distillation.teacher_models.teacher_model.inference.dtype)."
        )
    mass = support_of(ids).mask(teacher_logp).exp().sum(-1)
    if float(mass.max()) > 1 + MASS_ROUNDING:
        raise ModelError(
            f"teacher '{name}' sent probabilities that add up to {float(mass.max()):.3g} at one position; no update was made. Its server "
            "must send log-probs over the whole vocabulary at temperature 1 (vLLM: logprobs_mode=raw_logprobs)."
        )


def policy_loss(loss_function: Callable[..., Any]) -> Callable[..., Any]:
    """verl's loss without its distillation, which it binds in whenever its teacher servers run."""
    if isinstance(loss_function, partial) and loss_function.func is distillation_ppo_loss:
        return partial(ppo_loss, config=loss_function.keywords["config"])
    return loss_function
