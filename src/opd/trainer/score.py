"""Texts that somebody else wrote, token by token as a student and a teacher see them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from opd.config import Config
from opd.data.rendering import Renderer
from opd.errors import DataError
from opd.losses import Objective
from opd.models import context_length
from opd.reporting.about import About
from opd.reporting.files import SAMPLES_FILE
from opd.reporting.loading import Loading
from opd.reporting.record import RunRecorder, SampleRecord, read_samples
from opd.reporting.report import render_report
from opd.trainer.details import ViewCollector, teacher_names
from opd.trainer.evaluate import metrics_by_rollout, token_metrics
from opd.trainer.from_config import RunComponents
from opd.trainer.guardrails import memory_advice
from opd.trainer.launch import Launch, about_run
from opd.trainer.measure import ready
from opd.trainer.records import sample_record
from opd.types import Prompt, Rollout


@dataclass(frozen=True, kw_only=True)
class ScoredTexts:
    """What both models say of some texts."""

    samples: Sequence[SampleRecord]
    lines: bytes
    """The same as lines of a samples.jsonl."""
    about: About


def score(config: Config, rows: Sequence[object], *, checkpoint: Path | None, loading: Loading) -> ScoredTexts:
    """Score the response of every row: log-probs, KL, entropies and likeliest tokens of both models. A row's key `opd_text` says that its
    prompt and response are one text, which no EOS ends. Raises OpdError as a run would, and DataError for a text beyond the context."""
    parts = ready(config, checkpoint, loading, rows=rows)
    evaluator = parts.evaluator
    assert evaluator is not None
    rollouts = [_rollout(prompt, i, parts.renderer, parts.loaded.eos) for i, prompt in enumerate(evaluator.prompts)]
    _check_context(rollouts, parts)
    loading.begin(f"scoring {len(rollouts):,} texts")
    with memory_advice("eval"):
        samples = _samples(rollouts, parts)
    with tempfile.TemporaryDirectory() as folder:  # the recorder is what knows the form of a line
        with RunRecorder(folder, resume_step=None) as run:
            for sample in samples:
                run.sample(sample)
        lines = (Path(folder) / SAMPLES_FILE).read_bytes()
        samples = read_samples(folder)
    return ScoredTexts(
        samples=samples, lines=lines, about=replace(about_run(config, Launch()), data=config.prompts.path)
    )


def page(scored: ScoredTexts, title: str) -> str:
    """The token viewer of the texts as one HTML page."""
    return render_report(title=title, metrics=(), samples=scored.samples, about=scored.about, remarks=())


def _rollout(prompt: Prompt, number: int, renderer: Renderer, eos: Sequence[int]) -> Rollout:
    """The row as a response that is whole."""
    if prompt.response is None:
        raise DataError(
            f"row {prompt.index} has no response, so there is nothing to score. Give rows of prompt and response, messages that end with "
            "the assistant's, or rows of text."
        )
    if "opd_text" in prompt.metadata:
        ids, finished = renderer.response_ids(prompt.response, finished=False), False
    else:
        ids, finished = renderer.reference_ids(prompt, eos), True
    if not ids:
        raise DataError(f"row {prompt.index} has an empty response, so there is nothing to score; remove the row.")
    return Rollout(
        prompt=prompt,
        prompt_ids=renderer.prompt_ids(prompt),
        response_ids=tuple(ids),
        sampler_logp=None,
        finished=finished,
        policy_version=-1,
        source="dataset",
        text=renderer.decode(ids),
        id=number,
        group=number,
    )


def _check_context(rollouts: Sequence[Rollout], parts: RunComponents) -> None:
    limits = [context_length(one.model) for one in (parts.loaded, *parts.teachers.loaded.values())]
    limit = min((limit for limit in limits if limit is not None), default=None)
    for rollout in rollouts:
        length = len(rollout.prompt_ids) + len(rollout.response_ids)
        if limit is not None and length > limit:
            raise DataError(
                f"row {rollout.prompt.index} has {length:,} tokens, prompt and response together, and the models read {limit:,}. Shorten it."
            )


def _samples(rollouts: Sequence[Rollout], parts: RunComponents) -> list[SampleRecord]:
    teacher, evaluator = parts.teacher, parts.evaluator
    assert teacher is not None and evaluator is not None
    exact, objective = teacher.exact_kind, Objective(teacher_logp_floor=evaluator.teacher_logp_floor)
    if exact is None:  # a server that sends log-probs of some tokens
        objective = parts.config.objective
    kind = exact or parts.teachers.kind
    assert kind is not None
    watch = ViewCollector(rollouts)
    metrics = token_metrics(
        rollouts,
        parts.student,
        teacher,
        kind,
        objective,
        watch,
        layout=evaluator.layout,
        tokens_per_microbatch=evaluator.tokens_per_microbatch,
        pad_id=evaluator.pad_id,
    )
    nats, names = metrics_by_rollout(metrics, "reverse_kl", rollouts), teacher_names(teacher, rollouts)
    return [
        sample_record(0, "eval", "student", one, kl, None, parts.renderer, watch.found.get(one.id), names.get(one.id))
        for one, kl in zip(rollouts, nats, strict=True)
    ]
