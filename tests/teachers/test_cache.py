"""A teacher that keeps what it says: the same numbers, no second forward pass, and never the answer of another teacher."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_store import room_for_files_of

import opd
from opd.config.recipe import build, merge
from opd.errors import CacheError, ConfigError, ObjectiveError, OpdError
from opd.reporting.record import read_metrics
from opd.teachers.cache import CachedTeacher
from opd.teachers.fingerprint import model_fingerprint
from opd.teachers.local import LocalTeacher
from opd.teachers.store import TensorStore
from opd.testing import digit_tokenizer, tiny_causal_lm
from opd.trainer.from_config import RunComponents
from opd.trainer.run import train
from opd.types import Prompt, Rollout
from worlds import settings

TOKENIZER = digit_tokenizer()
SAMPLED = {"objective__support": "sampled", "objective__estimator": "k1", "objective__delivery": "advantage"}
TOP_K = {"objective__support": "teacher_top_k", "objective__top_k": 4}
OBJECTIVES: dict[str, dict[str, object]] = {
    "hidden": {},
    "top_k of hidden": {**TOP_K},
    "top_k": {**TOP_K, "teacher__supply": "top_k"},
    "top_k with a sampled tail": {**TOP_K, "objective__tail": "sampled", "teacher__supply": "top_k"},
    "sampled": {**SAMPLED, "teacher__supply": "sampled"},
}


def run(world: Path, run_dir: Path, **more: object) -> list[dict[str, float]]:
    train(build(merge({}, settings(world, run_dir, **more))))
    return numbers(run_dir)


def numbers(run_dir: Path) -> list[dict[str, float]]:
    return [
        {k: v for k, v in record.metrics.items() if not k.startswith(("time/", "teacher/cache_", "canary"))}
        for record in read_metrics(run_dir)
    ]


def counts(run_dir: Path, name: str) -> list[float]:
    return [r.metrics[f"teacher/cache_{name}"] for r in read_metrics(run_dir) if r.kind == "step"]


def kinds_of(cache: Path) -> set[str]:
    """The kinds of target that the shards say they hold."""
    found = set()
    for path in cache.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            found.add(shard.metadata()["kind"])
    return found


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Responses of every call that reached a model."""
    calls: list[int] = []
    original = LocalTeacher._score

    def counting(self: LocalTeacher, rollouts: Sequence[Rollout], kind: Any) -> Any:
        calls.append(len(rollouts))
        return original(self, rollouts, kind)

    monkeypatch.setattr(LocalTeacher, "_score", counting)
    return calls


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_repeated_run_asks_no_teacher_and_has_the_numbers_of_the_first_bit_for_bit(
    world, tmp_path, scored, objective
):
    more, cache = OBJECTIVES[objective], {"teacher__cache": str(tmp_path / "cache")}
    plain = run(world, tmp_path / "plain", **more)
    first = run(world, tmp_path / "first", **more, **cache)
    assert sum(counts(tmp_path / "first", "misses")) > 80
    assert kinds_of(tmp_path / "cache") == {"hidden", str(more.get("teacher__supply", "hidden"))}, (
        "evaluations are exact"
    )
    scored.clear()
    second = run(world, tmp_path / "second", **more, **cache)
    assert scored == [], "every response of training and of evaluations was kept"
    assert first == second
    assert len(plain) == len(first)
    for own, theirs in zip(
        plain, first, strict=True
    ):  # responses that are kept already leave the batches that others are read in
        assert own == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert sum(counts(tmp_path / "second", "misses")) == 0
    assert counts(tmp_path / "second", "hits") == [12.0] * 8


