"""Checkpoints as people have them: switches left in config.json, processors beside the weights, adapters of every kind, other dtypes,
code of their own."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from opd.config.recipe import build, merge
from opd.errors import MissingDependencyError, ModelError
from opd.models import linear_head, load_causal_lm
from opd.testing import byte_tokenizer, save_model, tiny_causal_lm
from opd.tokenizer import load_tokenizer
from opd.trainer.run import train
from worlds import settings

SMALL = {"layers": 1, "hidden": 16, "heads": 2, "kv_heads": 1, "max_positions": 64, "architecture": "llama"}
MOE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 257,
    "pad_token_id": 256,
}
IDS = torch.tensor([[1, 5, 6, 9]])


def load(folder: str | Path, **options: Any) -> PreTrainedModel:
    options = {"dtype": torch.float32, "role": "teacher", **options}
    return load_causal_lm(str(folder), device=torch.device("cpu"), **options)


def edited(folder: Path, **values: object) -> Path:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    return folder


def one_step(tmp_path: Path, student: Path, teacher: Path, **more: object) -> Path:
    (tmp_path / "own.jsonl").write_text('{"prompt": "hi"}\n')
    values = settings(tmp_path, tmp_path / "run", train__steps=1, eval__every=0, checkpoint__every=0, **more)
    values |= {
        "student.model": str(student),
        "teacher.model": str(teacher),
        "prompts.path": str(tmp_path / "own.jsonl"),
    }
    train(build(merge({}, values | {"prompts.eval_path": None})))
    return tmp_path / "run" / "student"


# --- what a config.json switches on -----------------------------------------------------------------------------------


def tiny_moe(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(vocab_size=258, num_local_experts=4, output_router_logits=True, **MOE))
    config = Qwen3MoeConfig(
        vocab_size=258, num_experts=4, moe_intermediate_size=16, head_dim=8, output_router_logits=True, **MOE
    )
    return Qwen3MoeForCausalLM(config)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_experts_saved_with_its_router_logits_trains_and_its_student_generates(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
):
    save_model(tiny_moe(kind), byte_tokenizer(), tmp_path / "moe")
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["output_router_logits"] is True
    saved = one_step(tmp_path, tmp_path / "moe", tmp_path / "moe", log__progress="plain")
    assert "note: output_router_logits=true in the config.json" in capsys.readouterr().out
    student = AutoModelForCausalLM.from_pretrained(saved)
    assert student.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2).shape[1] > IDS.shape[1]


@pytest.mark.parametrize(
    "switch", [{"return_dict": False}, {"output_hidden_states": True}, {"output_attentions": True}]
)
def test_what_a_config_adds_to_the_output_changes_nothing_about_the_logits(tmp_path: Path, switch: dict[str, bool]):
    save_model(tiny_causal_lm(byte_tokenizer(), **SMALL), byte_tokenizer(), tmp_path / "m")
    expected = load(tmp_path / "m")(IDS)
    output = load(edited(tmp_path / "m", **switch))(IDS)
    assert torch.equal(output.logits, expected.logits) and output.keys() == expected.keys()


# --- multimodal -------------------------------------------------------------------------------------------------------


def test_a_multimodal_student_trained_on_text_keeps_its_processor_and_forgets_its_switches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tokenizer = byte_tokenizer(extra_tokens=["<img>", "<boi>", "<eoi>"])
    text = {k: v for k, v in MOE.items() if k != "num_experts_per_tok"} | {
        "vocab_size": 261,
        "head_dim": 8,
        "output_hidden_states": True,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    marks = {"image_token_id": 258, "boi_token_id": 259, "eoi_token_id": 260, "mm_tokens_per_image": 4}
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, **marks))
    model.generation_config.eos_token_id = 257
    save_model(model, tokenizer, tmp_path / "g")
    for name in ("preprocessor_config.json", "processor_config.json", "image_processor_config.json"):
        (tmp_path / "g" / name).write_text(f'{{"of": "{name}"}}')
    assert load(tmp_path / "g")(IDS).hidden_states is None
    student = one_step(tmp_path, tmp_path / "g", tmp_path / "g", log__progress="plain")
    printed = capsys.readouterr().out
    assert "output_hidden_states=true" in printed and "text part alone" not in printed
    assert {file.name for file in (tmp_path / "g").iterdir()} <= {file.name for file in student.iterdir()}
    assert (student / "processor_config.json").read_text() == '{"of": "processor_config.json"}'


def test_a_checkpoint_of_which_the_text_part_alone_is_read_is_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """transformers' causal language model of Llama 4, Mllama and Qwen3.5 leaves the rest of the checkpoint out."""
    text = {
        "vocab_size": 261,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text |= {
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "layer_types": ["linear_attention", "full_attention"],
    }
    text |= {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 16,
        "num_position_embeddings": 16,
    }
    marks = {"image_token_id": 258, "video_token_id": 259, "vision_start_token_id": 260}
    torch.manual_seed(0)
    model = Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config=text, vision_config={**vision, "patch_size": 8}, **marks)
    )
    save_model(model, byte_tokenizer(extra_tokens=["<i>", "<v>", "<s>"]), tmp_path / "q")
    student = one_step(tmp_path, tmp_path / "q", tmp_path / "q", log__progress="plain")
    said = f"'{tmp_path / 'q'}' is a qwen3_5 checkpoint, of which the text part alone is read: student/ will be a Qwen3_5ForCausalLM"
    assert said in capsys.readouterr().out
    assert json.loads((student / "config.json").read_text())["architectures"] == ["Qwen3_5ForCausalLM"]


