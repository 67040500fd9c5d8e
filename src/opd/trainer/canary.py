"""The rule guard.canary: a teacher gives a fixed text the log-probs of the start of the run, or the run hears of it before an update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from torch import Tensor

from opd.config import Config, TeacherConfig
from opd.config.run import teacher_key
from opd.doctor.alignment import SHIFTED, Scores, scoring_kind
from opd.errors import ModelError, OpdError, ServerChangedError
from opd.ranks import ALONE, Ranks
from opd.teachers.base import Teacher
from opd.teachers.cache import CachedTeacher
from opd.teachers.exact_server import ExactServerTeacher
from opd.teachers.local import LocalTeacher, sampled_logp
from opd.teachers.probe import plain_ids
from opd.teachers.server import RemoteTeacher
from opd.trainer.guard_advice import causes
from opd.trainer.guard_readings import Reading
from opd.types import AnyTarget, DenseTarget, HiddenTarget, Prompt, Rollout, SampledTarget, TopKTarget

T = TypeVar("T")
GREEDY = 8  # tokens of the teacher's own answer, where it is surest of itself
SPREAD = 16  # tokens from all over the vocabulary, whose small probabilities show a small change
NEAR_UNIFORM = 0.02  # of ln V: rounding of weights that are all zero, or as good as
FLAT = 1e-3  # nats from −ln V at the start: no model with weights is so even
LEFT_BY_SHIFT = 0.5  # of the distance: a shift by one explains the rest


@dataclass(frozen=True, kw_only=True)
class Said:
    """A teacher's answer about its fixed text."""

    logp: Tensor
    """Log-probs (nats) [tokens]."""
    excess: Mapping[int, float] = field(default_factory=dict[int, float])
    """Nats by which the token before (−1) or after (1) fits a row of its own answer better than the token beside it."""


class TeacherMoved(OpdError):
    """A frozen teacher is no longer what it was; no update was made with its scores."""

    def __init__(self, reading: Reading) -> None:
        facts = reading.facts.removesuffix(".")
        super().__init__(f"{facts}. No update was made with its scores. {causes(reading.causes, 3)}")
        self.reading = reading


class Canary:
    """Looks at every frozen teacher of a run: models in this process and behind servers. Teachers of another class are not looked at,
    since what they would say to a text that nobody sampled is not known."""

    def __init__(
        self, config: Config, members: Mapping[str, Teacher], prompts: Sequence[Prompt], ranks: Ranks = ALONE
    ) -> None:
        """Nothing is asked yet. Every rank looks at its own copy of a teacher, and all hear of the worst."""
        self.ranks = ranks
        self.rule = config.guard.canary
        self._watched: list[_Watched] = []
        self._broken = 0
        for name, member in members.items():
            section = config.all_teachers[name]
            inner = member.teacher if isinstance(member, CachedTeacher) else member
            kind = next((kind for kind in KINDS if isinstance(inner, kind.watches)), None)
            if kind is not None and prompts and section.source in ("model", "adapter_off"):
                prompt = next((one for one in prompts if one.teacher == name), prompts[0])
                room = config.rollout.max_new_tokens
                self._watched.append(kind(member, inner, section, teacher_key(name), prompt, room))

    def scored(self, score: Callable[[], T], step: int) -> tuple[T, Reading | None]:
        """What `score` returns, and what is seen of its teachers after it; None where it was not time to look.

        Raises TeacherMoved where the rule says stop, also in the place of a ServerChangedError from a server that came back as another.
        """
        for one in self._watched:
            one.taken_over()
        if self.rule.action == "off":
            return score(), None
        try:
            found = score()
            reading = self._look(step)
        except ServerChangedError as error:
            if self.rule.action != "stop" or not self.ranks.alone:
                raise  # there are no scores to go on with
            reading = Reading(value=self.rule.threshold, facts=str(error), causes="canary served")
            raise TeacherMoved(reading) from error
        return found, reading

    def _look(self, step: int) -> Reading | None:
        """The worst that is seen of the teachers whose turn it is."""
        seen: list[Reading] = []
        for one in self._watched:
            # A resumed run has the metrics of one that was not stopped.
            quiet = isinstance(one.member, CachedTeacher) or not (one.started or one.in_turn(step))
            if one.due(step) or (self._broken and one.started):
                reading = one.look()
                seen += [] if quiet and reading.value < self.rule.threshold else [reading]
        seen = [reading for found in self.ranks.gather(seen) for reading in found]
        if not seen:
            return None
        worst = max(seen, key=lambda reading: reading.value)
        self._broken = self._broken + 1 if worst.value >= self.rule.threshold else 0
        if self.rule.action == "stop" and self._broken >= self.rule.patience:
            raise TeacherMoved(worst)
        return worst


