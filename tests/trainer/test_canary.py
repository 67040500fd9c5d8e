"""The rule guard.canary: a teacher that is no longer what it was ends the run before an update, wherever its weights are."""

from __future__ import annotations

import math
import shlex
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opd.cli.main import main
from opd.config import Config
from opd.config.recipe import build, merge
from opd.errors import ConfigError, ServerError
from opd.reporting.about import read_state
from opd.reporting.guarded import read_onsets
from opd.reporting.record import read_metrics
from opd.trainer.canary import NEAR_UNIFORM, Said, TeacherMoved, compare
from opd.trainer.checkpoint import checkpoints
from opd.trainer.distiller import Distiller
from opd.trainer.guard_advice import CAUSES
from opd.trainer.run import train
from remote.scripted import Asked, ScriptedServer
from remote.scripted import serving as serving_scripted
from served import TOKENIZER, freeze_model, serving, teacher_model
from teachers.model_server import ModelServer
from worlds import settings

QUICK: dict[str, Any] = {"eval__every": 0, "checkpoint__every": 0, "optimizer__warmup_steps": 0, "train__steps": 6}
TOP_K = {"objective__support": "teacher_top_k", "objective__top_k": 4}


def config_of(world: Path, folder: Path, **more: Any) -> Config:
    return build(merge({}, settings(world, folder, **QUICK | {"teacher__canary_every": 1} | more)))


@torch.no_grad()
def lose_weights(model: Any) -> None:
    for weight in model.parameters():
        weight.zero_()


def shift(model: Any) -> None:
    model.model.norm.register_forward_hook(lambda _module, _inputs, rows: rows.roll(1, 1))


@torch.no_grad()
def other_weights(model: Any) -> None:
    for weight, other in zip(model.parameters(), teacher_model(seed=9).parameters(), strict=True):
        weight.copy_(other)


def after(step: int, change: Callable[[], object]) -> Callable[[dict[str, float]], None]:
    """A callback that makes the change when this step is done."""

    def callback(record: dict[str, float]) -> None:
        if record["step"] == step:
            change()

    return callback


def run_with(config: Config, change: Callable[[Distiller], object], step: int = 2) -> Any:
    distiller = Distiller.from_config(config)
    distiller.callbacks = (after(step, lambda: change(distiller)),)
    return distiller.train()


def local_model(distiller: Distiller) -> Any:
    return distiller.components.teachers.loaded["teacher"].model


def assert_stopped(run: Any, step: int, said: str, cause: str = "canary") -> None:
    """Step `step` was not taken: there are records and updates of those before it alone."""
    assert run.ended is not None and run.ended.rule == "canary", run.ended
    assert said in run.ended.why, run.ended.why
    assert [record.step for record in run.metrics] == list(range(step))
    assert [place.name for place in checkpoints(run.path / "checkpoints")] == [f"step-{step:08}"]
    (onset,) = read_onsets(run.path)
    assert (onset.rule, onset.action, onset.step) == ("canary", "stop", step)
    assert all(one in onset.advice for one in CAUSES[cause])
    assert onset.facts in (run.path / "report.html").read_text().replace("&#39;", "'")


# What is seen, on numbers

FIRST = Said(logp=torch.tensor([-1.0, -2.0, -0.5, -6.0, -3.0, -1.5]))
VOCABULARY = 20
GUESS = -math.log(VOCABULARY)


@pytest.mark.parametrize(
    ("now", "apart", "said"),
    [
        ([-1.0, -2.0, -0.5, -6.0, -3.0, -0.9], 0.1, "other weights"),
        ([GUESS] * 6, None, "every token has the same, −ln V = -3"),
        ([GUESS * (1 + NEAR_UNIFORM * 0.9)] * 3 + [GUESS] * 3, None, "near −ln V"),
        ([-4.0, -1.0, -2.0, -0.5, -6.0, -3.0], None, "shifted by one"),
        ([-2.0, -0.5, -6.0, -3.0, -1.5, -4.0], None, "shifted by one"),
        ([-9.0, -3.0, -8.0, -2.0, -7.0, -6.0], None, "below −ln V"),
        ([-1.0, -2.0, math.nan, -6.0, -3.0, -1.5], -GUESS, "NaN or infinite"),
    ],
)
def test_a_distance_and_its_likeliest_reason(now: list[float], apart: float | None, said: str):
    value, words = compare(FIRST, Said(logp=torch.tensor(now)), VOCABULARY)
    assert said in words
    expected = (torch.tensor(now) - FIRST.logp).abs().mean().item() if apart is None else apart
    assert value == pytest.approx(max(expected, -GUESS) if "same" in said else expected, rel=1e-5)


