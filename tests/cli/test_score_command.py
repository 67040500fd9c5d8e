"""`opd score`: at every token of a text, the numbers are those that both models give it, and the page holds them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from desks import check_refusal, make_desk
from opd.cli.main import main
from opd.reporting.record import SampleRecord, read_samples
from opd.testing import CHAT_TEMPLATE, byte_tokenizer, save_model, tiny_causal_lm

SIZES = {"hidden": 32, "layers": 1, "max_positions": 64, "initializer_range": 0.4}
TWO = ["--student", "student", "--teacher", "teacher"]
WRONG = {
    "no student": (["rows.jsonl", "--teacher", "teacher"], "Give the model that is compared: --student MODEL."),
    "no teacher": (["rows.jsonl", "--student", "student"], "Give the teacher: --teacher MODEL|URL."),
    "no file": (TWO, "Give one file of texts, not 0"),
    "no such file": (["row.jsonl", *TWO], "row.jsonl does not exist; did you mean rows.jsonl?"),
    "no such text": (["row.txt", *TWO], "There is no file 'row.txt'"),
    "no such teacher": (["rows.jsonl", "--student", "student", "--teacher", "./no"], "There is no folder './no'."),
    "another kind of page": (["rows.jsonl", *TWO, "--out", "page.pdf"], "'page.pdf' does not end in .html"),
    "a taken page": (["rows.jsonl", *TWO, "--out", "taken.html"], "'taken.html' is there already"),
    "taken lines": (["rows.jsonl", *TWO, "--out", "rows.html"], "'rows.jsonl' is there already"),
    "one word": (["word.jsonl", *TWO], "line 1 of word.jsonl has no second word, so there is nothing to score"),
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_desk(tmp_path_factory.mktemp("desk"))
    for name, seed in (("chat", 3), ("tutor", 4)):
        tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
        save_model(tiny_causal_lm(tokenizer, seed=seed, **SIZES), tokenizer, folder / name)
    (folder / "rows.jsonl").write_text('{"prompt": "12>", "response": "21"}\n{"prompt": "3>", "response": "3456"}\n')
    (folder / "word.jsonl").write_text('{"text": "alone"}\n')
    (folder / "taken.html").write_text("")
    return folder


def scored(out: Path, *words: object) -> list[SampleRecord]:
    """The lines that `opd score WORDS` wrote beside its page."""
    assert main(["score", *map(str, words), "--out", str(out)]) == 0
    assert out.exists()
    run = out.parent / f"{out.stem}-run"
    run.mkdir()
    (run / "samples.jsonl").write_bytes(out.with_suffix(".jsonl").read_bytes())
    return read_samples(run)


@torch.no_grad()
def log_probs(folder: Path, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    """[tokens, vocabulary], by transformers alone."""
    ids = torch.tensor([[*prompt, *response]])
    logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits[0]
    return logits[len(prompt) - 1 : -1].double().log_softmax(-1)


def check_numbers(
    sample: SampleRecord, folders: tuple[Path, Path], prompt: Sequence[int], response: Sequence[int]
) -> None:
    student, teacher = (log_probs(folder, prompt, response) for folder in folders)
    details, own = sample.details, torch.tensor(response)[:, None]
    assert details is not None and sample.reverse_kl is not None
    assert len(sample.tokens) == len(response)
    close: Any = {"rel": 2e-3, "abs": 2e-4}  # records keep four digits
    for logp, found, entropy, top in (
        (student, details.student_logp, details.student_entropy, details.student_top),
        (teacher, details.teacher_logp, details.teacher_entropy, details.teacher_top),
    ):
        assert list(found or ()) == pytest.approx(logp.gather(-1, own)[:, 0].tolist(), **close)
        assert list(entropy or ()) == pytest.approx((-(logp.exp() * logp).sum(-1)).tolist(), **close)
        assert top is not None and all(len(row) == 5 for row in top.tokens)
        assert [row[0] for row in top.probabilities] == pytest.approx(logp.exp().max(-1).values.tolist(), **close)
    expected = (student.exp() * (student - teacher)).sum(-1).tolist()
    assert list(sample.reverse_kl) == pytest.approx(expected, **close)


def test_prompt_and_response_are_scored_with_the_end(desk: Path, tmp_path: Path):
    """Digit d has id d, the separator 10, and the end 12."""
    words = ("--student", desk / "student", "--teacher", desk / "teacher")
    first, second = scored(tmp_path / "page.html", desk / "rows.jsonl", *words)
    folders = (desk / "student", desk / "teacher")
    check_numbers(first, folders, [1, 2, 10], [2, 1, 12])
    check_numbers(second, folders, [3, 10], [3, 4, 5, 6, 12])
    assert (first.prompt, first.response, first.finished, first.tokens) == ("12>", "21", True, ("2", "1", "<eos>"))


def test_a_text_is_scored_from_its_second_word_and_without_an_end(desk: Path, tmp_path: Path):
    (tmp_path / "note.txt").write_text(" one two  three")
    (tmp_path / "rows.jsonl").write_text('{"text": "one two", "prompt_id": 7}\n{"text": "a\\nb"}\n')
    words = ("--student", desk / "chat", "--teacher", desk / "tutor")
    (note,) = scored(tmp_path / "note.html", tmp_path / "note.txt", *words)
    check_numbers(note, (desk / "chat", desk / "tutor"), list(b" one"), list(b" two  three"))
    rows = scored(tmp_path / "page.html", tmp_path / "rows.jsonl", *words)
    assert [(row.prompt, row.response) for row in rows] == [("one", " two"), ("a", "\nb")]


def test_messages_are_scored_through_the_chat_template(desk: Path, tmp_path: Path):
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"prompt": messages}) + "\n")
    (row,) = scored(
        tmp_path / "page.html", tmp_path / "chat.jsonl", "--student", desk / "chat", "--teacher", desk / "tutor"
    )
    check_numbers(row, (desk / "chat", desk / "tutor"), list(b"<|user|>2+2?\n<|assistant|>"), [ord("4"), 257])


def test_a_runs_checkpoint_is_scored_against_the_runs_teacher(desk: Path, tmp_path: Path):
    """Without --teacher, the run's own."""
    name = "step-00000002"
    assert main(["export", str(desk / "run" / "checkpoints" / name), "--out", str(tmp_path / "then")]) == 0
    first, _ = scored(tmp_path / "page.html", desk / "rows.jsonl", "--student", desk / "run" / "checkpoints" / name)
    check_numbers(first, (tmp_path / "then", desk / "teacher"), [1, 2, 10], [2, 1, 12])


