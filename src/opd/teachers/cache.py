"""A teacher that keeps what it says: a response that it has scored before costs no forward pass, in this run or another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, cast

import torch

from opd.errors import ConfigError, ObjectiveError, OpdError
from opd.teachers.base import Teacher
from opd.teachers.store import Entry, TensorStore, content_key
from opd.teachers.vocabulary import VocabularyMatch
from opd.types import AnyTarget, Head, HiddenTarget, Prompt, Rollout, SampledTarget, TargetKind, TopKTarget

if TYPE_CHECKING:
    from torch import Tensor

    from opd.losses import Objective

SCORING = 1
"""Version of how ids become targets; another one reads nothing that this one has kept."""
LOGIT_BYTES = 4
OF_A_KEPT_TEACHER = ("fingerprint", "top_k", "head", "prompt_ids")


class KeptTeacher(Teacher, Protocol):
    """A teacher whose targets can be kept: it also says what they depend on."""

    @property
    def fingerprint(self) -> str:
        """A text that differs whenever its answers to the same token ids would."""
        ...

    @property
    def top_k(self) -> int:
        """Log-probs per position of its top-k targets."""
        ...

    @property
    def head(self) -> Head | None:
        """Its output layer, to which hidden targets refer; None where it supplies none."""
        ...

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt as it reads it."""
        ...


class CachedTeacher:
    """Hidden states, top-k and sampled log-probs are kept by what they depend on: the teacher's weights, the prompt as the teacher
    reads it, the response, the kind of target and k, and the common vocabulary. Whole logits are not kept.

    Responses that are not there are scored in one call, in their order, so that a call in which none is there is the teacher's own, bit
    for bit. A response has one target from then on, whatever it is scored beside, where the last bits of a batched product differ.
    """

    def __init__(self, teacher: Teacher, store: TensorStore) -> None:
        """Raises ConfigError for a teacher that does not say what its targets depend on."""
        missing = [name for name in OF_A_KEPT_TEACHER if not (hasattr(type(teacher), name) or hasattr(teacher, name))]
        if missing:
            raise ConfigError(
                f"teacher.cache keeps what {teacher.name} says, and a {type(teacher).__name__} does not tell when that changes: it has no "
                f"{', '.join(missing)}, see opd.teachers.cache.KeptTeacher. Add them to it, or drop teacher.cache."
            )
        self.teacher = cast("KeptTeacher", teacher)
        self.store = store
        self.hits = 0
        """Responses whose target was there."""
        self.misses = 0
        """Responses that the teacher scored."""

    @property
    def name(self) -> str:
        return self.teacher.name

    @property
    def supplies(self) -> frozenset[TargetKind]:
        return self.teacher.supplies

    @property
    def exact_kind(self) -> TargetKind | None:
        return self.teacher.exact_kind

    @property
    def vocabulary(self) -> VocabularyMatch:
        return self.teacher.vocabulary

    @property
    def rows(self) -> int:
        return self.teacher.rows

    def bind_objective(self, objective: Objective) -> TargetKind:
        """As the teacher itself. Raises ObjectiveError also where that takes whole logits, which are too large to be kept."""
        kind = self.teacher.bind_objective(objective)
        if kind == "dense":
            token = LOGIT_BYTES * self.vocabulary.size
            raise ObjectiveError(
                f"teacher.cache does not keep whole logits, which is what {self.name} hands out for this objective: {token:,} bytes for "
                "every token of a response. Use objective.support=teacher_top_k (with a tail), or drop teacher.cache."
            )
        return kind

    def groups(self, rollouts: Sequence[Rollout]) -> Mapping[str, Sequence[int]]:
        return self.teacher.groups(rollouts)

    def logits(self, target: HiddenTarget) -> Tensor:
        return self.teacher.logits(target)

    def context(self) -> AbstractContextManager[None]:
        return self.teacher.context()

    def score(self, rollouts: Sequence[Rollout], kind: TargetKind) -> Sequence[AnyTarget]:
        """One target per rollout, in order. Raises CacheError for a kept one that is damaged."""
        if kind == "dense":
            return self.teacher.score(rollouts, kind)
        self.store.refresh()
        keys = [self.key(rollout, kind) for rollout in rollouts]
        targets: dict[str, AnyTarget] = {}
        for key, rollout in zip(keys, rollouts, strict=True):
            kept = None if key in targets else self.store.get(key)
            if kept is not None:
                targets[key] = self._target(kind, kept, len(rollout.response_ids))
        missing = [i for i, key in enumerate(keys) if key not in targets]
        if missing:
            targets |= self._scored([rollouts[i] for i in missing], [keys[i] for i in missing], kind)
        self.misses += len(missing)
        self.hits += len(rollouts) - len(missing)
        return [targets[key] for key in keys]

    def key(self, rollout: Rollout, kind: TargetKind) -> str:
        """The hash of everything that this target depends on."""
        about = {
            "scoring": SCORING,
            "teacher": self.teacher.fingerprint,
            "kind": kind,
            "top_k": self.teacher.top_k if kind == "top_k" else 0,
            "vocabulary": self.vocabulary.size,
        }
        return content_key(
            about, self.vocabulary.invalid_ids, self.teacher.prompt_ids(rollout.prompt), rollout.response_ids
        )

    def _scored(self, rollouts: Sequence[Rollout], keys: Sequence[str], kind: TargetKind) -> dict[str, AnyTarget]:
        """What the teacher says, by key, the first of equal ones; and it is kept."""
        scored = self.teacher.score(rollouts, kind)
        if len(scored) != len(rollouts):
            raise OpdError(
                f"{type(self.teacher).__name__}.score returned {len(scored)} targets for {len(rollouts)} rollouts; it has to return one "
                "each, in order."
            )
        targets: dict[str, AnyTarget] = {}
        entries: dict[str, Entry] = {}
        for key, target in zip(keys, scored, strict=True):
            if key not in targets:
                targets[key] = _on_cpu(target)
                tensors = _tensors(target)
                if target.kind == kind and not any(bool(t.isnan().any()) for t in tensors.values()):
                    entries[key] = tensors
        self.store.put(entries, {"teacher": self.name, "fingerprint": self.teacher.fingerprint, "kind": kind})
        return targets

    def _target(self, kind: TargetKind, kept: Entry, length: int) -> AnyTarget:
        assert all(len(tensor) == length for tensor in kept.values()), "the key holds the response"
        if kind == "hidden":
            head = self.teacher.head
            assert head is not None
            return HiddenTarget(hidden=kept["hidden"].to(head.weight.device), head=head)
        if kind == "sampled":
            return SampledTarget(teacher_logp=kept["teacher_logp"])
        return TopKTarget(
            ids=kept["ids"].long(), teacher_logp=kept["teacher_logp"], sampled_logp=kept.get("sampled_logp")
        )


