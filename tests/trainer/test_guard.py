"""Rules of the section guard: what breaks them, what they say, what they do, and what a resumed run remembers of them."""

from __future__ import annotations

import json
import random
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from test_resume import assert_same_run

from opd.cli.main import main
from opd.config import Config, GuardConfig
from opd.config.recipe import build, merge, whole_keys
from opd.config.words import scalar
from opd.errors import ConfigError
from opd.reporting.about import read_state
from opd.reporting.guarded import Onset, read_onsets, write_onsets
from opd.reporting.record import MetricsRecord, read_metrics
from opd.trainer.checkpoint import checkpoints
from opd.trainer.distiller import Distiller
from opd.trainer.guard import Guard
from opd.trainer.guard_advice import CAUSES
from opd.trainer.guard_readings import READINGS
from opd.trainer.resume import EFFECTS, table_key
from opd.trainer.run import train
from worlds import settings

QUICK = {"eval__every": 0, "checkpoint__every": 1, "optimizer__warmup_steps": 0}


def recipe(**more: object) -> Config:
    """A recipe without files, for rules that read recorded metrics."""
    base = {"student.model": "s", "teacher.model": "t", "prompts.path": "p", "train.steps": 100}
    return build(merge({}, base | {key.replace("__", "."): value for key, value in more.items()}))


def looked_at(guard: Guard, rows: Iterable[Mapping[str, float]]) -> list[tuple[int, str]]:
    """(step, rule) of everything that begins."""
    return [(onset.step, onset.rule) for step, row in enumerate(rows) for onset in guard.look(step, row)]


def rows(name: str, values: Iterable[float], **others: float) -> list[dict[str, float]]:
    return [{name: value, **others} for value in values]


# One rule each, on recorded metrics


@pytest.mark.parametrize(
    ("rule", "metric", "healthy", "broken"),
    [
        ("truncated", "truncated", 0.74, 0.76),
        ("repetition", "repetition", 0.10 + 0.24, 0.10 + 0.26),
        ("length", "response_length", 39.0, 41.0),
        ("length", "response_length", 2.6, 2.4),
        ("eos_prob", "eos_prob", 0.011, 0.009),
        ("entropy", "student_entropy", 0.26, 0.24),
        ("sampler_gap", "sampler_student_gap", 0.09, 0.11),
        ("clipped", "clipped", 0.29, 0.31),
        ("clipped", "importance/capped", 0.29, 0.31),
    ],
)
def test_a_rule_is_broken_at_its_threshold_and_acts_when_its_patience_is_over(rule, metric, healthy, broken):
    start = {"truncated": 0.0, "repetition": 0.1, "response_length": 10.0, "eos_prob": 0.1, "student_entropy": 1.0}
    first = [start.get(metric, 0.0)] * 5
    patience = getattr(GuardConfig(), rule).patience
    assert looked_at(Guard(recipe()), rows(metric, [*first, *[healthy] * 30])) == []
    steps = rows(metric, [*first, *[broken] * 30])
    assert looked_at(Guard(recipe()), steps) == [(5 + patience - 1, rule)]
    assert looked_at(Guard(recipe()), steps[: 5 + patience - 1]) == []
    off = recipe(**{f"guard__{rule}__action": "off"})
    assert looked_at(Guard(off), steps) == []


def test_the_share_of_clamped_tokens_is_of_the_tokens():
    assert looked_at(Guard(recipe()), rows("clamped_tokens", [29.0] * 9, tokens=100.0)) == []
    assert looked_at(Guard(recipe()), rows("clamped_tokens", [31.0] * 9, tokens=100.0)) == [(4, "clipped")]


def test_a_rule_speaks_again_only_after_it_was_kept_for_as_long():
    guard = Guard(recipe(guard__truncated__patience=2))
    shares = [0.9, 0.9, 0.9, 0.1, 0.9, 0.9, 0.1, 0.1, 0.9, 0.9, 0.9]
    assert looked_at(guard, rows("truncated", shares)) == [(1, "truncated"), (9, "truncated")]


def test_shorter_responses_are_no_fault_of_a_student_that_was_cut_off_at_first():
    learns = [{"response_length": 100.0, "truncated": 0.9}] * 5 + [{"response_length": 9.0, "truncated": 0.0}] * 9
    assert looked_at(Guard(recipe(guard__truncated__action="off")), learns) == []
    collapses = [row | {"truncated": 0.0} for row in learns]
    assert looked_at(Guard(recipe()), collapses) == [(9, "length")]


