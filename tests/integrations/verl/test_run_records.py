"""The run folder of the plugin: samples are what plain transformers say about the tokens in float64, metrics are verl's."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from verl_engines import RESPONSE_LENGTHS, batch, engine, step

from opd.data.rendering import Renderer
from opd.errors import ConfigError, RunFolderError
from opd.integrations.verl.plugin.alignment import ResponseTokens
from opd.integrations.verl.plugin.run_records import RunWriter
from opd.integrations.verl.plugin.settings import parse
from opd.reporting.record import SampleRecord, TopTokens, read_metrics, read_samples
from opd.reporting.report import write_report
from opd.testing import byte_tokenizer

TOKENS = 258  # of the byte tokenizer
RENDERER = Renderer(byte_tokenizer(), name="tiny")


def recorded(models: Path, run_dir: Path, data=None, **keys) -> tuple[list[SampleRecord], object]:
    built = engine(models, run_dir=str(run_dir), **keys)
    step(built, batch() if data is None else data)
    return read_samples(run_dir), built


def by_hand(folder: Path, prompt: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        logits = model(torch.cat([prompt, response])[None]).logits[0]
    return logits[len(prompt) - 1 : -1, :TOKENS].log_softmax(-1)


def check_top(top: TopTokens | None, logp: torch.Tensor) -> None:
    assert top is not None
    best = logp.exp().topk(5)
    for tokens, probabilities, values, ids in zip(
        top.tokens, top.probabilities, best.values, best.indices, strict=True
    ):
        assert list(tokens) == RENDERER.token_strings(ids.tolist())
        assert list(probabilities) == pytest.approx(values.tolist(), rel=6e-4)


def check(sample: SampleRecord, data, number: int, student: Path, teacher: Path) -> None:
    prompt, response = data["prompts"].unbind()[number], data["responses"].unbind()[number]
    assert sample.prompt == RENDERER.decode_all(prompt.tolist())
    assert list(sample.tokens) == RENDERER.token_strings(response.tolist())
    details = sample.details
    assert details is not None
    logps = {"student": by_hand(student, prompt, response), "teacher": by_hand(teacher, prompt, response)}
    for who, logp in logps.items():
        check_top(getattr(details, f"{who}_top"), logp)
        own = logp.gather(-1, response[:, None])[:, 0]
        assert getattr(details, f"{who}_logp") == pytest.approx(own.tolist(), rel=6e-4)
        assert getattr(details, f"{who}_entropy") == pytest.approx((-(logp.exp() * logp).sum(-1)).tolist(), rel=6e-4)
    gap = logps["student"] - logps["teacher"]
    assert sample.reverse_kl == pytest.approx((logps["student"].exp() * gap).sum(-1).tolist(), rel=1e-3)
    assert details.sampler_logp == pytest.approx(data["old_log_probs"].unbind()[number].tolist(), rel=6e-4)
    assert (sample.step, sample.phase, sample.who, sample.finished) == (0, "train", "student", False)


@pytest.mark.parametrize("remove_padding", [True, False])
@pytest.mark.parametrize("size", [4, 1])
def test_records_are_what_plain_transformers_say(models: Path, tmp_path: Path, remove_padding: bool, size: int):
    data = batch(micro_batch_size=size, remove_padding=remove_padding)
    samples, _ = recorded(models, tmp_path / "run", data, remove_padding=remove_padding, log={"samples": 3})
    assert [len(sample.tokens) for sample in samples] == list(RESPONSE_LENGTHS[:3])
    for number, sample in enumerate(samples):
        check(sample, data, number, models / "student", models / "teacher")
        assert sample.teacher is None


def test_recording_changes_nothing(models: Path, tmp_path: Path):
    plain = step(engine(models), batch())
    seen = step(engine(models, run_dir=str(tmp_path / "run")), batch())
    assert plain[0] == seen[0] and plain[2] == seen[2]
    assert all(torch.equal(plain[1][name], gradient) for name, gradient in seen[1].items())


def test_masked_tokens_have_no_values(models: Path, tmp_path: Path):
    data = batch(hide=((0, 2), (0, 3)))
    (sample, *_), _ = recorded(models, tmp_path / "run", data)
    details, prompt, response = sample.details, data["prompts"].unbind()[0], data["responses"].unbind()[0]
    assert details is not None and details.student_logp and details.student_top and sample.reverse_kl is None
    assert len(sample.tokens) == RESPONSE_LENGTHS[0]
    own = by_hand(models / "student", prompt, response).gather(-1, response[:, None])[:, 0].tolist()
    for place, value in enumerate(details.student_logp):
        if place in (2, 3):
            assert math.isnan(value) and details.student_top.tokens[place] == ()
        else:
            assert value == pytest.approx(own[place], rel=6e-4)


def test_the_first_update_of_a_step_is_recorded_and_no_other(models: Path, tmp_path: Path):
    _, built = recorded(models, tmp_path / "run", log={"samples": 1, "samples_every": 2})
    for number in (0, 1, 2, 2, 3):
        built.lr_scheduler.last_epoch = number
        step(built, batch())
    assert [sample.step for sample in read_samples(tmp_path / "run")] == [0, 2]
    assert [record.step for record in read_metrics(tmp_path / "run")] == [0, 1, 2, 3]


def test_a_resumed_run_writes_its_steps_again(models: Path, tmp_path: Path):
    for first in (0, 4):
        built = engine(models, run_dir=str(tmp_path / "run"), log={"samples": 1, "samples_every": 2})
        for number in (first, first + 2, first + 4):
            built.lr_scheduler.last_epoch = number
            step(built, batch())
    assert [sample.step for sample in read_samples(tmp_path / "run")] == [0, 2, 4, 6, 8]
    assert [record.step for record in read_metrics(tmp_path / "run")] == [0, 2, 4, 6, 8]
    with pytest.raises(RunFolderError, match="already holds the records of a run"):
        recorded(models, tmp_path / "run")


def test_routed_samples_name_their_teacher(models: Path, tmp_path: Path):
    from tensordict.tensorclass import NonTensorStack

    data, names = batch(), ["one", "two", "one", "two"]
    data["data_source"] = NonTensorStack(*names)
    teachers = {"one": {"model": str(models / "teacher")}, "two": {"model": str(models / "tied")}}
    samples, _ = recorded(models, tmp_path / "run", data, teacher=None, teachers=teachers, mixture_kind="routing")
    assert [sample.teacher for sample in samples] == names
    for number, sample in enumerate(samples):
        check(sample, data, number, models / "student", models / ("teacher" if names[number] == "one" else "tied"))


def test_a_pass_that_measures_is_not_recorded(models: Path, tmp_path: Path):
    samples, _ = recorded(models, tmp_path / "run", rl_weight=0.5, rl_scale="match", log={"samples": 2})
    assert len(samples) == 2
    check(samples[1], batch(), 1, models / "student", models / "teacher")


def test_metrics_are_those_that_verl_logs(models: Path, tmp_path: Path):
    built = engine(models, run_dir=str(tmp_path / "run"))
    _, _, logged = step(built, batch())
    (record,) = read_metrics(tmp_path / "run")
    assert {f"actor/opd/{name}": value for name, value in record.metrics.items()} == {
        name: value for name, value in logged.items() if name.startswith("actor/opd/")
    }
    assert {"loss", "reverse_kl", "student_entropy", "teacher_entropy", "overlap"} <= record.metrics.keys()


def test_the_folder_makes_a_report(models: Path, tmp_path: Path):
    built = engine(models, run_dir=str(tmp_path / "run"))
    for number in range(3):
        built.lr_scheduler.last_epoch = number
        step(built, batch())
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "reverse kl" in page.lower() and read_samples(tmp_path / "run")[1].prompt in page


def test_a_folder_by_a_relative_path_is_refused():
    with pytest.raises(ConfigError, match=r"opd\.run_dir='runs/a' is no absolute path"):
        parse({"teacher": {"model": "teacher"}, "run_dir": "runs/a"})


def test_a_response_that_ranks_share_is_not_chosen(tmp_path: Path):
    """Three tokens of the first response are in another rank's slice."""
    settings, _ = parse({"teacher": {"model": "teacher"}, "run_dir": str(tmp_path), "log": {"samples": 2}})
    writer = RunWriter(settings, byte_tokenizer(), (257,))
    sequence = torch.repeat_interleave(torch.arange(4), torch.tensor(RESPONSE_LENGTHS))[3:]
    blank = torch.zeros_like(sequence)
    columns = dict.fromkeys((field.name for field in fields(ResponseTokens)), blank) | {"sequence_index": sequence}
    writer.begin(0)
    writer.choose(batch(), ResponseTokens(**columns))
    assert writer.chosen == [1, 2]
