"""A teacher that is the student: it has the same weights and reads the same prompts, so that nothing would be learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from opd.config import Config
from opd.config.run import teacher_key
from opd.data.rendering import Renderer
from opd.doctor.reading import EXCERPT, ReadingModel, evenly_spaced
from opd.quantized import entries
from opd.types import Prompt

SampledWeights = Mapping[str, tuple[tuple[int, ...], torch.Tensor]]
"""Shape and some entries of every parameter, by name."""
SAMPLED_ENTRIES = 256  # per tensor: training changes every one of them, and reading all of a large model takes minutes


def check_agreement(
    config: Config,
    prompts: Sequence[Prompt],
    student: ReadingModel,
    teachers: Mapping[str, ReadingModel],
    first: SampledWeights,
) -> list[str]:
    """Warnings about teachers that can only agree with the student, whose weights were `first` as they were loaded."""
    some, found = evenly_spaced(prompts), []
    for name, side in teachers.items():
        if config.all_teachers[name].source == "model" and _could_only_agree(config):
            found += _agreement(student.renderer, side, teacher_key(name), some, first)
    return found


@torch.no_grad()
def sampled_weights(model: PreTrainedModel) -> SampledWeights:
    """Evenly spaced entries of every parameter, in its own dtype on the CPU."""
    sampled = {}
    for name, parameter in model.named_parameters():
        flat = entries(parameter)
        step = max(1, flat.numel() // SAMPLED_ENTRIES)
        sampled[name] = tuple(parameter.shape), flat[::step].cpu().clone()
    return sampled


def _same_weights(sampled: SampledWeights, model: PreTrainedModel) -> bool:
    """True when the model has these weights, as far as the coarser of the two dtypes can tell."""
    other = sampled_weights(model)
    if {name: shape for name, (shape, _) in sampled.items()} != {name: shape for name, (shape, _) in other.items()}:
        return False
    return all(_same_entries(entries, other[name][1]) for name, (_, entries) in sampled.items())


def _same_entries(one: torch.Tensor, two: torch.Tensor) -> bool:
    if one.dtype != two.dtype:
        if not (one.is_floating_point() and two.is_floating_point()):
            return False  # of which one is quantised
        coarser = max(one.dtype, two.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        one, two = one.to(coarser), two.to(coarser)
    return torch.equal(one, two)


def _could_only_agree(config: Config) -> bool:
    """True when a teacher with the student's weights and prompts has nothing to say: no reward, no temperature, no other teacher beside
    it tells the two apart."""
    same = config.objective.student_temperature == config.objective.teacher_temperature
    alone = len(config.all_teachers) == 1 or config.mixture.kind == "routing"
    return same and alone and not config.rl.rewarded


def _agreement(
    student: Renderer, teacher: ReadingModel, role: str, prompts: Sequence[Prompt], first: SampledWeights
) -> list[str]:
    if any(student.prompt_ids(prompt) != teacher.renderer.prompt_ids(prompt) for prompt in prompts):
        return []
    model = getattr(teacher, "model", None)
    if model is None or not _same_weights(first, model):
        return []
    ends = [renderer.decode_all(renderer.prompt_ids(prompts[0]))[-EXCERPT:] for renderer in (student, teacher.renderer)]
    return [
        f"{role} has the student's own weights and reads the same prompts (the first ends with {ends[0]!r} for the student, {ends[1]!r} for "
        f"the teacher), so the two agree everywhere and nothing will be learnt. Give {role}.model another model, show it more with "
        "prompts.teacher_prompt, or add a reward (rl.weight)."
    ]