def test_a_length_that_is_the_teachers_own_is_no_fault():
    grows = rows("response_length", [10.0] * 5 + [50.0] * 9)
    teacher, cut, far = (
        {"response_length": length, "truncated": cut} for length, cut in ((60, 0), (60, 0.5), (240, 0))
    )
    assert looked_at(Guard(recipe()), grows) == [(9, "length")]
    for own, expected in ((teacher, []), (cut, [(9, "length")]), (far, [(9, "length")])):
        guard = Guard(recipe())
        guard.compare_with(own)
        assert looked_at(guard, grows) == expected, own
    assert "against 10 in the first 5 steps; the teacher's own have 240, and" in guard.onsets[0].text


def test_the_teachers_length_is_that_of_its_evaluation_in_a_resumed_run_too():
    records = [MetricsRecord(kind="eval", step=0, who="teacher", metrics={"response_length": 50.0})]
    records += [MetricsRecord(kind="eval", step=0, who="student", metrics={"response_length": 10.0})]
    records += [MetricsRecord(kind="step", step=s, metrics={"response_length": 10.0}) for s in range(5)]
    guard = Guard(recipe())
    guard.replay(records, [])
    assert [guard.look(step, {"response_length": 50.0}) for step in range(5, 15)] == [[]] * 10
    guard = Guard(recipe())
    guard.replay(records[1:], [])
    assert [o.rule for step in range(5, 15) for o in guard.look(step, {"response_length": 50.0})] == ["length"]