def test_a_second_epoch_costs_no_forward_pass_of_the_model(world, tmp_path):
    teacher = tiny_causal_lm(TOKENIZER, layers=1, hidden=32, seed=2, initializer_range=0.4)
    forwards: list[int] = []
    teacher.register_forward_pre_hook(lambda *_: forwards.append(1))
    rows = [{"prompt": f"{n}>", "response": str(n)} for n in range(12)]
    distiller = opd.Distiller(
        student=(tiny_causal_lm(TOKENIZER, layers=1, hidden=32, seed=1), TOKENIZER),
        teacher={"model": (teacher, TOKENIZER), "cache": str(tmp_path / "cache")},
        prompts=rows,
        rollout={"lmbda": 0.0, "max_new_tokens": 4},
        train={"steps": 6, "prompts_per_step": 4, "samples_per_prompt": 1},
        eval={"every": 0},
    )
    seen = []
    for _ in range(6):
        forwards.clear()
        metrics = distiller.step()
        seen.append((len(forwards), metrics["teacher/cache_hits"]))
    assert [hits for _, hits in seen] == [0, 0, 0, 4, 4, 4]
    assert all(count > 0 for count, _ in seen[:3]) and [count for count, _ in seen[3:]] == [0, 0, 0]


# --- what a target depends on -----------------------------------------------------------------------------------------


def parts_of(world: Path, cache: Path, **more: object) -> RunComponents:
    return RunComponents(build(merge({}, settings(world, cache / "run", teacher__cache=str(cache), **more))))


def rollout(prompt: str = "12>", response: Sequence[int] = (3, 4, 5)) -> Rollout:
    return Rollout(
        prompt=Prompt(index=0, text=prompt),
        prompt_ids=(1,),
        response_ids=tuple(response),
        sampler_logp=None,
        finished=False,
        policy_version=0,
    )


def cached(world: Path, cache: Path, **more: object) -> CachedTeacher:
    teacher = parts_of(world, cache, **more).teacher
    assert isinstance(teacher, CachedTeacher)
    return teacher


def test_the_key_holds_everything_that_the_target_depends_on(world, tmp_path):
    teacher = cached(world, tmp_path, objective__support="teacher_top_k", objective__top_k=4)
    one = rollout()
    inner: Any = teacher.teacher
    keys = {teacher.key(one, "top_k")}
    keys |= {teacher.key(one, "hidden"), teacher.key(one, "sampled")}
    keys |= {teacher.key(rollout("13>"), "top_k"), teacher.key(rollout(response=(3, 4, 6)), "top_k")}
    keys |= {teacher.key(rollout(response=(3, 4)), "top_k")}
    inner.top_k = 5
    keys |= {teacher.key(one, "top_k")}
    inner.top_k = 4
    inner.vocabulary = replace(inner.vocabulary, invalid_ids=(3,))
    keys |= {teacher.key(one, "top_k")}
    inner.vocabulary = replace(inner.vocabulary, invalid_ids=(), size=inner.vocabulary.size - 1)
    keys |= {teacher.key(one, "top_k")}
    assert len(keys) == 9
    # the student's own rendering, text and index are not read by the teacher
    other = cached(world, tmp_path, objective__support="teacher_top_k", objective__top_k=4)
    same = replace(one, prompt_ids=(7, 8), text="x", prompt=replace(one.prompt, index=9))
    assert other.key(one, "top_k") == other.key(same, "top_k") != teacher.key(one, "top_k")


def test_a_fingerprint_tells_one_bit_of_one_weight_a_dtype_and_a_config():
    model: Any = tiny_causal_lm(TOKENIZER, layers=1, hidden=32, seed=2)
    first = model_fingerprint(model)
    assert first == model_fingerprint(copy.deepcopy(model)) == model_fingerprint(copy.deepcopy(model).train())
    moved = copy.deepcopy(model)
    moved.config._name_or_path = "elsewhere"
    assert first == model_fingerprint(moved)
    found = {first, model_fingerprint(copy.deepcopy(model).bfloat16())}
    for name, _ in model.named_parameters():
        other = copy.deepcopy(model)
        flat = dict(other.named_parameters())[name].data.view(-1)
        flat[-1:] = torch.nextafter(flat[-1:], torch.tensor(9.0))
        found.add(model_fingerprint(other))
    other = copy.deepcopy(model)
    other.model.rotary_emb.inv_freq[0] += 1e-6
    found.add(model_fingerprint(other))
    other = copy.deepcopy(model)
    other.config.rms_norm_eps = 0.5
    found.add(model_fingerprint(other))
    assert len(found) == 4 + len(list(model.named_parameters()))


