"""`opd sample`: the model's own answers, through its chat template, alone on standard output, and piece by piece in a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from desks import TIMEOUT_S, check_refusal, make_desk
from opd.cli.main import main
from opd.data.prompts import load_prompts
from opd.data.rendering import Renderer
from opd.testing import CHAT_TEMPLATE, byte_tokenizer, save_model, tiny_causal_lm
from opd.trainer.ask import _Pieces

SIZES = {"hidden": 32, "layers": 1, "max_positions": 128, "initializer_range": 0.4}
WRONG = {
    "no prompt": (["student"], "Give either --prompt TEXT or --prompts FILE"),
    "two prompts": (
        ["student", "--prompt", "1>", "--prompts", "prompts.jsonl"],
        "Give either --prompt TEXT or --prompts FILE",
    ),
    "no model": (["--prompt", "1>"], "Give one model, not 0"),
    "no such model": (["./stduent", "--prompt", "1>"], "Did you mean 'student'?"),
    "no such prompts": (["student", "--prompts", "nowhere.jsonl"], "the prompt file nowhere.jsonl does not exist"),
    "an option": (["student", "--prompt", "1>", "--temprature", "0"], "Did you mean --temperature?"),
    "a share": (["student", "--prompt", "1>", "--top-p", "1.5"], "--top-p takes a number above 0, up to 1, not '1.5'."),
    "a count": (["student", "--prompt", "1>", "-n", "0"], "--samples takes a whole number from 1 up, not '0'."),
    "plain and system": (["student", "--prompt", "1>", "--plain", "--system", "x"], "leaves no place for --system"),
    "nothing to answer": (["student", "--prompt", "-"], "The prompt on standard input is empty"),
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_desk(tmp_path_factory.mktemp("desk"))
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    save_model(tiny_causal_lm(tokenizer, seed=3, **SIZES), tokenizer, folder / "chat")
    return folder


@pytest.fixture
def opd(capsys: pytest.CaptureFixture[str]):
    """Standard output and standard error of `opd sample WORDS`."""

    def run(*words: object) -> tuple[str, str]:
        capsys.readouterr()
        assert main(["sample", *map(str, words)]) == 0
        said = capsys.readouterr()
        return said.out, said.err

    return run


def greedy(folder: Path, text: str, tokens: int) -> str:
    """What transformers itself generates after this text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        out = AutoModelForCausalLM.from_pretrained(folder).generate(ids, do_sample=False, max_new_tokens=tokens)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_answer_alone_is_on_standard_output(desk: Path, opd: Any):
    out, err = opd(desk / "student", "--prompt", "12>", "--temperature", 0, "--max-new-tokens", 7)
    assert out == greedy(desk / "student", "12>", 7) + "\n"
    assert re.search(r"^\d+ tokens?", err, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "<|user|>2+2?\n<|assistant|>"),
        (("--system", "Be brief."), "<|system|>Be brief.\n<|user|>2+2?\n<|assistant|>"),
        (("--plain",), "2+2?"),
    ],
)
def test_a_prompt_is_what_the_chat_template_makes_of_it(desk: Path, opd: Any, words: tuple[str, ...], text: str):
    out, err = opd(
        desk / "chat", "--prompt", "2+2?", "--temperature", 0, "--max-new-tokens", 8, "--show-prompt", *words
    )
    assert json.loads(
        opd(desk / "chat", "--prompt", "2+2?", "--temperature", 0, "--max-new-tokens", 8, "--json", *words)[0]
    )["response"] == greedy(desk / "chat", text, 8)
    assert text in err
    assert out.endswith("\n")


def test_a_seed_gives_the_same_answers_and_another_seed_others(desk: Path, opd: Any):
    words = (
        desk / "student",
        "--prompts",
        desk / "prompts.jsonl",
        "--limit",
        3,
        "-n",
        2,
        "--max-new-tokens",
        9,
        "--json",
    )
    first, again, other = opd(*words)[0], opd(*words)[0], opd(*words, "--seed", 1)[0]
    assert first == again != other
    rows = [json.loads(line) for line in first.splitlines()]
    assert [row["index"] for row in rows] == [0, 0, 1, 1, 2, 2]
    assert len({row["response"] for row in rows}) > 3


