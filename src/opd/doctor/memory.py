"""Memory of a run, estimated from its recipe and the sizes of its models: what stays, and what each phase of a step adds.

Every response is taken to be as long as rollout.max_new_tokens allows, after the longest prompt. Counts of saved activations are those
of transformers' decoders with scaled-dot-product attention. Left out: the CUDA context (about 0.5 GiB); the natural gradient's graphs;
vLLM, which takes rollout.vllm.memory_share of its device; and an allocator's gaps. On a CPU, glibc's defaults can double the peak of a
small run, and MALLOC_MMAP_THRESHOLD_=65536 gives freed memory back. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from opd.config.model import LoadOptionsConfig
from opd.config.run import RunSettings, teacher_key
from opd.config.train import GPU_MICROBATCH
from opd.doctor.model_shape import ModelShape

FLOAT32 = 4
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTIZED = {"bitsandbytes-4bit": 0.5625}  # bytes of a weight: half of one, and a float32 scale for every 64
OTHER_QUANTIZED = 1.0  # the other methods keep 8 bits
# Of the fused loss; kernels/spec.py has the same numbers, and a test compares them.
CPU_CHUNK_BYTES = 75 << 20
CPU_CHUNK_ROWS = 256
CPU_CACHED_BYTES = 4 << 20
GPU_CHUNK_BYTES = 640 << 20
GPU_STORE_BYTES = 2375 << 20
MAX_CHUNK = 8192
MINIMAL_CHUNK = 1024
CHUNK_BUFFERS = 2  # logits of student and teacher
SAMPLING_BUFFERS = 4  # of [rows, vocabulary] in float32: the logits, their copy, the probabilities, the answer
CPU_MICROBATCH_BYTES = 1 << 30  # activations of a micro-batch on a CPU, where the recipe leaves its tokens open
LEAST_CPU_MICROBATCH = 512
STEP = "optimizer's step"
"""The phase of an optimizer whose moments wait in CPU memory meanwhile."""
SOLVER_VECTORS = 6  # of the natural gradient: gradient, solution, residual, direction, product, preconditioned residual


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device, by what they are for."""

    always: Mapping[str, int] = field(default_factory=dict[str, int])
    """There from the second step on, in every phase."""
    phases: Mapping[str, Mapping[str, int]] = field(default_factory=dict[str, Mapping[str, int]])
    """What rollout, teacher, update and an offloaded optimizer's step add, one after the other."""

    @property
    def phase(self) -> str:
        """The phase that needs most; "" where there is none."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()), default="")

    @property
    def peak(self) -> int:
        """Bytes at most."""
        return sum(self.always.values()) + sum(self.phases.get(self.phase, {}).values())


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """How many tokens a step has at most."""

    prompt: int
    """Tokens of the longest prompt."""
    response: int
    """Of the longest response."""
    rollouts: int
    """Of a step."""

    @property
    def length(self) -> int:
        """Tokens of a sequence that a model reads: the last one is only predicted."""
        return self.prompt + self.response - 1

    def rows_in(self, tokens: int) -> int:
        """Sequences of a batch of so many tokens; one that is longer is a batch by itself."""
        return min(self.rollouts, max(1, tokens // self.length))


def weight_bytes(shape: ModelShape, size: int, load: LoadOptionsConfig | None = None) -> int:
    """Of a model's weights with `size` bytes each; quantised ones are its hidden matrices."""
    if not load:
        return shape.parameters * size
    hidden = sum(math.prod(one) for one in shape.hidden_matrices.values())
    packed = hidden * QUANTIZED.get(load.quantization or "", OTHER_QUANTIZED)
    return int(packed) + (shape.parameters - hidden) * size


def lora_parameters(shape: ModelShape, rank: int) -> int:
    """Entries of the two factors beside every hidden matrix, as for target_modules=all-linear."""
    return sum(rank * sum(matrix) for matrix in shape.hidden_matrices.values())


def optimizer_bytes(shape: ModelShape, name: str, trained: int, size: int, *, lora: bool) -> int:
    """Of the state that stays between steps: two moments of AdamW, one of Muon for hidden matrices, none of the natural gradient."""
    if name == "natural_gradient":
        return 0
    if name != "muon":
        return 2 * trained * size
    hidden = trained if lora else sum(math.prod(one) for one in shape.hidden_matrices.values())
    return (hidden + 2 * (trained - hidden)) * size


