"""Hugging Face causal language models: loading, and the outputs at response positions only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedConfig

from opd.adapter import is_adapter, load_adapter
from opd.errors import ModelError, OpdError
from opd.folders import MODEL_FILES, check_folder
from opd.load_errors import UNREADABLE, load_failure
from opd.quantized import check_head, is_quantized, prepare_quantized
from opd.types import Head, Sequences

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformers import PreTrainedModel

LINEAR_HEAD_TOLERANCE = 1e-3  # relative; float32 rounding stays far under it, soft-caps and scales do not
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SAVED_DTYPES = ("float32", "bfloat16", "float16")
"""Dtypes that a trained student can be saved in."""
OUTPUT_SWITCHES = {
    "output_router_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
}
"""Settings of a config.json that add outputs to the logits or replace them, and the values that opd needs."""


def resolve_device(name: str) -> torch.device:
    """'auto' is CUDA when there is one. Raises ModelError for a device that this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.empty(1, device=device).item()
    except (RuntimeError, NotImplementedError):
        raise ModelError(f"'{name}' is not a device of this machine; use 'auto', 'cpu', 'cuda' or 'cuda:N'.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device is '{name}', but PyTorch sees no CUDA GPU here; use 'cpu' or 'auto'.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device is '{name}', but there are only {torch.cuda.device_count()} GPUs (from cuda:0).")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """'auto' is bfloat16 on CUDA, float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def load_causal_lm(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: Mapping[str, Any] | None = None,
    role: str = "model",
) -> PreTrainedModel:
    """A causal language model from a local folder or the hub, in evaluation mode. `quantization` are arguments of from_pretrained.

    Raises ModelError, also for weights that are missing (they would be random) or not finite.
    """
    check_folder(role, name, MODEL_FILES)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, **(quantization or {})}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    try:
        if is_adapter(name, revision):
            _refuse_adapter_student(role, name)
            model, missing = load_adapter(name, revision=revision, role=role, **options)
        else:
            model, loading = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]  # a pair, with loading info
                name, revision=revision, output_loading_info=True, **options
            )
            missing = sorted(loading["missing_keys"])
    except OpdError:
        raise
    except UNREADABLE as error:
        if isinstance(error, RuntimeError) and "allocate" in str(error):
            raise  # memory, not the folder
        raise ModelError(load_failure(role, "model", name, error)) from error
    if missing:
        raise ModelError(
            f"The {role} '{name}' lacks {len(missing)} of its weights ({missing[0]}, …), which would be random numbers. The "
            "download is incomplete, or config.json belongs to another model; get the whole folder again."
        )
    if not quantization:
        model.to(device)  # pyright: ignore[reportArgumentType]  # transformers wraps nn.Module.to
    return prepare_causal_lm(model, role=role, name=name)


def prepare_causal_lm(model: PreTrainedModel, *, role: str, name: str) -> PreTrainedModel:
    """The model in evaluation mode, with logits as its only output and a generation config that can be saved. Raises ModelError for
    weights that are not finite."""
    _return_logits(model)
    _make_saveable(model, role)
    if is_quantized(model):
        check_head(model, output_layer(model), role, name)
        prepare_quantized(model)
    plain = ((n, p) for n, p in model.named_parameters() if p.dtype in FLOATS and type(p) is nn.Parameter)
    bad = next((n for n, p in plain if not p.isfinite().all()), None)
    if bad is not None:
        raise ModelError(
            f"The {role} '{name}' has NaN or infinite numbers in {bad}, so every loss would be NaN. It was saved after a run that "
            "diverged, or overflowed in float16; use another checkpoint, or another dtype."
        )
    return model.eval()


def _refuse_adapter_student(role: str, name: str) -> None:
    if role == "student":
        raise ModelError(
            f"The student '{name}' is a LoRA adapter, whose base would stay frozen. Merge it into its base first (peft's "
            "merge_and_unload), and give student.model the merged folder."
        )


def _return_logits(model: PreTrainedModel) -> None:
    """Apply OUTPUT_SWITCHES to every config of a model; the parts of a multimodal model have their own.

    A fine-tuned mixture of experts is saved with output_router_logits=true, and `generate` fails on it.
    """
    configs = (getattr(module, "config", None) for module in model.modules())
    for config in {id(config): config for config in configs if isinstance(config, PreTrainedConfig)}.values():
        for name, value in OUTPUT_SWITCHES.items():
            if getattr(config, name, value) != value:
                setattr(config, name, value)


def _make_saveable(model: PreTrainedModel, role: str) -> None:
    """Set do_sample in a generation config with sampling settings but without it: transformers loads it and refuses to save it.

    Raises ModelError for a config that cannot be saved even so, before a student is trained in vain.
    """
    config = model.generation_config
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
        try:
            config.validate(strict=True)
        except ValueError as error:
            raise ModelError(
                f"The {role}'s generation_config.json could not be saved again, so correct it first: {error}"
            ) from error


def stored_kind(name: str, revision: str | None = None) -> str | None:
    """model_type of a checkpoint with a text part among others; None for a plain language model."""
    config = _stored_config(name, revision)
    return config.get("model_type") if config.get("text_config") else None


def switched_off(name: str, revision: str | None = None) -> list[str]:
    """Settings of a checkpoint's config.json that opd overrides, as 'key=value': see OUTPUT_SWITCHES."""
    config = _stored_config(name, revision)
    parts = (config, config.get("text_config") or {})
    found = {
        key: part[key] for part in parts for key, value in OUTPUT_SWITCHES.items() if part.get(key, value) != value
    }
    return [f"{key}={json.dumps(value)}" for key, value in found.items()]


