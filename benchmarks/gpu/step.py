"""One update at the shapes of released models, with random weights, by the product's own teacher, student and sampler."""

from __future__ import annotations

import statistics
import string
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from benchmarks.gpu.clock import MIB, milliseconds, profile, synchronize
from benchmarks.gpu.sheet import Sheet
from opd.config import LoraConfig, OptimizerConfig
from opd.data.rendering import Renderer
from opd.losses import Objective
from opd.samplers.base import Sampling
from opd.samplers.hf import HfSampler
from opd.seeding import seeded
from opd.teachers.local import LocalTeacher
from opd.teachers.vocabulary import VocabularyMatch
from opd.testing import byte_tokenizer
from opd.trainer import policy as policy_module
from opd.trainer.lora import add_lora
from opd.trainer.metrics import TokenMetrics
from opd.trainer.scoring import scored_batches
from opd.trainer.student import Student
from opd.types import Batch, Prompt, Rollout

VOCAB = 151_936
PAD, EOS = 256, 257
SIZES: dict[str, dict[str, Any]] = {  # the config.json of Qwen3-0.6B, -1.7B and -8B
    "0.6B": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 3072},
    "1.7B": {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 6144},
    "8B": {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 12_288},
}
UNTIED = ("8B",)
TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of one step."""

    rollouts: int = 32
    prompt: int = 256
    response: int = 512
    microbatch: int = 8192
    generated: int = 16
    """Tokens per rollout when `generate` is timed: it takes as long for each."""
    repeats: int = 2


REHEARSED = Sizes(rollouts=4, prompt=9, response=12, microbatch=64, generated=4, repeats=1)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One student and how it is trained, under the 8B teacher."""

    student: str
    lora: bool = False
    checkpointing: bool = False
    layout: str = "right_padded"
    attention: str = "sdpa"

    @property
    def name(self) -> str:
        kind = "LoRA on bfloat16" if self.lora else "float32 weights, autocast"
        saved = "checkpointing" if self.checkpointing else "no checkpointing"
        return f"{self.student} ({kind}), {self.layout}, {self.attention}, {saved}"

    @property
    def needs(self) -> tuple[str, ...]:
        return (*(("peft",) if self.lora else ()), *(("flash_attn",) if self.attention != "sdpa" else ()))


SETUPS = (
    Setup(student="1.7B", checkpointing=True),
    Setup(student="0.6B"),
    Setup(student="8B", lora=True, checkpointing=True),
    Setup(student="0.6B", layout="packed"),
    Setup(student="1.7B"),
    Setup(student="0.6B", layout="packed", attention="flash_attention_2"),
)
CASE_SECONDS = 12.0
SQUARE = 8192


def measure(sheet: Sheet) -> None:
    warm = sheet.case("the device", "product of bfloat16 matrices", partial(_product_rate, sheet))
    peak = None if warm is None else warm["TFLOP/s"]
    made: list[LocalTeacher] = []
    sheet.case("the teacher", "8B, bfloat16, random weights", lambda: _make_teacher(sheet, made), seconds=20)
    for setup in SETUPS if made else ():
        sheet.case(
            "one step under an 8B teacher",
            setup.name,
            partial(_one, sheet, setup, made[0], peak),
            seconds=CASE_SECONDS,
            needs=setup.needs,
        )


def _product_rate(sheet: Sheet) -> dict[str, Any]:
    side = 256 if sheet.rehearse else SQUARE
    left, right = (torch.randn(side, side, device=sheet.device).bfloat16() for _ in range(2))
    milliseconds(lambda: left @ right, sheet.device)
    ms = statistics.median(milliseconds(lambda: left @ right, sheet.device) for _ in range(10))
    return {"side": side, "TFLOP/s": 2 * side**3 / ms / 1e9}


def _make_teacher(sheet: Sheet, made: list[LocalTeacher]) -> dict[str, Any]:
    began = time.perf_counter()
    made.append(
        LocalTeacher(
            random_model(sheet, "8B", torch.bfloat16, "sdpa"),
            _renderer(),
            vocabulary=_vocabulary(sheet),
            pad_id=PAD,
            tokens_per_batch=8192,
        )
    )
    made[0].bind_objective(Objective())
    synchronize(sheet.device)
    return {"seconds to make": time.perf_counter() - began, "MiB": _allocated(sheet.device)}


