"""`opd export`: the folder of a checkpoint computes what the run's student computed then, and is whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from desks import check_refusal, make_desk
from opd.cli.main import main
from opd.models import load_causal_lm
from opd.testing import CHAT_TEMPLATE

IDS = torch.tensor([[1, 2, 3, 10, 4, 5]])
WRONG = {
    "a plain model": (["student"], "'student' is no checkpoint of a run: it can be loaded as it is."),
    "a taken folder": (
        ["run", "--out", "teacher"],
        "'teacher' is there already; give --out a folder that is new or empty.",
    ),
    "a place in a file": (
        ["run", "--out", "recipe.yaml/x"],
        "'recipe.yaml' is a file, so 'recipe.yaml/x' cannot be written",
    ),
    "merging nothing": (["run", "--merge"], "--merge is about adapters, and this run trained all weights; drop it."),
    "a dtype": (["run", "--dtype", "int8"], "--dtype takes auto, float32, bfloat16, float16, not 'int8'."),
    "no checkpoint": ([], "Give one checkpoint, not 0"),
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_desk(tmp_path_factory.mktemp("desk"))
    (folder / "student" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


def exported(folder: Path, out: Path, *words: str) -> list[str]:
    """Names of the files of the folder that `opd export` wrote."""
    assert main(["export", str(folder), "--out", str(out), *words]) == 0
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["run", "run/checkpoints/step-00000004"])
def test_the_last_checkpoint_is_the_runs_student(desk: Path, tmp_path: Path, name: str):
    out = tmp_path / "out"
    files = exported(desk / name, out)
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    } <= set(files)
    assert torch.equal(logits(out), logits(desk / "run" / "student"))
    assert AutoTokenizer.from_pretrained(out).chat_template == CHAT_TEMPLATE
    assert (out / "generation_config.json").read_bytes() == (
        desk / "run" / "student" / "generation_config.json"
    ).read_bytes()


def test_an_earlier_checkpoint_is_an_earlier_student(desk: Path, tmp_path: Path):
    exported(desk / "run" / "checkpoints" / "step-00000002", tmp_path / "out")
    weights = load_file(desk / "run" / "checkpoints" / "step-00000002" / "weights.safetensors")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(written[name], value) for name, value in weights.items())
    assert not torch.equal(logits(tmp_path / "out"), logits(desk / "run" / "student"))


def test_adapters_are_written_alone_or_merged_as_well(desk: Path, tmp_path: Path):
    files = exported(desk / "lora", tmp_path / "alone")
    assert "adapter/adapter_model.safetensors" in files and not [name for name in files if "/" not in name]
    files = exported(desk / "lora", tmp_path / "both", "--merge")
    assert {"adapter/adapter_config.json", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    merged = logits(desk / "lora" / "student")
    assert torch.equal(logits(tmp_path / "both"), merged)
    for adapter in (tmp_path / "alone" / "adapter", tmp_path / "both" / "adapter"):
        with torch.no_grad():
            model = load_causal_lm(str(adapter), dtype=torch.float32, device=torch.device("cpu"))
            torch.testing.assert_close(model(IDS).logits, merged, rtol=1e-4, atol=1e-5)
    assert not list(tmp_path.glob(".*")), "nothing is left beside the folders"


def test_weights_have_the_dtype_of_the_model_that_the_run_began_with(desk: Path, tmp_path: Path):
    run = desk / "run"
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(desk / "student", dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(desk / "student").save_pretrained(half)
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(desk / "student"), str(half)))
    (own / "checkpoints").symlink_to(run / "checkpoints")
    for words, dtype in (((), "bfloat16"), (("--dtype", "float32"), "float32")):
        out = tmp_path / dtype
        exported(own, out, *words)
        assert json.loads((out / "config.json").read_text())["dtype"] == dtype
        assert {str(value.dtype) for value in load_file(out / "model.safetensors").values()} == {f"torch.{dtype}"}


def test_the_default_place_is_in_the_run_and_is_taken_once(desk: Path, capsys: pytest.CaptureFixture[str]):
    name = "step-00000002"
    place = desk / "run" / "exported" / name
    assert main(["export", str(desk / "run" / "checkpoints" / name)]) == 0
    assert capsys.readouterr().out == f"{place}\n"
    assert main(["export", str(desk / "run" / "checkpoints" / name)]) == 1
    assert "is there already" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused_and_nothing_is_written(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    own = tmp_path / "own"
    (own / "checkpoints" / "step-00000001").mkdir(parents=True)
    (own / "config.yaml").write_bytes((desk / "run" / "config.yaml").read_bytes())
    for name in ("weights.safetensors", "state.json"):
        (own / "checkpoints" / "step-00000001" / name).write_bytes(b"{}")
    assert main(["export", str(own)]) == 1
    assert "cannot be read" in capsys.readouterr().err
    adapted = desk / "lora" / "checkpoints" / "step-00000004" / "weights.safetensors"
    (own / "checkpoints" / "step-00000001" / "weights.safetensors").write_bytes(adapted.read_bytes())
    assert main(["export", str(own)]) == 1
    assert "is of another model" in capsys.readouterr().err
    assert not (own / "exported").exists()


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_word_is_refused_before_torch_is_imported(desk: Path, case: str):
    words, said = WRONG[case]
    check_refusal(desk, ["export", *words], said)
