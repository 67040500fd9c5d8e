"""student/ and adapter/ as a run leaves them: dtype, files, model card, and the hub."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import opd
from opd.config.recipe import build
from opd.config.save import SaveConfig
from opd.config.words import merge
from opd.errors import ConfigError
from opd.reporting.about import read_about
from opd.testing import byte_tokenizer, save_model, tiny_causal_lm
from opd.trainer.distiller import Distiller
from opd.trainer.launch import Launch

HALVES = [torch.bfloat16, torch.float16]


def folder(place: Path, dtype=torch.float32, **shape) -> Path:
    tokenizer = byte_tokenizer()
    shape = {"layers": 1, "hidden": 32, "seed": 1, **shape}
    save_model(tiny_causal_lm(tokenizer, **shape).to(dtype), tokenizer, place)
    return place


def run(tmp_path: Path, student: Path, **more):
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n}>", "answer": str(n)}) + "\n" for n in range(8))
    )
    teacher = tmp_path / "teacher"
    if not teacher.exists():
        folder(teacher, seed=2)
    prompts = str(tmp_path / "p.jsonl")
    values = {
        "student.model": str(student), "teacher.model": str(teacher), "prompts.path": prompts, "prompts.eval_path": prompts,
        "train.steps": 2, "train.prompts_per_step": 4, "train.samples_per_prompt": 2, "rollout.max_new_tokens": 6,
        "eval.prompts": 8, "optimizer.lr": 3e-2, "run_dir": str(tmp_path / "run"), "log.progress": "off",
    }  # fmt: skip
    config = build(merge({}, values | {name.replace("__", "."): value for name, value in more.items()}))
    return Distiller.from_config(config, launch=Launch(command="opd train r.yaml", folder=tmp_path)).train()


def weights(place: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(place / name)


# The dtype


@pytest.mark.parametrize(
    "shape", [{"tie": True}, {"tie": False}, {"architecture": "gpt2"}, {"architecture": "llama"}], ids=str
)
@pytest.mark.parametrize("stored", HALVES, ids=str)
def test_a_student_is_saved_in_the_dtype_it_came_in_and_stays_whole_in_memory(tmp_path: Path, stored, shape):
    came = folder(tmp_path / "m", stored, **shape)
    done = run(tmp_path, came)
    saved = weights(done.path / "student")
    assert {value.dtype for value in saved.values()} == {stored} and saved.keys() == weights(came).keys()
    trained = {name: value.detach() for name, value in done.student.state_dict().items()}
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert all(torch.equal(value, trained[name].to(stored)) for name, value in saved.items())
    assert any(not torch.equal(value, weights(came)[name]) for name, value in saved.items())
    config = json.loads((done.path / "student" / "config.json").read_text())
    assert config["dtype"] == str(stored).removeprefix("torch.")
    again = AutoModelForCausalLM.from_pretrained(done.path / "student", dtype="auto")
    assert again.dtype == stored
    ids = torch.arange(2, 12)[None]
    torch.testing.assert_close(again.float()(ids).logits, done.student(ids).logits, atol=0.05, rtol=0.05)


def test_a_dtype_that_is_named_is_the_one(tmp_path: Path):
    came = folder(tmp_path / "m", torch.bfloat16)
    done = run(tmp_path, came, save__dtype="float32")
    trained = done.student.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in weights(done.path / "student").items())
    assert json.loads((done.path / "student" / "config.json").read_text())["dtype"] == "float32"


def test_float16_that_cannot_hold_a_weight_leaves_the_dtype_of_training(tmp_path: Path):
    model = tiny_causal_lm(byte_tokenizer(), layers=1, hidden=32, seed=1)
    with torch.no_grad():
        model.lm_head.weight[-1, -1] = 1e5
    save_model(model, byte_tokenizer(), tmp_path / "m")
    done = run(tmp_path, tmp_path / "m", save__dtype="float16")
    assert {value.dtype for value in weights(done.path / "student").values()} == {torch.float32}
    assert json.loads((done.path / "student" / "config.json").read_text())["dtype"] == "float32"


def test_an_adapter_and_its_merged_student_have_the_dtype_of_the_base(tmp_path: Path):
    done = run(tmp_path, folder(tmp_path / "m", torch.bfloat16), student__lora__rank=2)
    assert {value.dtype for value in weights(done.path / "adapter", "adapter_model.safetensors").values()} == {
        torch.bfloat16
    }
    assert {value.dtype for value in weights(done.path / "student").values()} == {torch.bfloat16}


def test_distiller_save_takes_the_same_dtype(tmp_path: Path):
    came = folder(tmp_path / "m", torch.bfloat16)
    teacher = folder(tmp_path / "t", seed=2)
    distiller = opd.Distiller(
        student=str(came), teacher=str(teacher), prompts=["a", "b"], run_dir=tmp_path / "run", eval={"every": 0}
    )
    assert {value.dtype for value in weights(distiller.save(tmp_path / "out")).values()} == {torch.bfloat16}


# The files


def test_how_a_tokenizer_was_loaded_is_not_saved_and_generation_settings_are(tmp_path: Path):
    came = folder(tmp_path / "m")
    settings = json.loads((came / "generation_config.json").read_text()) | {"temperature": 0.7, "do_sample": True}
    (came / "generation_config.json").write_text(json.dumps(settings))
    again = AutoTokenizer.from_pretrained(came)
    again.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert "is_local" in written, "transformers writes it no more, so nothing needs to be taken out"
    (came / "tokenizer_config.json").write_text(json.dumps(written))
    done = run(tmp_path, came)
    found = json.loads((done.path / "student" / "tokenizer_config.json").read_text())
    assert found == {key: value for key, value in written.items() if key not in ("is_local", "local_files_only")}
    kept = json.loads((done.path / "student" / "generation_config.json").read_text())
    assert kept == settings


# The card


def test_the_card_says_what_was_trained_how_and_with_which_result(tmp_path: Path):
    done = run(tmp_path, folder(tmp_path / "m"), student__lora__rank=2)
    assert done.summary is not None
    for name, library in (("student", "transformers"), ("adapter", "peft")):
        text = (done.path / name / "README.md").read_text()
        _, front, body = text.split("---\n", 2)
        assert yaml.safe_load(front)["library_name"] == library
        assert "base_model" not in yaml.safe_load(front)  # a local folder is no name on the hub
        after = done.summary["student_after"]
        low, high = after["interval"]
        assert f"| student after | {100 * after['accuracy']:.1f}% [{100 * low:.1f}, {100 * high:.1f}] |" in body
        assert "| student before |" in body and "| teacher |" in body
        assert f"`{tmp_path / 'm'}`" in body and f"`{tmp_path / 'teacher'}` as its teacher" in body
        assert "```\nopd train r.yaml\n```" in body and f"torch {torch.__version__.split('+')[0]}" in body
        recipe = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
        assert recipe["student.lora.rank"] == 2 and recipe["teacher.model"] == str(tmp_path / "teacher")
        assert "train.layout" not in recipe
    assert "LoRA adapter of" in (done.path / "adapter" / "README.md").read_text()


def test_a_run_without_evaluation_says_so_in_its_card(tmp_path: Path):
    done = run(tmp_path, folder(tmp_path / "m"), eval__every=0)
    assert "The run was not evaluated." in (done.path / "student" / "README.md").read_text()


def test_a_model_of_the_hub_is_named_as_the_base(tmp_path: Path):
    from opd.reporting.card import model_card

    settings = {
        "student": {"model": "Qwen/Qwen3-0.6B"},
        "teacher": {"model": "Qwen/Qwen3-8B"},
        "prompts": {"path": "p"},
    }
    front = model_card(tmp_path, None, settings, dtype="bfloat16", adapter=False).split("---\n")[1]
    assert yaml.safe_load(front)["base_model"] == "Qwen/Qwen3-0.6B"


# What ran


def test_a_run_keeps_its_command_versions_and_hardware(tmp_path: Path):
    about = read_about(run(tmp_path, folder(tmp_path / "m")).path)
    assert about is not None
    assert about.command == "opd train r.yaml" and about.versions["torch"] == torch.__version__
    assert {"opd", "python", "transformers", "peft"} <= about.versions.keys()
    assert " core" in about.hardware and "GiB" in about.hardware


# The hub


class Hub(BaseHTTPRequestHandler):
    """Takes a repository and a commit of small files, as the hub does."""

    asked: list[tuple[str, dict]] = []  # noqa: RUF012
    committed: list[dict] = []  # noqa: RUF012

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        base = f"http://127.0.0.1:{self.server.server_port}"
        if self.path == "/api/repos/create":
            self.asked.append((self.path, json.loads(body)))
            answer = {"url": f"{base}/ada/tiny", "name": "ada/tiny", "id": "1"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif "/commit/" in self.path:
            self.committed.extend(json.loads(line) for line in body.splitlines())
            answer = {"commitUrl": f"{base}/ada/tiny/commit/1", "commitOid": "1", "success": True}
        else:
            answer = {}
        self.answer(answer)

    def do_GET(self):
        self.answer({"name": "ada", "type": "user", "auth": {"accessToken": {"role": "write"}}, "sha": "0", "id": "ada/tiny", "siblings": []})  # fmt: skip

    def answer(self, value):
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words):
        pass


@pytest.fixture
def student(tmp_path: Path) -> Path:
    place = tmp_path / "student"
    place.mkdir()
    (place / "config.json").write_text("{}")
    (place / "README.md").write_text("# card")
    return place


PUSH = """
import sys
from pathlib import Path
from opd.config.save import SaveConfig
from opd.trainer.saving import push_student
print(push_student(Path(sys.argv[1]), SaveConfig(push_to_hub="ada/tiny")))
"""


def push(endpoint: str, student: Path) -> str:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_standin", "HF_HUB_OFFLINE": "0"}
    words = [sys.executable, "-c", PUSH, str(student)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_student_is_uploaded_whole_into_a_private_repository(student):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        said = push(f"http://127.0.0.1:{server.server_port}", student)
    finally:
        server.shutdown()
        server.server_close()
    assert said.startswith("The student is on the hub: ") and "ada/tiny" in said
    assert Hub.asked[0][1]["visibility"] == "private"
    files = [line["value"]["path"] for line in Hub.committed if line["key"] == "file"]
    assert sorted(files) == ["README.md", "config.json"]


def test_a_hub_that_cannot_be_reached_costs_nothing_and_says_how_to_upload_by_hand(student):
    said = push("http://127.0.0.1:9", student)
    assert said.startswith(f"The student is in {student} and not on the hub (")
    assert said.endswith(f"Upload it by hand: hf auth login, then hf upload ada/tiny {student} --private")


def test_a_name_that_is_no_repository_is_refused_before_the_run():
    with pytest.raises(ConfigError, match=r"save.push_to_hub=tiny is no repository; write USER/NAME"):
        SaveConfig(push_to_hub="tiny")