def stored_dtype(name: str, revision: str | None = None) -> str | None:
    """Dtype of the weights in config.json, such as 'bfloat16'; None where it has none."""
    config = _stored_config(name, revision)
    for part in (config, config.get("text_config") or {}):
        for key in ("dtype", "torch_dtype"):  # the second is what transformers 4 wrote
            if part.get(key):
                return str(part[key]).removeprefix("torch.")
    return None


def saved_dtype(choice: str, stored: str | None) -> torch.dtype | None:
    """save.dtype for a student that came in the dtype `stored`; None is the one that it is trained in."""
    name = stored if choice == "auto" else choice
    return getattr(torch, name) if name in SAVED_DTYPES else None


def _stored_config(name: str, revision: str | None) -> dict[str, Any]:
    config, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    return config


def is_adapted(model: PreTrainedModel) -> bool:
    """True for a model with peft's adapters."""
    return hasattr(model, "merge_and_unload")


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model without peft's shell."""
    return model.get_base_model() if is_adapted(model) else model  # pyright: ignore[reportCallIssue]


def context_length(model: PreTrainedModel) -> int | None:
    """Number of positions in the model's config, or None without that setting."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def vocabulary_rows(model: PreTrainedModel) -> int:
    """Rows of the output layer, padding included."""
    return output_layer(model).weight.shape[0]


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """The module that turns hidden states into logits. Raises ModelError when there is none."""
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        raise ModelError(f"{type(model).__name__} has no output embeddings; opd needs a causal language model.")
    return head  # pyright: ignore[reportReturnType]


def response_logits(model: PreTrainedModel, sequences: Sequences) -> Float[Tensor, "tokens vocab"]:
    """Logits that predict each response token; the head runs on those rows alone.

    The rows are selected just before the output layer. So a soft-cap or scale after it still applies, and the
    [rows, length, vocab] tensor never exists.
    """
    index = sequences.predict_index
    with _before_head(model, lambda hidden: hidden.flatten(0, 1).index_select(0, index).unsqueeze(0)):
        return _forward(model, sequences).squeeze(0)


def response_hidden(model: PreTrainedModel, sequences: Sequences) -> Float[Tensor, "tokens hidden"]:
    """The hidden states that enter the output layer at each response position. The head itself runs on one row only."""
    kept: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        kept.append(hidden.flatten(0, 1).index_select(0, sequences.predict_index))
        return hidden[:1, :1]

    with _before_head(model, keep):
        _forward(model, sequences)
    return kept[0]


def _forward(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    return model(
        input_ids=sequences.input_ids,
        attention_mask=sequences.attention_mask,
        position_ids=sequences.position_ids,
        use_cache=False,
    ).logits


@contextmanager
def _before_head(model: PreTrainedModel, change: Any) -> Iterator[None]:
    """Apply `change` to the input of the output layer, and compute its logits in float32 whatever the dtype of weights and autocast.

    Rounding logits to bfloat16 costs more of the gradient the closer student and teacher are (27% at a KL of 0.006).
    """
    head = output_layer(model)
    widen = isinstance(head, nn.Linear) and head.weight.dtype in (torch.bfloat16, torch.float16)
    outside = torch.autocast(head.weight.device.type, enabled=False)
    rows: list[Tensor] = []

    def enter(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = change(args[0])
        outside.__enter__()
        if widen:
            rows.append(hidden)
            hidden = hidden[:, :1]  # its product is thrown away
        return (hidden.to(head.weight.dtype), *args[1:])

    def leave(_module: nn.Module, _args: tuple[Any, ...], output: Tensor | None) -> Tensor | None:
        try:
            if not widen or output is None:  # None: the layer raised
                return None
            bias = None if head.bias is None else head.bias.float()
            return F.linear(rows.pop().float(), head.weight.float(), bias)
        finally:
            outside.__exit__(None, None, None)

    handles = [head.register_forward_pre_hook(enter), head.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def linear_head(model: PreTrainedModel) -> Head | None:
    """The output layer as a weight and a bias, or None when the model's logits are more than `hidden @ weight.T + bias`.

    The probe puts hidden states into the layer that give logits of about ±100, where a soft-cap shows.
    """
    module = output_layer(model)
    weight = module.weight
    if not isinstance(module, nn.Linear) or weight.dim() != 2 or not weight.is_floating_point():
        return None
    ids = torch.arange(2, device=weight.device).unsqueeze(0)
    sequences = Sequences(
        input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=ids.clone(), predict_index=ids.flatten()
    )
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, 2, weight.shape[1], generator=generator).to(weight.device)
    probe = (probe * 100 / F.linear(probe, weight.float()).abs().max().clamp_min(1e-6)).to(weight.dtype)
    with _before_head(model, lambda _: probe):
        expected = _forward(model, sequences).float()
    bias = None if module.bias is None else module.bias.detach()
    actual = F.linear(probe.float(), weight.float(), None if bias is None else bias.float())
    if (actual - expected).abs().max() > LINEAR_HEAD_TOLERANCE * expected.abs().max().clamp_min(1e-6):
        return None
    return Head(weight=weight.detach(), bias=bias)