def test_another_teacher_in_the_same_folder_reads_nothing_of_the_first(world, tmp_path):
    teacher = tiny_causal_lm(TOKENIZER, layers=1, hidden=32, seed=2, initializer_range=0.4)
    changed = copy.deepcopy(teacher)
    with torch.no_grad():
        next(iter(changed.parameters()))[0, 0] += 1e-3
    said = {}
    for name, model in (("first", teacher), ("changed", changed), ("first again", teacher)):
        distiller = opd.Distiller(
            student=(tiny_causal_lm(TOKENIZER, layers=1, hidden=32, seed=1), TOKENIZER),
            teacher={"model": (model, TOKENIZER), "cache": str(tmp_path / "cache")},
            prompts=["1>", "2>"],
            eval={"every": 0},
        )
        cache: Any = distiller.components.teacher
        (target,) = cache.score([rollout()], "hidden")
        said[name] = (cache.hits, cache.misses, target.hidden)
    assert [value[:2] for value in said.values()] == [(0, 1), (0, 1), (1, 0)]
    assert torch.equal(said["first"][2], said["first again"][2])
    live = LocalTeacher.score(cache.teacher, [rollout()], "hidden")[0]
    assert torch.equal(live.hidden, said["first"][2])  # pyright: ignore[reportAttributeAccessIssue]


def test_a_batch_of_known_and_unknown_responses_keeps_its_order(world, tmp_path):
    teacher = cached(world, tmp_path)
    rollouts = [rollout(response=(3 + i % 5, 4, i % 3)[: 1 + i % 3]) for i in range(12)]
    live: list[Any] = LocalTeacher.score(teacher.teacher, rollouts, "sampled")  # pyright: ignore[reportArgumentType]
    teacher.score(rollouts[3:9:2], "sampled")
    assert (teacher.hits, teacher.misses) == (0, 3)
    found: list[Any] = list(teacher.score(rollouts, "sampled"))
    assert teacher.hits >= 3
    for one, other in zip(live, found, strict=True):
        torch.testing.assert_close(one.teacher_logp, other.teacher_logp)


def test_equal_responses_in_one_call_have_one_target(world, tmp_path):
    teacher = cached(world, tmp_path)
    one, two, three = teacher.score([rollout(), rollout("13>"), rollout()], "hidden")
    assert one is three and one is not two and len(teacher.store) == 2


@pytest.mark.parametrize("mixture", ["routing", "probability", "loss"])
def test_several_teachers_share_a_folder(world, tmp_path, scored, mixture):
    other = tiny_causal_lm(TOKENIZER, layers=1, hidden=32, seed=5, initializer_range=0.4)
    own = tiny_causal_lm(TOKENIZER, layers=1, hidden=32, seed=2, initializer_range=0.4)
    rows = [{"prompt": f"{n}>", "teacher": "ab"[n % 2], "response": str(n)} for n in range(10)]

    def steps(**cache: str) -> list[dict[str, float]]:
        distiller = opd.Distiller(
            student=(tiny_causal_lm(TOKENIZER, layers=1, hidden=32, seed=1), TOKENIZER),
            teachers={"a": {"model": (own, TOKENIZER), **cache}, "b": {"model": (other, TOKENIZER), **cache}},
            mixture=mixture,
            prompts=rows,
            rollout={"max_new_tokens": 6},
            train={"steps": 3, "prompts_per_step": 4, "samples_per_prompt": 2},
            eval={"every": 0},
        )
        taken = [distiller.step() for _ in range(3)]
        return [{k: v for k, v in m.items() if not k.startswith(("time/", "teacher/cache_", "canary"))} for m in taken]

    plain = steps()
    first = steps(cache=str(tmp_path / "cache"))
    scored.clear()
    assert first == plain == steps(cache=str(tmp_path / "cache")) and scored == []