def test_a_run_tells_its_rules_how_long_the_teachers_answers_are(world, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(Guard, "compare_with", lambda _self, metrics: told.append(metrics["response_length"]))
    train(build(merge({}, settings(world, tmp_path / "run", train__steps=1, eval__every=100))))
    (record,) = (r for r in read_metrics(tmp_path / "run") if r.kind == "eval" and r.who == "teacher")
    assert told == [record.metrics["response_length"]]


def test_a_low_entropy_is_no_fault_where_the_teacher_is_as_sure_or_comes_nearer():
    fall = [1.0] * 5 + [0.01] * 9
    assert looked_at(Guard(recipe()), rows("student_entropy", fall, teacher_entropy=0.011)) == []
    assert looked_at(Guard(recipe()), rows("student_entropy", fall, teacher_entropy=0.5)) == [(9, "entropy")]
    nearer = [{"student_entropy": h, "reverse_kl": h} for h in fall]
    assert looked_at(Guard(recipe()), nearer) == []
    assert looked_at(Guard(recipe()), rows("student_entropy", fall, reverse_kl=1.0)) == [(9, "entropy")]


def test_a_loss_is_judged_by_the_median_and_spread_of_the_steps_before():
    noise = random.Random(0)
    steady = [1.0 + 0.1 * noise.random() for _ in range(40)]
    assert looked_at(Guard(recipe()), rows("loss", steady)) == []
    once = [*steady[:30], 1e3, *steady[30:]]
    assert looked_at(Guard(recipe()), rows("loss", once)) == [], "a single step is mostly a strange batch"
    stays = [*steady[:30], 1e3, 1e3]
    assert looked_at(Guard(recipe()), rows("loss", stays)) == [(31, "loss")]
    assert looked_at(Guard(recipe()), rows("loss", [*steady[:30], 5.0, 5.0])) == [], "50 spreads are more than 5"
    assert looked_at(Guard(recipe()), rows("loss", [0.0] * 30 + [1e3] * 3)) == [], "no spread, no measure"
    assert looked_at(Guard(recipe()), rows("loss", [1.0] * 9 + [1e3, 1e3])) == [], "the first steps are no measure"


def test_missing_and_infinite_metrics_break_no_rule():
    strange = [{"loss": float(value), "truncated": float(value)} for value in ("nan", "inf", "-inf")] * 10
    assert looked_at(Guard(recipe()), [*strange, *[{}] * 20]) == []


def falling(reward_to: float, kl_to: float, noise: float = 0.01) -> list[dict[str, float]]:
    """30 steps at reward 0.8 and KL 1, then 30 steps on the way to both ends."""
    generator = random.Random(1)
    whole = [(0.8, 1.0)] * 30 + [(0.8 + (reward_to - 0.8) * i / 30, 1.0 + (kl_to - 1.0) * i / 30) for i in range(30)]
    return [{"reward/mean": r + noise * generator.gauss(0, 1), "reverse_kl": kl} for r, kl in whole]


def test_a_reward_that_falls_while_the_kl_falls_is_said_and_every_other_way_is_not():
    guard = Guard(recipe())
    ((step, rule),) = looked_at(guard, falling(0.2, 0.5))
    assert rule == "reward" and 40 < step < 60
    text = guard.onsets[0].text
    assert "the reward fell from 0.8" in text and "while the reverse KL fell from" in text
    assert "The likeliest cause: the teacher is no better than the student" in text
    for reward_to, kl_to, noise in ((0.2, 1.5, 0.01), (0.9, 0.5, 0.01), (0.7, 0.5, 0.01), (0.4, 0.5, 0.8)):
        assert looked_at(Guard(recipe()), falling(reward_to, kl_to, noise)) == [], (reward_to, kl_to, noise)


def test_what_a_growing_horizon_does_to_lengths_breaks_no_rule():
    grows = {"rollout__max_new_tokens": 100, "rollout__horizon_start": 10, "rollout__horizon_steps": 20}
    lengths = [min(100.0, 10.0 + 4.5 * step) for step in range(60)]
    steps = [{"response_length": length, "truncated": float(i < 20)} for i, length in enumerate(lengths)]
    assert looked_at(Guard(recipe(**grows)), steps) == []
    assert (4, "truncated") in looked_at(Guard(recipe(rollout__max_new_tokens=100)), steps)


# What is said


def test_a_limit_that_was_enough_at_first_is_not_the_likeliest_cause_of_cut_responses():
    always, later = Guard(recipe()), Guard(recipe())
    looked_at(always, rows("truncated", [1.0] * 12))
    looked_at(later, rows("truncated", [0.1] * 5 + [1.0] * 7))
    assert "The likeliest cause: the limit is too low" in always.onsets[0].text
    assert "100% of the responses are cut off, against 10% in the first 5 steps" in later.onsets[0].text
    assert "The likeliest cause: the steps are too large (lower optimizer.lr)" in later.onsets[0].text


def test_every_rule_has_a_number_and_three_causes_with_keys_that_can_be_changed():
    names = {item.name for item in fields(GuardConfig)} - {"first_steps"}
    assert names == READINGS.keys() == CAUSES.keys() - {"truncated later", "canary served"}
    known = whole_keys()
    for cause in [cause for three in CAUSES.values() for cause in three]:
        named = re.findall(r"\b(?:[a-z_]+\.)+[a-z_]+\b", cause)
        assert named and all(key in known for key in named), cause
        if "new run" not in cause:
            same = ("none", "later", "inputs")  # inputs: the same content from another place
            assert all(EFFECTS[table_key(key)] in same for key in named), cause


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("guard.truncated.threshold", 0, "guard.truncated.threshold must be a positive number, not 0"),
        ("guard.loss.patience", 0, "guard.loss.patience must be at least 1, not 0"),
        ("guard.first_steps", 0, "guard.first_steps must be at least 1, not 0"),
        ("guard.entropy.action", "drop", "'guard.entropy.action' cannot be 'drop'"),
        ("guard.repetitions.action", "stop", "Did you mean 'guard.repetition'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(key, value, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        recipe(**{key.replace(".", "__"): value})


def test_one_key_of_a_rule_leaves_its_other_defaults_alone():
    assert recipe(guard__repetition__action="stop").guard.repetition.threshold == GuardConfig().repetition.threshold


def test_the_table_in_the_recipes_readme_has_the_defaults():
    text = (Path(__file__).parents[2] / "recipes" / "README.md").read_text()
    written = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| (\d+) \|", text, re.M)
    rules = GuardConfig().rules
    assert {name: (float(t), int(p)) for name, t, p in written} == {
        name: (rule.threshold, rule.patience) for name, rule in rules.items()
    }
    (example,) = re.findall(r"For example: `(guard: .*)`", text)
    made = build(
        merge({}, {"student.model": "s", "teacher.model": "t", "prompts.path": "p"}) | scalar(f"{{{example}}}")
    )
    assert made.guard.repetition.action == "stop" and "loss" not in made.guard.rules


# In runs of real models


def starts_to_repeat(distiller: Distiller, after: int):
    """A callback that makes the student one which says its last token for ever: its layers add nothing to the embedding."""

    def callback(record: dict[str, float]) -> None:
        if record["step"] == after:
            for name, weight in distiller.components.student.model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.data.zero_()
                elif name == "model.norm.weight":
                    weight.data.fill_(20.0)

    return callback


def repeating_run(world: Path, folder: Path, **more: object):
    values = settings(world, folder, **(QUICK | {"rollout__max_new_tokens": 24, "optimizer__lr": 1e-6} | more))
    distiller = Distiller.from_config(build(merge({}, values | {"train.steps": 14, "log.progress": "plain"})))
    distiller.callbacks = (starts_to_repeat(distiller, after=6),)
    return distiller.train()


def test_a_student_that_starts_to_repeat_is_said_once_and_the_report_shows_it(world, tmp_path, capsys):
    run = repeating_run(world, tmp_path / "run", guard__truncated__action="off", guard__length__action="off")
    said = [line for line in capsys.readouterr().out.splitlines() if "guard.repetition" in line]
    assert len(said) == 1 and said[0].startswith("warning: step 10: guard.repetition: 9")
    assert "% in the first 5 steps, and guard.repetition.threshold=0.25 has been passed for 3 steps." in said[0]
    assert "(train.drop=[repeating])" in said[0]
    (onset,) = (one for one in read_onsets(tmp_path / "run") if one.rule == "repetition")
    assert (onset.step, onset.rule, onset.action) == (9, "repetition", "warn") and onset.value > 0.5
    assert "Step 9: guard.repetition: " in (tmp_path / "run" / "report.html").read_text()
    assert run.ended is None and len(run.metrics) == 14


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_a_student_that_starts_to_repeat_at_step_thirty_is_said_within_the_patience_and_not_before(
    world, tmp_path, action
):
    """29 healthy steps, which learn; the damage is done by the update of the 30th (number 29), so step 30 is the first that repeats."""
    rules = {f"guard__{name}__action": "off" for name in ("truncated", "length", "eos_prob", "entropy", "loss")}
    more = {"guard__repetition__action": action, "rollout__max_new_tokens": 24, "optimizer__lr": 1e-3}
    values = settings(world, tmp_path / "run", **(QUICK | {"checkpoint__every": 0} | rules | more))
    distiller = Distiller.from_config(build(merge({}, values | {"train.steps": 36})))
    distiller.callbacks = (starts_to_repeat(distiller, after=29),)
    run = distiller.train()
    shares = [record.metrics["repetition"] for record in run.metrics]
    assert max(shares[:30]) < 0.25 < 0.5 < shares[30], "it is healthy, and then it is not"
    assert [(onset.rule, onset.step) for onset in read_onsets(run.path)] == [("repetition", 32)]
    assert len(run.metrics) == (33 if action == "stop" else 36)
    assert (run.ended is not None and run.ended.rule == "repetition") == (action == "stop")


def test_a_rule_that_drops_leaves_the_responses_out_from_the_next_step_on(world, tmp_path):
    run = repeating_run(world, tmp_path / "run", guard__repetition__action="drop")
    left_out = [record.metrics.get("drop/repeating") for record in run.metrics]
    assert left_out[:10] == [None] * 10 and all(count and count > 6 for count in left_out[10:]), left_out
    assert run.metrics[-1].metrics["repetition"] > 0.5, "the metric is of all responses, those left out too"


def test_a_healthy_run_breaks_no_rule(world, tmp_path, capsys):
    more = {"train__steps": 40, "rollout__max_new_tokens": 24, "optimizer__lr": 1e-3, "train__prompts_per_step": 16}
    train(build(merge({}, settings(world, tmp_path / "run", **(QUICK | more | {"log__progress": "plain"})))))
    kl = [record.metrics["reverse_kl"] for record in read_metrics(tmp_path / "run")]
    assert kl[-1] < 0.7 * kl[0], "it learnt"
    assert read_onsets(tmp_path / "run") == [] and not (tmp_path / "run" / "guard.json").exists()
    assert "guard." not in capsys.readouterr().out


def test_responses_that_are_all_cut_off_end_a_run_that_says_how_to_go_on(world, tmp_path, capsys):
    """One token is too few; with what the first cause advises, the printed command goes on to the end."""
    path, folder = tmp_path / "a recipe.yaml", tmp_path / "run"
    values = settings(world, folder, rollout__max_new_tokens=1, checkpoint__every=0, eval__every=4)
    rules = {"guard.truncated.action": "stop", "guard.truncated.patience": 3, "guard.truncated.threshold": 0.5}
    path.write_text(yaml.safe_dump(merge({}, values | rules)))
    assert main(["train", str(path), "--log.progress", "plain"]) == 3
    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1]
    assert last.startswith("stopped by guard.truncated: ") and "% of the responses are cut off" in last
    warning = next(line for line in out.splitlines() if "guard.truncated" in line)
    assert all(cause in warning for cause in CAUSES["truncated"])
    assert [place.name for place in checkpoints(folder / "checkpoints")] == ["step-00000003"]
    state, summary = read_state(folder), json.loads((folder / "summary.json").read_text())
    assert state is not None and (state.name, state.step) == ("stopped", 3)
    assert state.why in last and state.why in (folder / "report.html").read_text().replace("&#39;", "'")
    assert any(note.startswith("Step 2: guard.truncated: ") for note in summary["notes"])
    assert (folder / "student" / "model.safetensors").exists()

    command = last.partition("Continue with: ")[2]
    assert command == f"opd train '{path}' --log.progress plain --resume"
    assert main(shlex.split(command)[1:]) == 3, "nothing was changed, so it stops again after its patience"
    assert "stopped by guard.truncated: " in capsys.readouterr().err
    assert "raise rollout.max_new_tokens" in warning
    assert main([*shlex.split(command)[1:], "--rollout.max_new_tokens", "24", "--train.steps", "9"]) == 0
    state = read_state(folder)
    assert state is not None and (state.name, state.step) == ("finished", 9)
    assert [onset.step for onset in read_onsets(folder)] == [2, 5], "the report keeps what has happened"


def test_a_rule_that_would_stop_after_the_last_step_lets_the_run_finish(world, tmp_path):
    more = {"rollout__max_new_tokens": 1, "train__steps": 5, "guard__truncated__action": "stop"}
    values = settings(world, tmp_path / "run", **(QUICK | more | {"guard__truncated__threshold": 0.3}))
    run = Distiller.from_config(build(merge({}, values))).train()
    assert run.ended is None and [onset.step for onset in read_onsets(tmp_path / "run")] == [4]


# Resumption


def test_a_run_with_a_rule_in_force_resumes_bit_for_bit(world, tmp_path):
    """The rule drops from step 5 on; the checkpoint is of six updates."""
    rule = {"action": "drop", "patience": 5, "threshold": 0.1}
    more = QUICK | {"train__steps": 8, "rollout__max_new_tokens": 8, "guard__truncated": rule}
    train(build(merge({}, settings(world, tmp_path / "whole", **more))))
    values = settings(world, tmp_path / "run", **more)

    def crash(record: dict[str, float]) -> None:
        if record["step"] == 5:
            raise RuntimeError("the machine is gone")

    with pytest.raises(ValueError, match="the machine is gone"):
        Distiller.from_config(build(merge({}, values)), callbacks=crash).train()
    write_onsets(tmp_path / "run", [*read_onsets(tmp_path / "run"), *onsets(70)])
    train(build(merge({}, values)), resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    dropped = [record.metrics.get("drop/truncated") for record in read_metrics(tmp_path / "run")]
    assert dropped[:5] == [None] * 5 and None not in dropped[5:] and all(dropped[6:])
    assert [onset.step for onset in read_onsets(tmp_path / "run")] == [4], "step 70 was not in the checkpoint"


def onsets(*steps: int, rule: str = "truncated", action: str = "warn") -> list[Onset]:
    return [Onset(step=s, rule=rule, action=action, value=1.0, facts="", advice="") for s in steps]  # pyright: ignore[reportArgumentType]


def test_a_replayed_rule_is_silent_and_one_that_stopped_the_run_has_its_patience_again():
    records = [MetricsRecord(kind="step", step=s, metrics={"truncated": 1.0}) for s in range(8)]
    warned, stopped, unknown = Guard(recipe()), Guard(recipe(guard__truncated__action="stop")), Guard(recipe())
    warned.replay(records, onsets(4))
    stopped.replay(records, onsets(4, action="stop"))
    unknown.replay(records, [])
    after = {"truncated": 1.0}
    assert [warned.look(step, after) for step in range(8, 20)] == [[]] * 12
    for guard in (stopped, unknown):
        assert [step for step in range(8, 20) if guard.look(step, after)] == [12]


def test_a_damaged_guard_file_does_not_cost_the_report(tmp_path):
    (tmp_path / "guard.json").write_text('{"onsets": [{"step": 1}]}')
    assert read_onsets(tmp_path) == []
    (tmp_path / "guard.json").write_bytes(b"\xff")
    assert read_onsets(tmp_path) == []


def test_the_copying_student_of_these_tests_does_repeat(world, tmp_path):
    distiller = Distiller.from_config(build(merge({}, settings(world, tmp_path / "run", **QUICK))))
    starts_to_repeat(distiller, after=0)({"step": 0})
    with torch.no_grad():
        logits = distiller.components.student.model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0]
    assert logits.argmax(-1).tolist() == [5, 6, 7, 8] and logits.softmax(-1).max(-1).values.min() > 0.9