def test_the_page_holds_the_viewer_and_no_words_about_a_run(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ("--student", desk / "student", "--teacher", desk / "teacher", "--limit", 1)
    (row,) = scored(tmp_path / "new" / "page.html", desk / "rows.jsonl", *words)
    page = (tmp_path / "new" / "page.html").read_text()
    assert 'id="token-by-token"' in page and "rows.jsonl" in page
    assert "No training step" not in page and "evaluations" not in page.split("<script")[0]
    lines = capsys.readouterr().out.splitlines()
    assert row.reverse_kl is not None
    assert lines[0].startswith(f"row 0: 3 tokens, reverse KL {sum(row.reverse_kl) / 3:.4g} nats")
    worst = max(range(3), key=row.reverse_kl.__getitem__)
    assert f"worst token {row.tokens[worst]!r}" in lines[0]
    assert lines[1:] == [f"page: {tmp_path / 'new' / 'page.html'}", f"lines: {tmp_path / 'new' / 'page.jsonl'}"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "one"}, "row 0 has no response, so there is nothing to score."),
        (
            {"prompt": "one", "response": "x" * 90},
            "row 0 has 94 tokens, prompt and response together, and the models read 64.",
        ),
    ],
)
def test_a_row_that_cannot_be_scored_is_named_and_nothing_is_written(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, str], said: str
):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    words = ["--student", str(desk / "chat"), "--teacher", str(desk / "tutor"), "--out", str(tmp_path / "page.html")]
    assert main(["score", str(tmp_path / "rows.jsonl"), *words]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_word_is_refused_before_torch_is_imported(desk: Path, case: str):
    words, said = WRONG[case]
    check_refusal(desk, ["score", *words], said)