def layer_bytes(shape: ModelShape, weights: int, products: int) -> int:
    """Bytes per token that one layer keeps for its backward pass. `weights` and `products` are the bytes of an entry of each.

    Each of two norms keeps its input in float32, the normalised input and its output. Attention keeps queries, keys and values, these
    for every head, and its output twice. A gated feed-forward layer keeps four rows of its width.
    """
    n, m = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 2 * shape.hidden * (FLOAT32 + weights + products)
    heads = (n + m) * (FLOAT32 + weights) if shape.normed_heads else 0
    wide = 4 if shape.gated else 6
    return norms + heads + (5 * n + wide * shape.intermediate) * products


def activation_bytes(shape: ModelShape, tokens: int, weights: int, products: int, *, checkpointing: bool) -> int:
    """Of a forward pass that will be differentiated. With checkpointing, every layer keeps its input, and one at a time all the rest."""
    layer = layer_bytes(shape, weights, products)
    if checkpointing:
        return tokens * (shape.layers * shape.hidden * weights + layer)
    return tokens * (shape.layers * layer + shape.hidden * (FLOAT32 + weights + products))


def forward_bytes(shape: ModelShape, tokens: int, size: int) -> int:
    """Of a forward pass that nobody differentiates: one layer's rows at a time."""
    wide = 3 * shape.intermediate if shape.gated else 2 * shape.intermediate
    attention = 5 * shape.heads * shape.head_dim
    return tokens * (2 * shape.hidden + max(wide, attention)) * size


def cache_bytes(shape: ModelShape, rows: int, tokens: int, size: int) -> int:
    """Of the keys and values of a batch that is generated; one layer's are there twice while they grow."""
    layer = 2 * shape.kv_heads * shape.head_dim * rows * tokens * size
    return (shape.layers + 1) * layer


def sampling_bytes(vocabulary: int, rows: int) -> int:
    """Of the distributions from which one token of every row is drawn."""
    return SAMPLING_BUFFERS * rows * vocabulary * FLOAT32


