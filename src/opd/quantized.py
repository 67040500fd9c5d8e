"""Quantised models, by transformers' own methods: what `load_options` stands for, what each method needs, and their weights as plain ones."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opd.errors import MissingDependencyError, ModelError

IDENTITY_ROWS = 1024  # inputs of a layer that are read at once while its weight is written out


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to quantise, by its name in a recipe."""

    config: str
    """Class in transformers."""
    packages: tuple[str, ...]
    devices: tuple[str, ...] = ("cuda", "cpu", "xpu")
    torchao: str | None = None
    """Class in torchao.quantization that the config wraps."""


METHODS = {
    "bitsandbytes-4bit": Method(config="BitsAndBytesConfig", packages=("bitsandbytes", "accelerate")),
    "bitsandbytes-8bit": Method(config="BitsAndBytesConfig", packages=("bitsandbytes", "accelerate")),
    "torchao-int8": Method(config="TorchAoConfig", packages=("torchao",), torchao="Int8WeightOnlyConfig"),
    "torchao-float8": Method(config="TorchAoConfig", packages=("torchao",), torchao="Float8WeightOnlyConfig"),
    "fp8": Method(config="FineGrainedFP8Config", packages=("accelerate",), devices=("cuda", "xpu")),
    "compressed-tensors": Method(config="CompressedTensorsConfig", packages=("compressed_tensors",)),
}
"""Of `load_options.quantization`; any other is a `load_options.quantization_config`, as transformers writes one."""


