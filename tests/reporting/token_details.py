"""Samples with token details, as a run records them: what both models said at each token."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd.reporting import RunRecorder, SampleRecord
from opd.reporting.record import TokenDetails, TopTokens
from reporting.report_inputs import a_sample

OTHERS = (" 42", " 43", " the", "\n", " so", " 7", " and", " is")


def detailed(
    tokens: Sequence[str],
    kl: Sequence[float] | None = None,
    wanted: Sequence[str] | None = None,
    seed: int = 0,
    **changes: Any,
) -> SampleRecord:
    """A sample whose teacher holds `wanted[i]` (default: the token itself) likeliest at token i.

    Where the teacher wants another token, it gives it 0.8 and the sampled one 0.003, to which the student gives 0.4.
    Elsewhere both give the sampled token 0.9.
    """
    chance = random.Random(seed)
    wanted = tokens if wanted is None else wanted
    agreed = [token == other for token, other in zip(tokens, wanted, strict=True)]
    kl = [0.004 if same else 2.5 for same in agreed] if kl is None else kl
    student, teacher = [0.9 if same else 0.4 for same in agreed], [0.9 if same else 0.003 for same in agreed]

    unused = [other for other in OTHERS if other not in tokens]

    def likeliest(first: str, share: float) -> tuple[tuple[str, ...], tuple[float, ...]]:
        others = [other for other in unused if other != first][:4]
        rest = (1 - share) * 0.9
        return (first, *others), (share, *(rest / 2 ** (i + 1) for i in range(len(others))))

    student_rows = [likeliest(token, share) for token, share in zip(tokens, student, strict=True)]
    teacher_rows = [likeliest(other, 0.9 if same else 0.8) for other, same in zip(wanted, agreed, strict=True)]
    details = TokenDetails(
        student_logp=[math.log(p) for p in student],
        teacher_logp=[math.log(p) for p in teacher],
        sampler_logp=[math.log(p) + chance.uniform(-0.01, 0.01) for p in student],
        student_entropy=[0.4 if same else 1.6 for same in agreed],
        teacher_entropy=[0.35 if same else 0.7 for same in agreed],
        student_top=TopTokens(tokens=[row[0] for row in student_rows], probabilities=[row[1] for row in student_rows]),
        teacher_top=TopTokens(tokens=[row[0] for row in teacher_rows], probabilities=[row[1] for row in teacher_rows]),
    )
    return a_sample(tokens=tokens, reverse_kl=tuple(kl), details=details, **changes)


def write_samples(run: Path, *samples: SampleRecord) -> Path:
    """A run folder of these samples alone."""
    with RunRecorder(run, resume_step=None) as recorder:
        for sample in samples:
            recorder.sample(sample)
    return run