def test_a_student_without_its_adapter_is_kept_while_the_adapter_moves(world, tmp_path, scored):
    more = {"student__lora__rank": 4, "teacher__source": "adapter_off", "objective__teacher_temperature": 0.5}
    more |= {"teacher__model": "", "optimizer__lr": 0.05, "teacher__cache": str(tmp_path / "cache")}
    first = run(world, tmp_path / "first", **more)
    scored.clear()
    assert run(world, tmp_path / "second", **more) == first and scored == []


# --- what is refused, and what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["ema", "student"])
def test_teachers_whose_weights_move_are_refused(world, tmp_path, source):
    with pytest.raises(ConfigError, match="weights move with every step"):
        build(merge({}, settings(world, tmp_path, teacher__model="", teacher__source=source, teacher__cache="c")))


def test_whole_logits_are_refused_with_their_size(world, tmp_path):
    with pytest.raises(ObjectiveError, match=r"does not keep whole logits.*bytes for every token"):
        parts_of(world, tmp_path, teacher__supply="dense")


class Own:
    """A teacher of somebody's own."""

    name = "own"
    vocabulary = opd.VocabularyMatch(size=len(TOKENIZER))
    rows = len(TOKENIZER)
    supplies = frozenset({"sampled"})
    exact_kind = None

    def __init__(self) -> None:
        self.asked = 0
        self.value = -1.0

    def bind_objective(self, objective: opd.Objective) -> Any:
        return objective.check_supplies(self.supplies, self.name)  # pyright: ignore[reportArgumentType]

    def groups(self, rollouts: Sequence[Rollout]) -> dict[str, range]:
        return {"": range(len(rollouts))}

    def score(self, rollouts: Sequence[Rollout], kind: str) -> list[Any]:
        self.asked += len(rollouts)
        return [opd.SampledTarget(teacher_logp=torch.full((len(r.response_ids),), self.value)) for r in rollouts]

    def logits(self, target: opd.HiddenTarget) -> torch.Tensor:
        raise NotImplementedError

    def context(self) -> Any:
        return nullcontext()


class Fingerprinted(Own):
    top_k, head = 0, None

    def __init__(self, fingerprint: str = "1") -> None:
        super().__init__()
        self.fingerprint = fingerprint

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        return tuple((prompt.text or "").encode())


def test_a_teacher_of_ones_own_needs_a_fingerprint(tmp_path):
    with pytest.raises(
        ConfigError, match="a Own does not tell when that changes: it has no fingerprint, top_k, head, prompt_ids"
    ):
        CachedTeacher(Own(), TensorStore(tmp_path))  # pyright: ignore[reportArgumentType]
    for fingerprint, asked in (("1", 1), ("1", 0), ("2", 1)):
        own: Any = Fingerprinted(fingerprint)
        CachedTeacher(own, TensorStore(tmp_path)).score([rollout()], "sampled")
        assert own.asked == asked


def test_targets_with_nan_are_not_kept(tmp_path):
    own: Any = Fingerprinted()
    teacher = CachedTeacher(own, TensorStore(tmp_path))
    own.value = float("nan")
    teacher.score([rollout()], "sampled")
    own.value = -float("inf")
    (found,) = teacher.score([rollout()], "sampled")
    assert own.asked == 2 and float(found.teacher_logp[0]) == -float("inf")  # pyright: ignore[reportAttributeAccessIssue]
    teacher.score([rollout()], "sampled")
    assert own.asked == 2