class KeptScores:
    """What the caches of a run did."""

    def __init__(self, caches: Sequence[CachedTeacher]) -> None:
        self._caches = tuple(caches)
        self._stores = tuple({id(cache.store): cache.store for cache in caches}.values())
        self._taken = (0, 0)
        self._said: set[int] = set()

    def take(self) -> dict[str, float]:
        """Hits and misses since this was last called, as metrics of a step."""
        before, self._taken = self._taken, self._counts()
        hits, misses = (now - then for now, then in zip(self._taken, before, strict=True))
        return {"teacher/cache_hits": float(hits), "teacher/cache_misses": float(misses)}

    def failures(self) -> list[str]:
        """A warning, said once, for every folder that is no longer written to."""
        failed = [store for store in self._stores if store.unwritten and id(store) not in self._said]
        self._said |= {id(store) for store in failed}
        return [
            f"the teacher's scores are no longer kept in '{store.folder}': {store.unwritten}. The run goes on without; what is there "
            "already is still read."
            for store in failed
        ]

    def close(self) -> list[str]:
        """Write what makes the next start quick, and return what to say of the folders at the end."""
        hits, misses = self._counts()
        for store in self._stores:
            store.close()
        lines = [f"warning: {failure}" for failure in self.failures()]
        for store in self._stores:
            lines.append(f"teacher.cache '{store.folder}': {len(store):,} scored responses in {_shown(store.size)}")
        return [*lines, f"the teacher scored {misses:,} responses, and {hits:,} were kept from before"]

    def _counts(self) -> tuple[int, int]:
        return sum(cache.hits for cache in self._caches), sum(cache.misses for cache in self._caches)


def _shown(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _tensors(target: AnyTarget) -> dict[str, torch.Tensor]:
    """What of a target is kept."""
    if isinstance(target, HiddenTarget):
        return {"hidden": target.hidden}
    if isinstance(target, SampledTarget):
        return {"teacher_logp": target.teacher_logp}
    if isinstance(target, TopKTarget):
        tensors = {"ids": target.ids.int(), "teacher_logp": target.teacher_logp}
        return tensors if target.sampled_logp is None else {**tensors, "sampled_logp": target.sampled_logp}
    return {}


def _on_cpu(target: AnyTarget) -> AnyTarget:
    """Beside kept ones, which are there; hidden states are where the head is."""
    if isinstance(target, SampledTarget):
        return SampledTarget(teacher_logp=target.teacher_logp.cpu())
    if isinstance(target, TopKTarget):
        sampled = None if target.sampled_logp is None else target.sampled_logp.cpu()
        return TopKTarget(ids=target.ids.cpu(), teacher_logp=target.teacher_logp.cpu(), sampled_logp=sampled)
    return target