def test_a_row_that_fits_the_neighbour_of_its_own_greedy_token_is_shifted():
    now = replace(FIRST, logp=FIRST.logp - 3.0, excess={-1: 0.0, 1: 2.0})
    assert "shifted" in compare(replace(FIRST, excess={-1: -1.0, 1: 0.05}), now, VOCABULARY)[1]
    assert "shifted" not in compare(replace(FIRST, excess={-1: -1.0, 1: 2.0}), now, VOCABULARY)[1]


# Teachers in this process


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lose_weights, "every token has the same"),
        (other_weights, "of the start of the run"),
        (shift, "shifted by one"),
    ],
)
def test_a_local_teacher_that_changes_ends_the_run_before_an_update(
    world: Path, tmp_path: Path, change: Any, said: str
):
    run = run_with(config_of(world, tmp_path / "run"), lambda d: change(local_model(d)))
    assert_stopped(run, 3, said)
    assert "the teacher '" in run.ended.why and "teacher'" in run.ended.why


def test_weights_become_nan_and_the_run_says_whose(world: Path, tmp_path: Path):
    run = run_with(config_of(world, tmp_path / "run"), lambda d: local_model(d).lm_head.weight.data.fill_(math.nan))
    assert_stopped(run, 3, "they are NaN or infinite")


def test_the_teacher_is_looked_at_every_few_steps_and_a_healthy_one_stays_where_it_was(world: Path, tmp_path: Path):
    train(config_of(world, tmp_path / "run", teacher__canary_every=2, train__steps=5))
    seen = [record.metrics.get("canary") for record in read_metrics(tmp_path / "run")]
    assert seen == [0.0, None, 0.0, None, 0.0]
    late = config_of(world, tmp_path / "late", teacher__canary_every=2)
    assert_stopped(run_with(late, lambda d: lose_weights(local_model(d))), 4, "every token has the same")
    never = config_of(world, tmp_path / "never", teacher__canary_every=0)
    assert run_with(never, lambda d: other_weights(local_model(d))).ended is None