# --- adapters ---------------------------------------------------------------------------------------------------------

LORA: dict[str, Any] = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
ADAPTERS = {
    "matrices": LoraConfig(**LORA),
    "modules_to_save": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "token rows": LoraConfig(**LORA, trainable_token_indices=[5, 6]),
    "DoRA": LoraConfig(**LORA, use_dora=True),
    "rsLoRA": LoraConfig(**LORA, use_rslora=True),
    "DoRA and a head": LoraConfig(**LORA, use_dora=True, modules_to_save=["lm_head"]),
    "embeddings": LoraConfig(**{**LORA, "target_modules": ["q_proj", "embed_tokens"]}),
    "IA3": IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def adapter(tmp_path: Path, config: Any, rows: int | None = None, **shape: Any) -> tuple[Path, torch.Tensor]:
    """Its folder, and the logits of the model that it was trained as."""
    base = save_model(tiny_causal_lm(byte_tokenizer(), **SMALL, **shape), byte_tokenizer(), tmp_path / "base")
    inner = AutoModelForCausalLM.from_pretrained(base)
    if rows is not None:
        inner.resize_token_embeddings(rows)
    trained = get_peft_model(inner, copy.deepcopy(config))  # peft writes the base's path into it
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    trained.save_pretrained(tmp_path / "adapter")
    byte_tokenizer(extra_tokens=["<a>", "<b>"][: (rows or 258) - 258]).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", trained.eval()(IDS).logits.detach()


UNTIED = [(kind, False) for kind in ADAPTERS]
TIED = [(kind, True) for kind in ADAPTERS if kind != "embeddings"]  # peft trains only one end of those


@pytest.mark.parametrize(("kind", "tie"), [*UNTIED, *TIED])
def test_a_teacher_is_its_adapter_whatever_the_adapter_holds(tmp_path: Path, kind: str, tie: bool):
    folder, expected = adapter(tmp_path, ADAPTERS[kind], tie=tie)
    model = load(folder)
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    assert linear_head(model) is not None


@pytest.mark.parametrize("saved", [["lm_head", "embed_tokens"], None], ids=["modules_to_save", "rows of their own"])
def test_an_adapter_trained_with_added_tokens_brings_their_rows(tmp_path: Path, saved: list[str] | None):
    folder, expected = adapter(tmp_path, LoraConfig(**LORA, modules_to_save=saved), rows=260)
    model = load(folder)
    assert model.get_output_embeddings().weight.shape[0] == 260
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_teacher_with_modules_to_save_teaches(tmp_path: Path):
    folder, _ = adapter(tmp_path, ADAPTERS["modules_to_save"], tie=False)
    assert (one_step(tmp_path, tmp_path / "base", folder) / "model.safetensors").exists()


def test_an_adapter_without_a_tokenizer_has_its_base_s(tmp_path: Path):
    folder, _ = adapter(tmp_path, ADAPTERS["token rows"], tie=False)
    for file in [*folder.glob("tokenizer*"), *folder.glob("chat_template*")]:
        file.unlink()
    assert (one_step(tmp_path, tmp_path / "base", folder) / "model.safetensors").exists()
    assert load_tokenizer(str(folder)).get_vocab() == byte_tokenizer().get_vocab()


def test_an_adapter_that_cannot_be_used_is_refused_for_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, _ = adapter(tmp_path, ADAPTERS["modules_to_save"], tie=False)
    with pytest.raises(ModelError, match=r"student '.*' is a LoRA adapter.*merge_and_unload"):
        load(folder, role="student")
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({k: v for k, v in weights.items() if "lora_A" not in k}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"teacher '.*' lacks 1 of its weights \(.*q_proj.lora_A.*would be random"):
        load(folder)
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(
        ModelError, match=r"is an adapter of '.*base' \(base_model_name_or_path.*no such folder.*merged folder"
    ):
        load(folder)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"is an adapter, which needs peft.*pip install 'opd\[peft\]'"):
        load(folder)