def quantization_options(
    quantization: str | None, settings: Mapping[str, Any], role: str, *, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Arguments of from_pretrained for one of METHODS, or for `settings` as transformers writes them; none for neither. Raises MissingDependencyError that names the package, and ModelError for a device that the method
    cannot run on, or for settings that transformers refuses."""
    place: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": str(device)}}
    if quantization is None:
        return {"quantization_config": _own_config(settings, role), **place} if settings else {}
    wanted, method = quantization, METHODS[quantization]
    if device.type not in method.devices:
        raise ModelError(
            f"{role}.load_options.quantization={wanted} does not run on {device.type}: it needs {' or '.join(method.devices)}. Set "
            f"{role}.device, or use another method ({', '.join(m for m, one in METHODS.items() if device.type in one.devices)})."
        )
    for package in method.packages:
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(
                f"{role}.load_options.quantization={wanted} needs {package}, which is not installed: pip install "
                f"{package.replace('_', '-')}."
            )
    return {"quantization_config": _config(wanted, method, dtype), **place}


def _config(wanted: str, method: Method, dtype: torch.dtype) -> Any:
    import transformers

    kind = getattr(transformers, method.config)
    if method.torchao is not None:
        return kind(getattr(importlib.import_module("torchao.quantization"), method.torchao)())
    if wanted == "bitsandbytes-4bit":  # NF4 with nested constants, as in QLoRA (arXiv 2305.14314)
        return kind(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    return kind(load_in_8bit=True) if wanted == "bitsandbytes-8bit" else kind()


def _own_config(settings: Mapping[str, Any], role: str) -> Any:
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        return AutoQuantizationConfig.from_dict(dict(settings))
    except ImportError as error:
        raise MissingDependencyError(f"{role}.load_options.quantization_config: {error}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"{role}.load_options.quantization_config cannot be used: {error}. Write it as transformers does in a quantised model's "
            "config.json (quant_method and its settings), or name one of transformers' methods in load_options.quantization: "
            f"{', '.join(METHODS)}."
        ) from None


def is_quantized(model: Any) -> bool:
    """Some of its weights are not what their numbers say."""
    return getattr(model, "hf_quantizer", None) is not None


def is_plain(parameter: Tensor) -> bool:
    """Its entries are the weight itself."""
    return type(parameter) is nn.Parameter and parameter.is_floating_point()


def prepare_quantized(model: Any) -> None:
    """Switch off bitsandbytes' packed 4-bit kernel for CPUs. It rounds to bfloat16, and it stays after the first pass without gradients,
    from when on no gradient flows through the layer, without an error."""
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def check_trainable(model: Any, name: str) -> None:
    """Raise ModelError for a checkpoint that is quantised as it is, and is to be trained without adapters."""
    if is_quantized(model):
        raise ModelError(
            f"The student '{name}' is a quantised checkpoint, whose weights cannot be trained. Train adapters beside them "
            "(student.lora.rank=32), or start from the checkpoint that it was made of."
        )


def check_head(model: Any, head: nn.Module, role: str, name: str) -> None:
    """Raise ModelError where a quantised model's output layer is quantised too: every log-prob comes from it."""
    weight = head.weight
    if is_quantized(model) and not (type(head) is nn.Linear and isinstance(weight, Tensor) and is_plain(weight)):
        raise ModelError(
            f"The {role} '{name}' is loaded with its output layer quantised ({type(head).__name__}, {type(weight).__name__}), and every "
            f"log-prob comes from it. Leave it whole: name it in {role}.load_options.quantization_config (llm_int8_skip_modules or "
            "modules_to_not_convert: [lm_head]; ignore: [lm_head] where the checkpoint was made), or use another checkpoint."
        )


def merged(model: Any) -> Any:
    """A peft model's base with its adapters in its weights, and every weight an ordinary one. The model is used up."""
    return merged_plain(model) if is_quantized(model) else model.merge_and_unload()


@torch.no_grad()
def merged_plain(model: Any) -> Any:
    """A quantised model with its adapters, as an ordinary one with the same function: every quantised layer becomes the weight that it
    multiplies with, plus its adapter's. Merging into the quantised weights would round the training away. The model is used up."""
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    dtype = base.get_output_embeddings().weight.dtype
    for name, module in list(base.named_modules()):
        if isinstance(module, LoraLayer):
            adapters: Any = module
            delta = sum(adapters.get_delta_weight(one).to(dtype) for one in adapters.active_adapters)
            _put(base, name, _plain(adapters.get_base_layer(), delta, dtype))
        elif _is_quantized_linear(module) and not name.endswith(".base_layer"):
            _put(base, name, _plain(module, 0, dtype))
    _forget_quantization(base)
    return base


def _is_quantized_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and isinstance(weight, Tensor) and not is_plain(weight)


def _plain(layer: Any, delta: Any, dtype: torch.dtype) -> nn.Linear:
    """The linear layer that computes what this one does. A method's own kernels tell its weight: it is what unit vectors give."""
    device = layer.weight.device
    weight = written_out(layer).to(dtype) + delta
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device=device, dtype=dtype)
    plain.weight.copy_(weight)
    if layer.bias is not None:
        plain.bias.copy_(layer.bias)
    return plain


@torch.no_grad()
def written_out(layer: Any) -> Tensor:
    """The weight that a linear layer multiplies with, in float32."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and is_plain(weight):
        return weight.float()
    device, parts = layer.weight.device, []
    compute = torch.float32 if layer.bias is None else layer.bias.dtype
    for start in range(0, layer.in_features, IDENTITY_ROWS):
        size = min(IDENTITY_ROWS, layer.in_features - start)
        units = torch.zeros(size, layer.in_features, device=device, dtype=compute)
        units[torch.arange(size), torch.arange(start, start + size)] = 1
        out = layer(units).float()
        parts.append(out if layer.bias is None else out - layer.bias.float())
    return torch.cat(parts).T.contiguous()


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent), last, module)


def _forget_quantization(model: Any) -> None:
    """What save_pretrained would write down about a quantisation that is gone."""
    model.hf_quantizer = None
    for name in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(model, name):
            setattr(model, name, False)
    if hasattr(model, "quantization_method"):
        del model.quantization_method
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


@torch.no_grad()
def entries(parameter: Tensor) -> Tensor:
    """A parameter's numbers, flat: those that it stands for where its class hides them, else those that it stores."""
    hidden = type(parameter).__module__.startswith("torchao")
    return (parameter.detach().dequantize() if hidden else parameter.detach()).flatten()