class _Watched:
    """One teacher, what it said at the start, and when it is looked at again."""

    watches: type = object

    def __init__(
        self, member: Teacher, inner: Teacher, section: TeacherConfig, role: str, prompt: Prompt, room: int
    ) -> None:
        self.member = member
        self.teacher = inner
        self.every = section.canary_every
        self.role = role
        self.prompt = prompt
        self.room = room
        """Tokens that a response may have."""
        self.first: dict[str, Said] = {}
        """By server; "" for a model in this process."""
        self._asked = 0

    @property
    def started(self) -> bool:
        return bool(self.first)

    def taken_over(self) -> None:
        """It is looked at here, and no longer by itself."""

    def due(self, step: int) -> bool:
        """It is its turn, and it has been asked since it was looked at: kept scores need no teacher."""
        if isinstance(self.member, CachedTeacher):
            asked, self._asked = self.member.misses > self._asked, self.member.misses
            if not asked:
                return False
        return self._came_back() or not self.started or self.in_turn(step)

    def in_turn(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def look(self) -> Reading:
        now = self._ask()
        if not self.started:
            self.first = now
            self._check_first()
        readings = [self._judged(server, said) for server, said in now.items()]
        return max(readings, key=lambda reading: reading.value)

    def _came_back(self) -> bool:
        return False

    def _check_first(self) -> None:
        """Raise ModelError where there is nothing that later looks could be compared with."""
        for server, said in self.first.items():
            if bool(said.logp.isfinite().all()):
                continue
            look = (
                "Look at the server's log"
                if server
                else f"opd doctor names a damaged weight; try {self.role}.dtype=float32"
            )
            raise ModelError(
                f"{self._who(server)} gives a fixed text log-probs that are NaN or infinite, before any step of this run, so its weights are "
                f"damaged, or overflow in their dtype. The weights were not changed. {look}."
            )

    def _who(self, server: str) -> str:
        return f"{self.role}.url: {server}" if server else f"the teacher '{self.teacher.name}'"

    def _ask(self) -> dict[str, Said]:
        raise NotImplementedError

    def _judged(self, server: str, now: Said) -> Reading:
        first = self.first.get(server) or next(iter(self.first.values()))
        apart, what = compare(first, now, self.teacher.vocabulary.size - len(self.teacher.vocabulary.invalid_ids))
        moved = f"that are {apart:.3g} nats (mean) from those of the start of the run: {what}"
        if not bool(now.logp.isfinite().all()):
            moved = f"that are not those of the start of the run: {what}"
        facts = f"{self._who(server)} gives a fixed text log-probs {moved}"
        return Reading(value=apart, facts=facts, causes="canary served" if server else "canary")


class _Scored(_Watched):
    """A teacher that scores its own greedy answer to one prompt, and tokens from all over the vocabulary after the same prompt."""

    watches = LocalTeacher
    teacher: LocalTeacher | ExactServerTeacher
    _texts: list[Rollout] | None = None
    _greedy = False

    @torch.no_grad()
    def _ask(self) -> dict[str, Said]:
        self._texts = self._texts or self._fixed()
        return {server: self._said(self._texts, targets) for server, targets in self._targets(self._texts).items()}

    def _targets(self, texts: Sequence[Rollout]) -> Mapping[str, Sequence[AnyTarget]]:
        return {"": self.teacher.score(texts, scoring_kind(self.teacher))}

    def _said(self, texts: Sequence[Rollout], targets: Sequence[AnyTarget]) -> Said:
        logp = [_token_logp(self.teacher, text, target) for text, target in zip(texts, targets, strict=True)]
        scores = Scores(self.teacher, texts[:1], targets[:1]) if self._greedy else None
        excess = {} if scores is None else {shift: scores.excess(shift) for shift in (-1, 1)}
        return Said(logp=torch.cat(logp), excess={s: value for s, value in excess.items() if value is not None})

    def _fixed(self) -> list[Rollout]:
        """Its answer first, where it says which tokens are the likeliest."""
        known = plain_ids(self.teacher.renderer.tokenizer, self.teacher.vocabulary)
        size = min(SPREAD, self.room)
        spread = self._text([known[(2 * place + 1) * len(known) // (2 * size)] for place in range(size)])
        kind, answer = scoring_kind(self.teacher), list[int]()
        self._greedy = kind != "sampled"
        if not self._greedy:
            return [spread]
        with self.teacher.context():
            for _ in range(min(GREEDY, self.room)):
                target = self.teacher.score([self._text([*answer, known[0]])], kind)[0]
                answer.append(_likeliest(self.teacher, target))
        return [self._text(answer), spread]

    def _text(self, response: Sequence[int]) -> Rollout:
        return Rollout(
            prompt=self.prompt,
            prompt_ids=self.teacher.prompt_ids(self.prompt),
            response_ids=tuple(response),
            sampler_logp=None,
            finished=False,
            policy_version=0,
            source="teacher",
        )


class _ScoredByServers(_Scored):
    """The same of every server of a pool that sends hidden states."""

    watches = ExactServerTeacher
    teacher: ExactServerTeacher
    _faults = 0

    def _targets(self, texts: Sequence[Rollout]) -> Mapping[str, Sequence[AnyTarget]]:
        said = self.teacher.score_each(texts, scoring_kind(self.teacher))
        return {str(server): targets for server, targets in said.items()}

    def _came_back(self) -> bool:
        before, self._faults = self._faults, self.teacher.pool.faults
        return before != self._faults


class _Probed(_Watched):
    """A teacher behind an inference server, which has a fixed text of its own."""

    watches = RemoteTeacher
    teacher: RemoteTeacher
    _faults = 0

    @property
    def started(self) -> bool:
        """It was asked when it was connected."""
        return self.teacher.probe is not None

    def taken_over(self) -> None:
        self.teacher.canary_every = 0

    def look(self) -> Reading:
        if self.teacher.probe is None:
            self.teacher.connect()
        assert self.teacher.probe is not None and self.teacher.probe.first is not None
        self.first = {"": Said(logp=self.teacher.probe.first.sampled_logp)}
        return super().look()

    def _ask(self) -> dict[str, Said]:
        assert self.teacher.probe is not None
        return {str(server): Said(logp=logp) for server, logp in self.teacher.probe.now().items()}

    def _came_back(self) -> bool:
        before, self._faults = self._faults, self.teacher.pool.faults
        return before != self._faults


KINDS: tuple[type[_Watched], ...] = (_Scored, _ScoredByServers, _Probed)


def compare(first: Said, now: Said, vocabulary: int) -> tuple[float, str]:
    """How far (mean nats) a teacher's log-probs are from those of the start, and the likeliest reason in words. `vocabulary` is how
    many ids it may give a probability. One that says nothing is as far away as a uniform one can be."""
    guess = -math.log(vocabulary)
    if not bool(now.logp.isfinite().all()):
        return max(1.0, -guess), "they are NaN or infinite"
    apart = float((now.logp - first.logp).abs().mean())
    even = float((now.logp - guess).abs().max())
    if even <= FLAT:  # of the first answer too
        return max(apart, 1.0, -guess), f"every token has the same, −ln V = {guess:.3g}, as without weights"
    if even <= -NEAR_UNIFORM * guess:
        return apart, f"they are near −ln V = {guess:.3g}, as without weights"
    if _shifted(first, now, apart):
        return apart, "each token has what belongs to its neighbour, so they are shifted by one"
    if float(now.logp.mean()) < guess:
        return apart, f"they are below −ln V = {guess:.3g}, as with random weights or another tokenizer"
    return apart, "they come from other weights"


def _shifted(first: Said, now: Said, apart: float) -> bool:
    if any(value > SHIFTED and value > first.excess.get(shift, 0.0) + SHIFTED for shift, value in now.excess.items()):
        return True
    pairs = ((now.logp[1:], first.logp[:-1]), (now.logp[:-1], first.logp[1:]))
    return any(len(one) > 1 and float((one - two).abs().mean()) < LEFT_BY_SHIFT * apart for one, two in pairs)


def _token_logp(teacher: LocalTeacher | ExactServerTeacher, text: Rollout, target: AnyTarget) -> Tensor:
    """Log-probs (nats) of the text's tokens, on the CPU."""
    ids = torch.tensor(text.response_ids)
    if isinstance(target, HiddenTarget | DenseTarget):
        return sampled_logp(target, ids, teacher.vocabulary).float()
    found = target.sampled_logp if isinstance(target, TopKTarget) else cast("SampledTarget", target).teacher_logp
    assert found is not None
    return found.float().cpu()


def _likeliest(teacher: LocalTeacher | ExactServerTeacher, target: AnyTarget) -> int:
    """The token that the last row finds likeliest."""
    if isinstance(target, HiddenTarget):
        target = DenseTarget(logits=teacher.logits(target))
    if isinstance(target, DenseTarget):
        return int(target.logits[-1].argmax())
    assert isinstance(target, TopKTarget)
    return int(target.ids[-1, 0])