def test_rows_of_json_are_prompts_with_responses(desk: Path, tmp_path: Path, opd: Any):
    out, _ = opd(desk / "chat", "--prompt", "2+2?", "-n", 3, "--max-new-tokens", 5, "--json")
    (tmp_path / "rows.jsonl").write_text(out)
    prompts = load_prompts(str(tmp_path / "rows.jsonl"))
    assert [prompt.messages for prompt in prompts] == [({"role": "user", "content": "2+2?"},)] * 3
    assert [prompt.response for prompt in prompts] == [json.loads(line)["response"] for line in out.splitlines()]


def test_run_checkpoint_and_recipe_are_different_models(desk: Path, opd: Any):
    words = ("--prompts", desk / "prompts.jsonl", "--limit", 8, "--json")
    names = ("run", "run/checkpoints/step-00000002", "recipe.yaml", "lora/checkpoints/step-00000004")
    found = {name: opd(desk / name, *words)[0] for name in names}
    assert len(set(found.values())) == 4
    assert found["recipe.yaml"] == opd(desk / "student", *words, "--max-new-tokens", 6)[0]
    assert found["run"] == opd(desk / "run" / "student", *words, "--max-new-tokens", 6)[0]


def test_several_answers_say_which_prompt_they_are_to(desk: Path, opd: Any):
    out, _ = opd(desk / "student", "--prompts", desk / "prompts.jsonl", "--limit", 2, "-n", 2, "--max-new-tokens", 2)
    assert [line for line in out.splitlines() if line.startswith(("prompt", "answer"))] == [
        line
        for line in out.splitlines()
        if re.fullmatch(r"prompt [01]|answer [12] of 2: [12] tokens?(, cut off)?", line)
    ]
    assert out.count("answer 2 of 2") == 2 and "│ 7919>" in out


def test_a_prompt_may_come_from_standard_input(desk: Path, opd: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("12>"))
    words = ("--temperature", 0, "--max-new-tokens", 7)
    assert opd(desk / "student", "--prompt", "-", *words)[0] == opd(desk / "student", "--prompt", "12>", *words)[0]


def test_pieces_are_whole_characters_and_make_the_text():
    renderer = Renderer(byte_tokenizer(), name="bytes")
    ids = list("aé→🙂b".encode())
    pieces: list[str] = []
    tell = _Pieces(renderer, pieces.append)
    for end in range(1, len(ids) + 1):
        tell([ids[:end]])
    assert pieces == ["a", "é", "→", "🙂", "b"]


def test_a_terminal_shows_the_same_answer_as_a_pipe(desk: Path, opd: Any):
    words = ["sample", str(desk / "chat"), "--prompt", "2+2?", "--max-new-tokens", "40", "--seed", "5"]
    alone, _ = opd(*words[1:])
    assert len(alone) > 10
    master, slave = pty.openpty()
    child = subprocess.Popen([sys.executable, "-m", "opd.cli.main", *words], stdout=slave, stderr=subprocess.DEVNULL)
    os.close(slave)
    shown, reads, until = b"", 0, time.monotonic() + TIMEOUT_S
    try:
        while time.monotonic() < until:
            try:
                part = os.read(master, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown, reads = shown + part, reads + 1
        assert child.wait(timeout=TIMEOUT_S) == 0
    finally:
        child.kill()
        child.wait(timeout=TIMEOUT_S)
        os.close(master)
    assert shown.decode().replace("\r\n", "\n") == alone
    assert reads > 1, "it came in pieces"


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_word_is_refused_before_torch_is_imported(desk: Path, case: str):
    words, said = WRONG[case]
    check_refusal(desk, ["sample", *words], said)