def loss_chunk(vocabulary: int, *, gpu: bool, minimal: bool) -> int:
    """Tokens whose logits the fused loss holds at once: `kernels.spec.default_chunk`."""
    row = max(1, vocabulary) * FLOAT32
    if minimal:
        return MINIMAL_CHUNK
    if gpu:
        return max(64, min(MAX_CHUNK, GPU_CHUNK_BYTES // row // 64 * 64))
    useful = max(CPU_CHUNK_ROWS, CPU_CACHED_BYTES // row)
    return max(16, min(MAX_CHUNK, useful, CPU_CHUNK_BYTES // row // 16 * 16))


def stored_rows(vocabulary: int, tokens: int, chunk: int) -> int:
    """Tokens whose d(logits) a GPU keeps in 16 bits until they are multiplied: `kernels.spec.stored_tokens`."""
    most = max(chunk, GPU_STORE_BYTES // (2 * max(1, vocabulary)) // 64 * 64)
    return most if tokens <= most else max(chunk, most // 2)


def loss_bytes(shape: ModelShape, tokens: int, products: int, *, gpu: bool, minimal: bool, trains_head: bool) -> int:
    """Of the fused loss over `tokens` response tokens: logits of a chunk, d(logits) that are kept on a GPU, and gradients."""
    chunk = loss_chunk(shape.vocabulary, gpu=gpu, minimal=minimal)
    logits = 0 if minimal else CHUNK_BUFFERS * min(tokens, chunk) * shape.vocabulary * FLOAT32
    stores = gpu and products == 2 and not minimal
    store = 2 * shape.vocabulary * min(tokens, stored_rows(shape.vocabulary, tokens, chunk)) if stores else 0
    head = shape.vocabulary * shape.hidden * FLOAT32 if trains_head else 0
    return logits + store + head + 2 * tokens * shape.hidden * FLOAT32


def student_device(settings: RunSettings, gpus: int) -> str:
    """Such as cpu or cuda:0, on a machine with so many GPUs."""
    return _device(settings.student.device, gpus)


def microbatch_tokens(settings: RunSettings, shape: ModelShape, *, gpu: bool) -> int:
    """train.tokens_per_microbatch, or what stands for None with a student of these sizes."""
    if gpu or settings.train.tokens_per_microbatch is not None:
        return settings.train.microbatch
    size = _size(settings.student.dtype, gpu=False)
    products = 2 if settings.train.autocast == "bfloat16" else size
    token = activation_bytes(shape, 1, size, products, checkpointing=settings.student.gradient_checkpointing)
    return max(LEAST_CPU_MICROBATCH, min(GPU_MICROBATCH, CPU_MICROBATCH_BYTES // token // 64 * 64))


def step_sizes(settings: RunSettings, prompt_tokens: int, ranks: int = 1) -> StepSizes:
    """The longest that a step of this recipe can have, on one of several ranks that share its rollouts."""
    train = settings.train
    return StepSizes(
        prompt=prompt_tokens,
        response=settings.rollout.max_new_tokens,
        rollouts=math.ceil(train.prompts_per_step * train.samples_per_prompt / ranks),
    )


def estimate(
    settings: RunSettings,
    shapes: Mapping[str, ModelShape],
    prompt_tokens: int,
    *,
    gpus: int = 0,
    ranks: int = 1,
    divided: bool = False,
) -> dict[str, Memory]:
    """Memory of every device by name; `shapes` are those of student, teacher or teachers.NAME, as far as they are in this process.
    `prompt_tokens` are those of the longest prompt, `gpus` says how many there are. With several `ranks`, of a rank's device: they share
    the rollouts, and with `divided` the weights, gradients and optimizer too, as train.parallel=fsdp2 does."""
    own = student_device(settings, gpus)
    sizes = step_sizes(settings, prompt_tokens, ranks)
    student = _student_memory(settings, shapes["student"], sizes, gpu=own != "cpu")
    if divided:
        student = _divided(student, settings, shapes["student"], ranks, gpu=own != "cpu")
    found = {own: student}
    if STEP in student.phases and own != "cpu":
        found["cpu"] = Memory(always={"optimizer": student.phases[STEP]["optimizer"]})
    for name, teacher in settings.all_teachers.items():
        shape = shapes.get(teacher_key(name))
        if shape is None or teacher.url or teacher.source != "model" or not settings.rl.distilled:
            continue
        device = own if teacher.device == "auto" else _device(teacher.device, gpus)
        size = _size(teacher.dtype, gpu=device != "cpu")
        weights = weight_bytes(shape, size, teacher.load_options)
        reads, kept = _teacher_phase(settings, shape, sizes, size)
        ends = gathered_bytes(shape, size) if divided else 0
        weights = weights // ranks if divided else weights
        home = "cpu" if teacher.offload else device
        found[home] = _with(found.get(home, Memory()), {teacher_key(name): weights}, {})
        moved = {"weights that are moved in": weights} if home != device else {}
        found[device] = _with(found.get(device, Memory()), {}, {"teacher": {**moved, "forward pass": reads}})
        phases = {"teacher": {"targets": kept}, "update": {"targets": kept}}
        if ends:
            phases = {name: {**parts, "gathered weights": ends} for name, parts in phases.items()}
        found[own] = _with(found[own], {}, phases)
    return found


def largest_microbatch(
    settings: RunSettings,
    shapes: Mapping[str, ModelShape],
    prompt_tokens: int,
    limits: Mapping[str, int],
    *,
    gpus: int = 0,
    ranks: int = 1,
    divided: bool = False,
) -> int | None:
    """The largest train.tokens_per_microbatch, up to a whole step, whose estimate is within `limits` (bytes by device); None where not
    even one sequence fits. It is a multiple of the longest sequence, because only whole sequences count."""
    sizes = step_sizes(settings, prompt_tokens, ranks)
    shared: Any = {"gpus": gpus, "ranks": ranks, "divided": divided}

    def fits(rows: int) -> bool:
        train = replace(settings.train, tokens_per_microbatch=rows * sizes.length)
        found = estimate(replace(settings, train=train), shapes, prompt_tokens, **shared)
        return all(memory.peak <= limits[device] for device, memory in found.items() if device in limits)

    if not fits(1):
        return None
    low, high = 1, sizes.rollouts
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * sizes.length


def gathered_bytes(shape: ModelShape, size: int) -> int:
    """Of the weights that a rank gathers while it runs a model that is divided over ranks: the output layer, and two layers, of which the
    second comes while the first is used."""
    layer = sum(map(math.prod, shape.hidden_matrices.values())) // max(1, shape.layers)
    return (shape.vocabulary * shape.hidden + 2 * layer) * size


def _divided(memory: Memory, settings: RunSettings, shape: ModelShape, ranks: int, *, gpu: bool) -> Memory:
    """One rank's memory of a student that `memory` is the whole of."""
    size = _size(settings.student.dtype, gpu=gpu)
    gathered = gathered_bytes(shape, size)
    phases = {name: {**parts, "gathered weights": gathered} for name, parts in memory.phases.items()}
    if STEP in phases:
        phases[STEP] = {name: part // ranks for name, part in memory.phases[STEP].items()}
    if "update" in phases:
        # The output layer's gradient is whole until the last micro-batch, and that of one layer until it is summed.
        whole = 0 if settings.student.lora is not None else gathered // size * FLOAT32
        phases["update"]["gradients"] = phases["update"]["gradients"] // ranks + whole
    return Memory(always={name: part // ranks for name, part in memory.always.items()}, phases=phases)


def _student_memory(settings: RunSettings, shape: ModelShape, sizes: StepSizes, *, gpu: bool) -> Memory:
    student = settings.student
    size = _size(student.dtype, gpu=gpu)
    products = 2 if settings.train.autocast == "bfloat16" else size
    lora = student.lora is not None
    trained = lora_parameters(shape, student.lora.rank) if student.lora else shape.parameters
    trained_size = FLOAT32 if lora else size
    always = {"student": weight_bytes(shape, size, student.load_options)}
    if lora:
        always["adapters"] = trained * trained_size
    moments = optimizer_bytes(shape, settings.optimizer.name, trained, trained_size, lora=lora)
    if not settings.optimizer.offload:
        always["optimizer"] = moments
    if any(teacher.source == "ema" for teacher in settings.all_teachers.values()):
        always["moving average"] = trained * trained_size
    if settings.rl.rewarded and settings.rl.reference_kl > 0 and not lora:
        always["reference"] = shape.parameters * size
    cast = 2 * sum(map(math.prod, shape.hidden_matrices.values())) if products < size else 0
    phases = {"update": _update(settings, shape, sizes, size, products, trained * trained_size, gpu=gpu)}
    if settings.rollout.engine == "hf" and settings.rollout.source == "live":
        phases["rollout"] = _rollout(settings, shape, sizes, products)
    if cast:
        phases = {name: {**parts, "weights in bfloat16": cast} for name, parts in phases.items()}
    if settings.optimizer.offload:  # outside of autocast
        phases[STEP] = {"gradients": trained * trained_size, "optimizer": moments}
    return Memory(always=always, phases=phases)


def _update(
    settings: RunSettings, shape: ModelShape, sizes: StepSizes, size: int, products: int, gradients: int, *, gpu: bool
) -> dict[str, int]:
    rows = sizes.rows_in(microbatch_tokens(settings, shape, gpu=gpu))
    checkpointing = settings.student.gradient_checkpointing
    minimal, trains_head = settings.train.loss_memory == "minimal", settings.student.lora is None
    activations = activation_bytes(shape, rows * sizes.length, size, products, checkpointing=checkpointing)
    parts = {
        # Those of one micro-batch alone come as its activations go.
        "gradients": gradients if rows < sizes.rollouts else max(0, gradients - activations),
        "activations": activations,
        "loss": loss_bytes(shape, rows * sizes.response, products, gpu=gpu, minimal=minimal, trains_head=trains_head),
    }
    if settings.optimizer.name == "natural_gradient":
        parts["solver"] = (SOLVER_VECTORS + settings.optimizer.natural_gradient.probes) * gradients
    return parts


def _rollout(settings: RunSettings, shape: ModelShape, sizes: StepSizes, products: int) -> dict[str, int]:
    rows = min(settings.rollout.batch_size, sizes.rollouts)
    return {
        "keys and values": cache_bytes(shape, rows, sizes.prompt + sizes.response, products),
        "distributions": sampling_bytes(shape.vocabulary, rows),
        "prompts": forward_bytes(shape, rows * sizes.prompt, products),
    }


def _teacher_phase(settings: RunSettings, shape: ModelShape, sizes: StepSizes, size: int) -> tuple[int, int]:
    """Bytes of one forward pass on the teacher's device, and of a step's targets on the student's."""
    tokens = max(teacher.tokens_per_batch for teacher in settings.all_teachers.values())
    rows = sizes.rows_in(tokens)
    needs = settings.objective.needs
    hidden = needs[0] == "hidden"
    per_token = shape.hidden * size if hidden else (settings.objective.top_k or 1) * (FLOAT32 + 8)
    return forward_bytes(shape, rows * sizes.length, size), sizes.rollouts * sizes.response * per_token


def _with(memory: Memory, always: Mapping[str, int], phases: Mapping[str, Mapping[str, int]]) -> Memory:
    """The memory with more in it; what has the same name is added up."""
    names = {*memory.phases, *phases}
    return Memory(
        always=_sum(memory.always, always),
        phases={name: _sum(memory.phases.get(name, {}), phases.get(name, {})) for name in sorted(names)},
    )


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}


def _size(dtype: str, *, gpu: bool) -> int:
    """Bytes of an entry."""
    return (2 if gpu else FLOAT32) if dtype == "auto" else SIZES[dtype]


def _device(name: str, gpus: int) -> str:
    if name == "auto":
        return "cuda:0" if gpus else "cpu"
    return "cuda:0" if name == "cuda" else name