def test_a_teacher_that_scores_too_few_is_refused(tmp_path):
    own: Any = Fingerprinted()
    score = own.score
    own.score = lambda rollouts, kind: score(rollouts, kind)[:-1]
    with pytest.raises(OpdError, match=r"Fingerprinted\.score returned 1 targets for 2 rollouts"):
        CachedTeacher(own, TensorStore(tmp_path)).score([rollout(), rollout("13>")], "sampled")


def test_a_damaged_score_stops_the_run_with_its_file_and_the_run_goes_on_without_it(world, tmp_path):
    cache = tmp_path / "cache"
    more = {"teacher__cache": str(cache), "eval__every": 0, "checkpoint__every": 0}
    plain = run(world, tmp_path / "plain", eval__every=0)
    assert run(world, tmp_path / "first", **more) == plain
    bad = sorted(cache.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)[5]
    content = bytearray(bad.read_bytes())
    content[-3] ^= 16
    bad.write_bytes(content)
    config = build(merge({}, settings(world, tmp_path / "second", **more)))
    with pytest.raises(CacheError, match=r"Delete that file, and go on") as caught:
        train(config)
    assert str(bad) in str(caught.value) and "entry" in str(caught.value)
    assert len(numbers(tmp_path / "second")) == 5, "what was trained by then is in a checkpoint"
    bad.unlink()
    train(config, resume=True)
    assert numbers(tmp_path / "second") == plain


def test_a_full_disk_costs_the_cache_and_not_the_run(world, tmp_path, monkeypatch, capsys):
    plain = run(world, tmp_path / "plain")
    original = TensorStore._write
    written: list[int] = []

    def write(self: TensorStore, entries: Any, about: Any) -> None:
        written.append(1)
        with room_for_files_of(200 if len(written) > 2 else 1 << 40):
            original(self, entries, about)

    monkeypatch.setattr(TensorStore, "_write", write)
    full = run(world, tmp_path / "full", teacher__cache=str(tmp_path / "cache"), log__progress="plain")
    said = capsys.readouterr()
    assert full == plain and (said.out + said.err).count("no longer kept in") == 1
    assert "The run goes on without" in said.out + said.err and len(written) == 3
    monkeypatch.setattr(TensorStore, "_write", original)
    assert run(world, tmp_path / "again", teacher__cache=str(tmp_path / "cache")) == plain


def test_the_end_of_a_run_says_what_the_folder_holds(world, tmp_path, capsys):
    run(world, tmp_path / "run", teacher__cache=str(tmp_path / "cache"), log__progress="plain")
    said = capsys.readouterr()
    size = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors")) / 2**20
    assert f"teacher.cache '{tmp_path / 'cache'}': " in said.out + said.err
    assert f" scored responses in {size:.1f} MiB" in said.out + said.err and size > 0.05


def test_a_resumed_run_may_take_a_cache_or_drop_it(world, tmp_path):
    whole = run(world, tmp_path / "whole", eval__every=0)
    for name, first, then in (
        ("taken", {}, {"teacher__cache": str(tmp_path / "c")}),
        ("dropped", {"teacher__cache": str(tmp_path / "d")}, {}),
    ):
        folder = tmp_path / name

        def stop(record: dict[str, float]) -> None:
            if record["step"] == 3:
                raise KeyboardInterrupt

        config = build(merge({}, settings(world, folder, eval__every=0, **first)))
        with pytest.raises(KeyboardInterrupt):
            opd.Distiller.from_config(config, callbacks=stop).train()
        train(build(merge({}, settings(world, folder, eval__every=0, **then))), resume=True)
        assert numbers(folder) == whole


def test_runs_without_a_cache_have_no_such_metrics(world, tmp_path):
    run(world, tmp_path / "run")
    assert not any(name.startswith("teacher/cache") for r in read_metrics(tmp_path / "run") for name in r.metrics)
