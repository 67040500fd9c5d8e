"""What a recipe leaves open, settled: how ranks divide the work, before a weight is loaded, and the size of a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from opd.config import Config
from opd.config.run import teacher_key
from opd.doctor.memory import microbatch_tokens
from opd.doctor.model_shape import model_shape, shape_of
from opd.doctor.parallel import Choice, choose_parallel
from opd.doctor.renderers import make_renderer
from opd.models import resolve_device
from opd.ranks import Ranks
from opd.tokenizer import load_tokenizer
from opd.types import Prompt

MEASURED = 64  # of the longest texts
ALONE_WHOLE = "train.parallel=fsdp2 divides weights over several ranks; one process has them whole"


def settle_parallel(config: Config, prompts: Sequence[Prompt], ranks: Ranks) -> tuple[bool, tuple[str, ...]]:
    """Whether weights are divided over the ranks, and what is to be said of it. Every rank has to ask. Raises the OpdError of a model
    whose sizes cannot be read."""
    wanted = config.train.parallel
    if ranks.alone:
        return False, (ALONE_WHOLE,) if wanted == "fsdp2" else ()
    if wanted != "auto":
        return wanted == "fsdp2", ()
    choice = ranks.from_first(lambda: _automatic(config, prompts, ranks.world))
    return choice.parallel == "fsdp2", (choice.why,)


def _automatic(config: Config, prompts: Sequence[Prompt], world: int) -> Choice:
    limits: dict[str, int] = {}
    if resolve_device(config.student.device).type == "cuda":
        limits = {
            f"cuda:{i}": torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())
        }
    if not limits:
        return choose_parallel(config, {}, 0, {}, world)
    sections = {"student": config.student}
    sections |= {teacher_key(n): one for n, one in config.all_teachers.items() if one.source == "model" and not one.url}
    shapes = {
        role: model_shape(one.model, role, revision=one.revision, trust_remote_code=one.trust_remote_code)
        for role, one in sections.items()
    }
    return choose_parallel(config, shapes, _longest(config, prompts), limits, world)


def _longest(config: Config, prompts: Sequence[Prompt]) -> int:
    """Tokens of the longest prompt, as the student reads it."""
    student = config.student
    options = {"revision": student.revision, "trust_remote_code": student.trust_remote_code, "role": "student"}
    tokenizer = load_tokenizer(student.model, **options)
    renderer = make_renderer(student, tokenizer, f"student '{student.model}'", config.prompts, rewrites=False)
    some = sorted(prompts, key=lambda one: len(one.text if one.text is not None else str(one.messages)))[-MEASURED:]
    return max((len(renderer.prompt_ids(prompt)) for prompt in some), default=1)


def with_microbatch(config: Config, student: PreTrainedModel, *, gpu: bool) -> Config:
    """The recipe with the micro-batch that is taken where it leaves that open."""
    shapes = {name: tuple(p.shape) for name, p in student.named_parameters()}
    try:
        shape = shape_of(student.config.get_text_config(), shapes)
    except (AttributeError, TypeError):  # a config that does not say how large its layers are
        return replace(config, train=replace(config.train, tokens_per_microbatch=config.train.microbatch))
    tokens = microbatch_tokens(config, shape, gpu=gpu)
    return replace(config, train=replace(config.train, tokens_per_microbatch=tokens))