def random_model(sheet: Sheet, size: str, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """A Qwen3 of this size, drawn on the device."""
    shape = TINY if sheet.rehearse else SIZES[size]
    config = Qwen3Config(
        **shape,
        num_key_value_heads=2 if sheet.rehearse else 8,
        head_dim=16 if sheet.rehearse else 128,
        vocab_size=515 if sheet.rehearse else VOCAB,
        tie_word_embeddings=size not in UNTIED,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    config._attn_implementation = attention
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(sheet.device), seeded(0, sheet.device):
            return Qwen3ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def _renderer() -> Renderer:
    return Renderer(byte_tokenizer(), name="random")


def _vocabulary(sheet: Sheet) -> VocabularyMatch:
    return VocabularyMatch(size=515 if sheet.rehearse else VOCAB)


def _one(sheet: Sheet, setup: Setup, teacher: LocalTeacher, peak: float | None) -> dict[str, Any]:
    """A warm-up step, then: whole steps, one that is timed in pieces, one micro-batch under the profiler, and `generate`."""
    sizes = REHEARSED if sheet.rehearse else Sizes()
    student = _student(sheet, setup, teacher)
    held = _allocated(sheet.device)
    rollouts = _rollouts(sizes, VOCAB if not sheet.rehearse else 515)
    objective = Objective()
    teacher.layout = setup.layout  # pyright: ignore[reportAttributeAccessIssue]

    def score() -> list[Batch]:
        return list(
            scored_batches(
                rollouts,
                teacher,
                teacher.kind,
                layout=setup.layout,
                tokens_per_microbatch=sizes.microbatch,
                pad_id=PAD,
                device=sheet.device,
            )
        )

    batches = score()
    student.update(batches, objective)
    synchronize(sheet.device)
    if sheet.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(sheet.device)
    teaching = statistics.median(_seconds(score, sheet.device) for _ in range(sizes.repeats))
    updating = statistics.median(
        _seconds(lambda: student.update(batches, objective), sheet.device) for _ in range(sizes.repeats)
    )
    top = torch.cuda.max_memory_allocated(sheet.device) / MIB if sheet.device.type == "cuda" else None
    pieces = _pieces(student, batches, objective, sheet.device)
    student.zero_grad()
    batch = batches[0]
    with student._training():
        seen = profile(lambda: student.loss(batch, objective, TokenMetrics()).backward(), sheet.device)
    student.zero_grad()
    flops, teacher_flops = _flops(student, setup, rollouts), _teacher_flops(teacher, rollouts)
    tokens = sum(len(r.prompt_ids) + len(r.response_ids) for r in rollouts)
    responses = sum(len(r.response_ids) for r in rollouts)
    per_token = _generating(sheet, student, sizes)
    return {
        "tokens/s of teacher and update": tokens / (teaching + updating),
        "MFU of the update": flops / updating / 1e12 / peak if peak else None,
        "MFU of teacher and update": (flops + teacher_flops) / (teaching + updating) / 1e12 / peak if peak else None,
        "teacher s": teaching,
        "update s": updating,
        **{f"{name} s": took for name, took in pieces.items()},
        "generate s per token of all rollouts": per_token,
        "rollout s at this rate": per_token * sizes.response,
        "MiB held": held,
        "peak MiB": top,
        "micro-batches": len(batches),
        "launches per micro-batch": seen.launches,
        "host waits per micro-batch": seen.waits,
        "response tokens": responses,
    }


def _student(sheet: Sheet, setup: Setup, teacher: LocalTeacher) -> Student:
    dtype = torch.bfloat16 if setup.lora else torch.float32
    model = random_model(sheet, setup.student, dtype, setup.attention)
    if setup.lora:
        model = add_lora(model, LoraConfig(rank=32, alpha=64), seed=0)
    return Student(
        model,
        OptimizerConfig(name="adamw", lr=1e-6),
        vocabulary=teacher.vocabulary,
        eos_ids=(EOS,),
        teacher_logits=teacher.logits,
        total_steps=100,
        autocast=not setup.lora,
        gradient_checkpointing=setup.checkpointing,
    )


def _rollouts(sizes: Sizes, vocab: int) -> list[Rollout]:
    """Prompts and responses of random tokens, between half and the whole of the longest."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for index in range(sizes.rollouts):
        length = int(torch.randint(sizes.response // 2, sizes.response + 1, (), generator=generator))
        prompt = _prompt(index, sizes)
        ids = torch.randint(vocab, (length,), generator=generator).tolist()
        found.append(
            Rollout(
                prompt=prompt,
                prompt_ids=tuple(str(prompt.text).encode()),
                response_ids=tuple(ids),
                sampler_logp=tuple([-10.0] * length),
                finished=False,
                policy_version=0,
            )
        )
    return found


def _prompt(index: int, sizes: Sizes) -> Prompt:
    letters = string.ascii_letters
    return Prompt(index=index, text="".join(letters[(index + i * i) % len(letters)] for i in range(sizes.prompt)))


def _generating(sheet: Sheet, student: Student, sizes: Sizes) -> float:
    """Seconds of `generate` per token that all rollouts grow by, the prompt's own pass included."""
    sampler = HfSampler(
        student.model,
        _renderer(),
        Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=sizes.generated),
        eos_ids=(EOS,),
        pad_id=PAD,
        vocabulary=student.vocabulary,
        autocast=student.autocast,
    )
    prompts = [_prompt(index, sizes) for index in range(sizes.rollouts)]
    return _seconds(lambda: sampler.sample(prompts, seed=0), sheet.device) / sizes.generated


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """By the host's clock, the device idle before and after."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def _pieces(student: Student, batches: list[Batch], objective: Objective, device: torch.device) -> dict[str, float]:
    """Seconds of one more update by what it does. Waiting for the device after each piece makes the sum a little larger."""
    took: dict[str, float] = defaultdict(float)

    @contextmanager
    def timed(owner: Any, name: str, label: str) -> Iterator[None]:
        original = getattr(owner, name)

        def around(*args: Any, **kwargs: Any) -> Any:
            synchronize(device)
            began = time.perf_counter()
            result = original(*args, **kwargs)
            synchronize(device)
            took[label] += time.perf_counter() - began
            return result

        setattr(owner, name, around)
        try:
            yield
        finally:
            setattr(owner, name, original)

    with (
        timed(policy_module, "response_hidden", "forward"),
        timed(policy_module, "linear_objective", "loss"),
        timed(torch.Tensor, "backward", "backward"),
        timed(student, "_step", "optimizer"),
    ):
        student.update(batches, objective)
    return {name: took[name] for name in ("forward", "loss", "backward", "optimizer")}


def _flops(student: Student, setup: Setup, rollouts: list[Rollout]) -> float:
    """Model FLOPs of one update (arXiv 2204.02311, appendix B): what is recomputed or padded does not count.

    A matrix takes 2 operations per entry and token forward and 4 backward, 2 where it is frozen; the head sees response tokens alone.
    """
    body, head = _matrices(student.model)
    factor = 4 if setup.lora else 6
    fed, responses = _fed(rollouts), sum(len(r.response_ids) for r in rollouts)
    return factor * (body * fed + head * responses) + 3 * _attention_flops(student.model, rollouts)


def _teacher_flops(teacher: LocalTeacher, rollouts: list[Rollout]) -> float:
    body, head = _matrices(teacher.model)
    responses = sum(len(r.response_ids) for r in rollouts)
    return 2 * (body * _fed(rollouts) + head * responses) + _attention_flops(teacher.model, rollouts)


def _fed(rollouts: list[Rollout]) -> int:
    return sum(len(r.prompt_ids) + len(r.response_ids) - 1 for r in rollouts)


def _matrices(model: PreTrainedModel) -> tuple[int, int]:
    """Entries of the layers' matrices, adapters left out, and of the head."""
    head = model.get_output_embeddings().weight.numel()  # pyright: ignore[reportOptionalMemberAccess,reportAttributeAccessIssue,reportCallIssue]
    body = sum(
        p.numel() for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name and "lora_" not in name
    )
    return body, int(head)


def _attention_flops(model: PreTrainedModel, rollouts: list[Rollout]) -> float:
    """Of one forward pass: two causal products per head and layer."""
    config = model.config
    per_pair = 2 * 2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return per_pair * sum((len(r.prompt_ids) + len(r.response_ids)) ** 2 / 2 for r in rollouts)


def _allocated(device: torch.device) -> float | None:
    return torch.cuda.memory_allocated(device) / MIB if device.type == "cuda" else None