def test_a_base_with_missing_weights_is_not_made_up_under_an_adapter(tmp_path: Path):
    folder, _ = adapter(tmp_path, ADAPTERS["matrices"], tie=False)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of its weights \(model.layers.0.mlp.up_proj"):
        load(folder)


def test_an_adapter_made_of_prompt_vectors_is_refused_as_what_it_is(tmp_path: Path):
    base = save_model(tiny_causal_lm(byte_tokenizer(), **SMALL), byte_tokenizer(), tmp_path / "base")
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), prefix).save_pretrained(tmp_path / "prefix")
    with pytest.raises(ModelError, match=r"adapter of the kind PREFIX_TUNING.*Give teacher.model a LoRA adapter"):
        load(tmp_path / "prefix")


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "trained", "asked", "saved", "said"),
    [
        (
            torch.bfloat16,
            "float32",
            "auto",
            torch.bfloat16,
            "came in bfloat16 and is trained in float32; student/ is saved in bfloat16 (as it came). Rounding can undo small updates; "
            "save.dtype=float32 keeps them",
        ),
        (
            torch.float16,
            "float32",
            "float32",
            torch.float32,
            "came in float16 and is trained in float32; student/ is saved in float32 (save.dtype=float32).",
        ),
        (
            torch.float32,
            "bfloat16",
            "auto",
            torch.float32,
            "came in float32 and is trained in bfloat16; student/ is saved in float32 (as it came).",
        ),
        (
            torch.float32,
            "float32",
            "bfloat16",
            torch.bfloat16,
            "student/ is saved in bfloat16 (save.dtype=bfloat16). Rounding",
        ),
        (torch.float32, "float32", "auto", torch.float32, None),
        (torch.bfloat16, "bfloat16", "auto", torch.bfloat16, None),
    ],
)
def test_a_student_trained_or_saved_in_another_dtype_than_it_came_in_is_announced(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stored: torch.dtype,
    trained: str,
    asked: str,
    saved: torch.dtype,
    said: str | None,
):
    model = tiny_causal_lm(byte_tokenizer(), **SMALL).to(stored)
    save_model(model, byte_tokenizer(), tmp_path / "m")
    more = {"student__dtype": trained, "save__dtype": asked, "log__progress": "plain"}
    student = one_step(tmp_path, tmp_path / "m", tmp_path / "m", **more)
    printed = capsys.readouterr().out
    assert {tensor.dtype for tensor in load_file(student / "model.safetensors").values()} == {saved}
    assert said in printed if said else "came in" not in printed


# --- code of their own ------------------------------------------------------------------------------------------------

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_code_that_comes_with_a_model_runs_only_when_the_key_that_the_refusal_names_is_set(
    tmp_path: Path, role: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    save_model(tiny_causal_lm(byte_tokenizer(), **SMALL), byte_tokenizer(), tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "own")
    (tmp_path / "own" / "modeling_own.py").write_text(CODE)
    places = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    edited(tmp_path / "own", model_type="own_llama", architectures=["OwnModel"], auto_map=places)
    sides = (tmp_path / "own", tmp_path / "plain") if role == "student" else (tmp_path / "plain", tmp_path / "own")
    with pytest.raises(
        ModelError, match=rf"{role} '.*own' comes with Python code of its own.*set {role}\.trust_remote_code=true"
    ):
        one_step(tmp_path, *sides)
    shutil.rmtree(tmp_path / "run")
    student = one_step(tmp_path, *sides, **{f"{role}__trust_remote_code": True})
    assert (student / "modeling_own.py").exists() == (role == "student")
    assert load(student, trust_remote_code=True)(IDS).logits.isfinite().all()
