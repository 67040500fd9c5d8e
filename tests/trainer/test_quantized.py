"""Quantised teachers and QLoRA students: the head stays whole, the saved student is the trained one, and what cannot be is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from opd.config import LoadOptionsConfig, PromptsConfig, StudentConfig, TeacherConfig
from opd.config.model import Quantization
from opd.config.recipe import build, merge
from opd.config.sections import parse_section
from opd.errors import ConfigError, MissingDependencyError, ModelError
from opd.models import output_layer, prepare_causal_lm
from opd.quantized import METHODS, merged_plain, quantization_options, written_out
from opd.testing import digit_tokenizer, save_model, tiny_causal_lm
from opd.trainer import train
from opd.trainer.load_models import load_model
from opd.trainer.lora import add_lora
from worlds import make_world, settings

pytestmark = pytest.mark.timeout(300)

CPU = torch.device("cpu")
PACKAGES = {"bitsandbytes-4bit": "bitsandbytes", "bitsandbytes-8bit": "bitsandbytes", "torchao-int8": "torchao", "torchao-float8": "torchao"}  # fmt: skip
ON_CPU = [
    pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}"))
    for name, package in PACKAGES.items()
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models wide enough for every method's blocks."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    for name, seed in (("student", 1), ("teacher", 2)):
        model = tiny_causal_lm(
            digit_tokenizer(), hidden=128, layers=2, max_positions=64, seed=seed, initializer_range=0.1
        )
        save_model(model, digit_tokenizer(), folder / name)
    return folder


def loaded(world: Path, name: str, quantization: str | None, role: str = "teacher") -> Any:
    options = LoadOptionsConfig(quantization=quantization)  # pyright: ignore[reportArgumentType]
    section = TeacherConfig(model=str(world / name), load_options=options)
    return load_model(section, role, PromptsConfig(path="-"), device="cpu").model


def test_the_methods_of_a_recipe_are_those_that_can_be_loaded():
    assert set(get_args(Quantization)) == set(METHODS)


@pytest.mark.parametrize("method", ON_CPU)
def test_a_quantised_teacher_keeps_its_head(world: Path, method: str):
    plain, model = loaded(world, "teacher", None), loaded(world, "teacher", method)
    assert type(output_layer(model).weight) is nn.Parameter
    assert torch.equal(output_layer(model).weight, output_layer(plain).weight)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        gap = (model(ids).logits - plain(ids).logits).abs().max()
    assert 0 < gap < (1.5 if "4bit" in method else 0.5)


@pytest.mark.parametrize("method", ON_CPU)
def test_gradients_flow_through_quantised_layers_after_a_pass_without(world: Path, method: str):
    """As in training, where rollouts come first. The reference is the same model with its weights written out."""
    section = StudentConfig(model=str(world / "student"), lora={"rank": 4})  # pyright: ignore[reportArgumentType]
    assert section.lora is not None
    gradients, ids = [], torch.arange(10)[None]
    for plain in (False, True):
        base = loaded(world, "student", method)
        with torch.no_grad():
            base(ids)
        model: Any = add_lora(merged_plain(base) if plain else base, section.lora, seed=0)
        with torch.no_grad():
            model(ids)
        model(ids).logits.log_softmax(-1)[..., 3].sum().backward()
        own = [p.grad.flatten() for n, p in model.named_parameters() if p.requires_grad and "layers.0" in n]
        gradients.append(torch.cat(own))
    tolerance = 0.05 if method == "bitsandbytes-8bit" else 1e-4
    assert (gradients[0] - gradients[1]).norm() < tolerance * gradients[1].norm()


@pytest.mark.parametrize("method", ON_CPU)
def test_a_weight_written_out_multiplies_as_the_quantised_layer_does(world: Path, method: str):
    layer = loaded(world, "student", method).model.layers[0].mlp.up_proj
    rows = torch.randn(16, layer.in_features, generator=torch.Generator().manual_seed(0))
    expected = layer(rows)
    if method == "bitsandbytes-8bit":  # its kernel quantises the inputs, too
        torch.testing.assert_close(
            rows @ written_out(layer).T, expected, rtol=0, atol=0.02 * float(expected.abs().max())
        )
    else:
        torch.testing.assert_close(rows @ written_out(layer).T, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ON_CPU)
def test_a_merged_qlora_student_computes_what_the_trained_one_did(world: Path, method: str, tmp_path: Path):
    """Merging into the quantised weights instead would round most of the adapter away."""
    section = StudentConfig(model=str(world / "student"), lora={"rank": 4})  # pyright: ignore[reportArgumentType]
    assert section.lora is not None
    model: Any = add_lora(loaded(world, "student", method), section.lora, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(10)[None]
    with torch.no_grad():
        trained, first = model(ids).logits, loaded(world, "student", method)(ids).logits
        plain = merged_plain(model)
        merged_logits = plain(ids).logits
    plain.save_pretrained(tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert getattr(again.config, "quantization_config", None) is None
    with torch.no_grad():
        assert torch.equal(again(ids).logits, merged_logits)
    moved = (trained - first).abs().max()
    exact = method != "bitsandbytes-8bit"  # that one also quantises the inputs of its products
    assert (merged_logits - trained).abs().max() < (1e-4 if exact else 0.5) * moved


@pytest.mark.parametrize("method", ON_CPU)
def test_a_recipe_trains_a_qlora_student_under_a_quantised_teacher(world: Path, method: str, tmp_path: Path):
    more = {
        "student.load_options.quantization": method,
        "teacher.load_options.quantization": method,
        "student.lora.rank": 4,
        "train.steps": 4,
    }
    config = build(merge({}, settings(world, tmp_path / "run") | more))
    train(config)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    assert all(type(p) is nn.Parameter and p.dtype == torch.float32 for p in student.parameters())
    train(build(merge({}, settings(world, tmp_path / "run") | more | {"train.steps": 6})), resume=True)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_quantised_student_without_adapters_is_refused():
    with pytest.raises(ConfigError, match=r"quantised weights cannot be trained.*student\.lora\.rank=32"):
        StudentConfig(model="-", load_options=LoadOptionsConfig(quantization="fp8"))


def test_a_checkpoint_that_is_quantised_as_it_is_needs_adapters_too(
    world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    from opd.trainer import load_models

    def quantised(*args: Any, **kwargs: Any) -> Any:
        model = tiny_causal_lm(digit_tokenizer(), hidden=32)
        model.hf_quantizer = object()
        return prepare_causal_lm(model, role=kwargs["role"], name="q")

    monkeypatch.setattr(load_models, "load_causal_lm", quantised)
    with pytest.raises(ModelError, match=r"quantised checkpoint.*student\.lora\.rank=32"):
        train(build(merge({}, settings(world, tmp_path / "run"))))


@pytest.mark.parametrize(("method", "package"), [("bitsandbytes-4bit", "bitsandbytes"), ("torchao-int8", "torchao"), ("compressed-tensors", "compressed-tensors")])  # fmt: skip
def test_a_package_that_is_missing_is_named(method: str, package: str, monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    name = package.replace("-", "_")
    monkeypatch.setattr(importlib.util, "find_spec", lambda one: None if one == name else find(one))
    with pytest.raises(MissingDependencyError, match=rf"teacher\.load_options.*pip install {package}\."):
        quantization_options(method, {}, "teacher", dtype=torch.float32, device=CPU)


def test_a_device_that_a_method_cannot_run_on_is_refused():
    with pytest.raises(ModelError, match=r"fp8 does not run on cpu: it needs cuda or xpu.*torchao-int8"):
        quantization_options("fp8", {}, "teacher", dtype=torch.float32, device=CPU)


def test_a_config_that_transformers_does_not_know_is_refused():
    with pytest.raises(
        ModelError, match=r"teacher\.load_options\.quantization_config cannot be used.*bitsandbytes-4bit"
    ):
        quantization_options(None, {"quant_method": "seven-bit"}, "teacher", dtype=torch.float32, device=CPU)


def test_a_quantised_student_cannot_be_sent_to_another_engine(world: Path, tmp_path: Path):
    more = {"student.load_options.quantization": "torchao-int8", "student.lora.rank": 4, "rollout.engine": "vllm"}
    with pytest.raises(ConfigError, match=r"rollout\.engine=vllm takes the student's whole weights"):
        build(merge({}, settings(world, tmp_path / "run") | more))


def test_two_ways_to_say_it_are_one_too_many():
    with pytest.raises(ConfigError, match="both say how to quantise"):
        LoadOptionsConfig(quantization="fp8", quantization_config={"quant_method": "fp8"})


def test_a_method_that_is_misspelt_is_suggested():
    with pytest.raises(ConfigError, match=r"Did you mean 'bitsandbytes-4bit'"):
        parse_section(LoadOptionsConfig, {"quantization": "bitsandbytes-4bits"})


def test_a_quantised_head_is_refused():
    model = tiny_causal_lm(digit_tokenizer(), hidden=32, tie=False)
    model.hf_quantizer = object()  # pyright: ignore[reportAttributeAccessIssue]
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(torch.zeros(head.weight.shape, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match=r"output layer quantised.*lm_head"):
        prepare_causal_lm(model, role="teacher", name="q")