def test_the_rule_may_warn_or_be_off(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    more = {"log__progress": "plain", "teacher__canary_every": 2, "train__steps": 8}
    warn = config_of(world, tmp_path / "warn", guard__canary__action="warn", **more)
    assert run_with(warn, lambda d: other_weights(local_model(d))).ended is None
    said = [line for line in capsys.readouterr().out.splitlines() if "guard.canary" in line]
    assert len(said) == 1 and said[0].startswith("warning: step 5: guard.canary: the teacher '"), said
    seen = [record.metrics.get("canary", -1.0) for record in read_metrics(tmp_path / "warn")]
    assert seen[:4] == [0.0, -1.0, 0.0, -1.0] and min(seen[4:]) > 0.1, "then at every step"
    off = config_of(world, tmp_path / "off", guard__canary__action="off", **more)
    assert run_with(off, lambda d: other_weights(local_model(d))).ended is None
    assert all("canary" not in record.metrics for record in read_metrics(tmp_path / "off"))


def test_patience_counts_looks_and_a_broken_one_is_followed_by_the_next_step(world: Path, tmp_path: Path):
    more = {"guard__canary__patience": 2, "teacher__canary_every": 3}
    run = run_with(config_of(world, tmp_path / "run", **more), lambda d: other_weights(local_model(d)))
    assert_stopped(run, 4, "of the start of the run")


def test_a_step_by_hand_raises_in_the_place_of_the_update(world: Path, tmp_path: Path):
    distiller = Distiller.from_config(config_of(world, tmp_path / "run"))
    distiller.step()
    before = [weight.detach().clone() for weight in distiller.components.student.model.parameters()]
    lose_weights(local_model(distiller))
    with pytest.raises(TeacherMoved, match=r"No update was made with its scores\. The likeliest causes: something in"):
        distiller.step()
    now = distiller.components.student.model.parameters()
    assert all(torch.equal(one, two) for one, two in zip(before, now, strict=True))


@pytest.mark.parametrize(
    "more",
    [
        {"teacher__source": "ema", "teacher__ema_decay": 0.5, "rl__weight": 1.0},
        {"teacher__source": "student", "objective__teacher_temperature": 0.5},
    ],
    ids=["ema", "student"],
)
def test_a_teacher_that_moves_by_design_is_not_watched(world: Path, tmp_path: Path, more: dict[str, Any]):
    config = config_of(
        world, tmp_path / "run", teacher__model="", optimizer__lr=0.1, eval__reward="worlds:first_digit", **more
    )
    assert Distiller.from_config(config).train().ended is None
    assert all("canary" not in record.metrics for record in read_metrics(tmp_path / "run"))


def test_the_model_under_an_adapter_is_watched_and_stays(world: Path, tmp_path: Path):
    more = {"teacher__source": "adapter_off", "student__lora__rank": 2, "rl__weight": 1.0, "optimizer__lr": 0.1}
    config = config_of(world, tmp_path / "run", teacher__model="", eval__reward="worlds:first_digit", **more)
    assert Distiller.from_config(config).train().ended is None
    assert [record.metrics["canary"] for record in read_metrics(tmp_path / "run")] == [0.0] * 6


def test_a_teacher_whose_kept_scores_are_enough_is_not_asked(world: Path, tmp_path: Path):
    more = {"teacher__cache": str(tmp_path / "cache"), "optimizer__lr": 1e-9}
    train(config_of(world, tmp_path / "one", **more))
    assert_stopped(
        run_with(config_of(world, tmp_path / "lost", **more, seed=7), lambda d: lose_weights(local_model(d))),
        3,
        "every token has the same",
    )
    again = run_with(config_of(world, tmp_path / "two", **more), lambda d: lose_weights(local_model(d)), step=0)
    assert again.ended is None and all("canary" not in record.metrics for record in again.metrics)


def test_each_of_two_teachers_is_watched_and_named(world: Path, tmp_path: Path):
    values = settings(world, tmp_path / "run", **QUICK | {"mixture__kind": "probability"})
    del values["teacher.model"]
    for name, folder in (("good", "teacher"), ("bad", "student")):
        values |= {f"teachers.{name}.model": str(world / folder), f"teachers.{name}.canary_every": 1}
    run = run_with(build(merge({}, values)), lambda d: lose_weights(d.components.teachers.loaded["bad"].model))
    assert_stopped(run, 3, f"the teacher '{world / 'student'}'")


def test_a_run_that_was_stopped_goes_on_when_the_teacher_is_back(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Weights are read anew by --resume, so that the same command without the damage ends as if it had never been."""
    config = config_of(world, tmp_path / "run")
    assert_stopped(run_with(config, lambda d: lose_weights(local_model(d))), 3, "every token has the same")
    train(config, resume=True)
    train(config_of(world, tmp_path / "whole"))
    state = read_state(tmp_path / "run")
    assert state is not None and state.name == "finished"
    both = ([r.metrics["loss"] for r in read_metrics(tmp_path / name)] for name in ("run", "whole"))
    assert next(both) == next(both)
    assert [onset.step for onset in read_onsets(tmp_path / "run")] == [3], "the report keeps what has happened"


def test_a_teacher_without_weights_ends_the_run_before_the_first_update(world: Path, tmp_path: Path):
    distiller = Distiller.from_config(config_of(world, tmp_path / "run"))
    lose_weights(local_model(distiller))
    assert_stopped(distiller.train(), 0, "every token has the same, −ln V")


# Behind opd serve-teacher


def exact(world: Path, folder: Path, url: str, **more: Any) -> Config:
    own = {"teacher__model": "", "teacher__url": [url], "teacher__api": "opd", "teacher__dtype": "float32"}
    return config_of(world, folder, **own | more)


@pytest.mark.parametrize("change", [lose_weights, other_weights])
def test_a_served_model_whose_weights_change_in_place_is_seen(world: Path, tmp_path: Path, change: Any):
    frozen = freeze_model(teacher_model())
    with serving(frozen) as server:
        run = run_with(exact(world, tmp_path / "run", server.url), lambda _: change(frozen.model))
        assert_stopped(run, 3, f"teacher.url: {server.url} gives a fixed text log-probs", "canary served")


def test_a_server_that_comes_back_without_weights_is_seen_at_once(world: Path, tmp_path: Path):
    """It says that it is the same model, and its turn would be a thousand steps later."""
    frozen = freeze_model(teacher_model())
    with ExitStack() as first, ExitStack() as second:
        server = first.enter_context(serving(frozen))

        def restart(_: Distiller) -> None:
            first.close()
            lose_weights(frozen.model)
            port = int(server.url.rpartition(":")[2])
            back = threading.Timer(0.5, lambda: second.enter_context(serving(frozen, port=port)))  # the first try fails
            back.start()
            second.callback(back.join)

        run = run_with(exact(world, tmp_path / "run", server.url, teacher__canary_every=1000), restart)
        assert_stopped(run, 3, "every token has the same", "canary served")


def test_a_server_that_comes_back_with_another_model_is_the_rules_business(world: Path, tmp_path: Path):
    for action in ("stop", "warn"):
        with ExitStack() as first, ExitStack() as second:
            server = first.enter_context(serving(freeze_model(teacher_model())))

            def restart(_: Distiller, first=first, second=second, server=server) -> None:
                first.close()
                port = int(server.url.rpartition(":")[2])
                second.enter_context(serving(freeze_model(teacher_model(seed=9)), port=port))

            config = exact(world, tmp_path / action, server.url, guard__canary__action=action)
            if action == "stop":
                assert_stopped(run_with(config, restart), 3, "serves another model than at the start", "canary served")
            else:
                with pytest.raises(ServerError, match="serves another model"):
                    run_with(config, restart)


# Behind an inference server


def by_url(world: Path, folder: Path, server: ScriptedServer, **more: Any) -> Config:
    return config_of(world, folder, **TOP_K | {"teacher__model": "", "teacher__url": [server.url]} | more)


def wake_without_weights(server: ModelServer) -> None:
    server.model = teacher_model()
    lose_weights(server.model)


def wake_as_another(server: ModelServer) -> None:
    server.model = teacher_model(seed=9)


@pytest.mark.parametrize("wake", [wake_without_weights, wake_as_another])
def test_an_inference_server_that_wakes_up_as_another_ends_the_run_before_an_update(
    world: Path, tmp_path: Path, wake: Any
):
    server = ModelServer(teacher_model(), TOKENIZER)
    with serving_scripted(server) as (there,):
        run = run_with(by_url(world, tmp_path / "run", there), lambda _: wake(server))
        said = "every token has the same" if wake is wake_without_weights else "of the start of the run"
        assert_stopped(run, 3, said, "canary served")


def test_a_server_that_falls_asleep_in_a_step_is_seen_before_its_update(world: Path, tmp_path: Path):
    """One connection breaks, and what answers then has lost its weights. Its turn would be a thousand steps later."""
    server = ModelServer(teacher_model(), TOKENIZER)
    broken: list[bool] = []

    def answer(asked: Asked) -> Any:
        if broken and broken.pop():
            return None
        return server(asked)

    def sleep(_: Distiller) -> None:
        broken.append(True)
        wake_without_weights(server)

    with serving_scripted(answer) as (there,):
        config = by_url(world, tmp_path / "run", there, teacher__canary_every=1000, teacher__deadline=3.0)
        assert_stopped(run_with(config, sleep), 3, "other log-probs to a fixed text than at the start", "canary served")


# As a command


def test_the_command_ends_with_code_three_and_goes_on_as_it_says(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    import yaml

    server = ModelServer(teacher_model(), TOKENIZER)
    count = [0]

    def answer(asked: Asked) -> Any:
        count[0] += asked.path == "/v1/completions"
        if count[0] == 10:
            wake_as_another(server)
        return server(asked)

    with serving_scripted(answer) as (there,):
        own = {"teacher__model": "", "teacher__url": [there.url], "teacher__canary_every": 1, "train__steps": 20}
        values = merge({}, settings(world, tmp_path / "run", **QUICK | TOP_K | own))
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        assert main(["train", str(path)]) == 3
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("stopped by guard.canary: teacher.url: http://127.0.0.1:")
        words = shlex.split(last.partition("Continue with: ")[2])
        assert words == ["opd", "train", str(path), "--resume"]
        assert main(words[1:]) == 1, "the server holds another model still"
        server.model = teacher_model()
        assert main(words[1:]) == 0


def test_the_rule_has_no_action_that_leaves_responses_out(world: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"'guard\.canary\.action' cannot be 'drop'"):
        config_of(world, tmp_path / "run", guard__canary__action="drop")
