"""`opd doctor` on teachers behind a URL: ends and answers of inference servers, and of `opd serve-teacher`, which scores alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import served as served_models
from doctor.pairs import (
    EOS,
    SECOND_END,
    SIZE,
    TOKENIZER,
    answering,
    bigram_lm,
    by_name,
    config_of,
    write_pair,
)
from opd.doctor.check import Check
from opd.doctor.ends import end_mass
from opd.errors import ServerError
from opd.remote.address import Address
from opd.remote.questions import Answer, BadAnswer
from opd.samplers.base import Sampling, draw
from opd.samplers.served import WRITERS, SglangWriter, Written
from opd.trainer.examine import examine
from opd.trainer.from_config import RunComponents
from opd.types import DenseTarget, Rollout, SampledTarget, TopKTarget
from remote.scripted import Asked, serving
from teachers.model_server import ModelServer

TOP_K: dict[str, Any] = {"objective__support": "teacher_top_k", "objective__top_k": 4}
DIGIT = TOKENIZER.convert_tokens_to_ids("7")


def values_of(folder: Path, url: str, student: torch.Tensor, **more: Any) -> dict[str, Any]:
    values = write_pair(folder, student, answering(), **{"teacher__model": ""} | TOP_K | more)
    return values | {"teacher.url": [url]}


def look(folder: Path, server: ModelServer, student: torch.Tensor, **more: Any) -> dict[str, Check]:
    with serving(server) as (running,):
        return by_name(examine(config_of(values_of(folder, running.url, student, **more))))


def server_of(table: torch.Tensor, ends: tuple[int, ...] = (EOS,), **more: Any) -> ModelServer:
    return ModelServer(bigram_lm(table), TOKENIZER, ends=ends, **more)


@pytest.mark.parametrize("api", ["vllm", "sglang", "openai"])
def test_an_inference_server_answers_and_its_ends_and_reward_are_looked_at(tmp_path: Path, api: str):
    found = look(tmp_path, server_of(answering(0.95)), answering(0.2), teacher__api=api)
    numbers = found["stop mass"].numbers
    end = 0.98 + 0.02 / SIZE
    assert numbers[f"'<eos>' ({EOS})"] == f"student {end:.3g}, teacher {end:.3g}"
    assert numbers["teacher cut off"] == 0.0 and numbers["ends"] > 25  # pyright: ignore[reportOptionalOperand, reportOperatorIssue]
    assert found["start/lengths"].numbers["teacher's mean length"] == pytest.approx(2, abs=0.3)
    task = found["start/task"]
    assert task.verdict == "green"
    mean, low, high = task.numbers["teacher's reward"]  # pyright: ignore[reportGeneralTypeIssues]
    assert low < mean < high and mean > 0.7
    assert found["student's ends"].verdict == "green"
    assert found["student's ends"].numbers[f"'<eos>' ({EOS})"] == f"student {end:.3g}, teacher {end:.3g}"


def test_a_served_teacher_that_is_worse_than_its_student_is_red(tmp_path: Path):
    found = look(tmp_path, server_of(answering(0.1)), answering(0.95))
    assert found["start/task"].verdict == "red" and "worse at this task" in found["start/task"].seen


def test_a_server_that_ends_with_an_id_of_its_own_is_red_and_the_advice_is_one_that_its_loss_can_take(tmp_path: Path):
    """The student may end with either id; nothing but the server's answers shows that its teacher ends with the other."""
    student = bigram_lm(answering(0.5))
    student.generation_config.eos_token_id = [EOS, SECOND_END]
    teacher = answering(0.9, ends={SECOND_END: 0.9, EOS: 0.1})
    found = look(tmp_path, server_of(teacher, (EOS, SECOND_END)), student)  # pyright: ignore[reportArgumentType]
    for name in ("stop mass", "student's ends"):
        assert found[name].verdict == "red", found[name]
        assert f"The teacher ends with '>' ({SECOND_END}) and the student with '<eos>' ({EOS})" in found[name].seen
        assert "eos_groups" not in found[name].mend and f"eos_token_id: {SECOND_END}" in found[name].mend
        assert "off_policy: dataset" in found[name].mend


def test_an_end_that_the_server_does_not_tell_has_a_bound(tmp_path: Path):
    """The teacher goes on with one of four digits, which take all four places of its top 4."""
    table = answering()
    digits = [TOKENIZER.convert_tokens_to_ids(str(d)) for d in range(10)]
    for digit in digits:
        table[digit] = 0.02 / SIZE
        table[digit, digits[:4]] += 0.98 / 4
    found = look(tmp_path, server_of(table), answering(0.5))
    check = found["student's ends"]
    told = check.numbers[f"'<eos>' ({EOS})"]
    # The end is the sampled token, whose log-prob comes beside the top 4.
    assert told == f"student {0.98 + 0.02 / SIZE:.3g}, teacher {0.02 / SIZE:.3g}"
    assert check.verdict == "yellow" and "at most 0.000" in check.seen
    both = look(tmp_path, server_of(table), two_ends())["student's ends"]
    assert "not seen within the top 4: at most" in str(both.numbers[f"'>' ({SECOND_END})"])


def two_ends() -> Any:
    student = bigram_lm(answering(0.5))
    student.generation_config.eos_token_id = [EOS, SECOND_END]
    return student


@pytest.mark.parametrize("spoil", ["refuses", "text"])
def test_a_server_that_only_scores_is_said_so_and_the_rest_is_looked_at(tmp_path: Path, spoil: str):
    def text_alone(asked: Asked, body: Any) -> Any:
        for choice in body.get("choices", ()) if isinstance(body, dict) else ():
            choice.pop("token_ids", None)
        return body

    server = server_of(answering(), ()) if spoil == "refuses" else server_of(answering(), change=text_alone)
    found = look(tmp_path, server, answering(0.4))
    for name in ("stop mass", "start/task"):
        assert found[name].verdict == "skipped", found[name]
        assert found[name].seen.startswith("The teacher's server wrote no answers: ")
    assert ("does not write" if spoil == "refuses" else "text without token ids") in found["stop mass"].seen
    assert found["student's ends"].verdict == found["alignment"].verdict == "green"


def test_a_run_that_trains_on_sampled_tokens_asks_no_server_for_more(tmp_path: Path):
    sampled = {"objective__support": "sampled", "objective__estimator": "k1", "objective__delivery": "advantage"}
    # No two tokens are equally likely, as with any real model: a log-prob alone cannot tell those apart.
    uneven = answering(0.9) * (1 + 0.1 * torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(0)))
    server = server_of(uneven / uneven.sum(-1, keepdim=True), max_logprobs=0)
    found = look(tmp_path, server, answering(0.3), objective__top_k=None, **sampled)
    for name in ("alignment", "stop mass", "student's ends"):
        assert found[name].verdict == "green", found[name]
    assert found["start/task"].verdict in ("green", "yellow")


@pytest.fixture(scope="module")
def exact() -> Iterator[str]:
    """`opd serve-teacher` of a teacher that ends with another id than most students."""
    model = served_models.freeze_model(bigram_lm(answering(0.9, ends={SECOND_END: 0.9, EOS: 0.1})), TOKENIZER)
    with served_models.serving(model) as running:
        yield running.url


def test_opd_serve_teacher_is_asked_about_the_student_s_ends_and_writes_no_answers(tmp_path: Path, exact: str):
    plain = {"objective__support": "full", "objective__top_k": None, "teacher__api": "opd"}
    alike = by_name(examine(config_of(values_of(tmp_path / "a", exact, answering(0.5), **plain))))
    for name in ("stop mass", "start/task"):
        assert (
            alike[name].verdict == "skipped" and "opd serve-teacher scores answers and writes none" in alike[name].seen
        )
    check = alike["student's ends"]
    assert check.verdict == "yellow" and "at most 0.0989" in check.seen
    expected = 0.98 * 0.1 + 0.02 / SIZE
    assert check.numbers[f"'<eos>' ({EOS})"] == f"student {0.98 + 0.02 / SIZE:.3g}, teacher {expected:.3g}"
    either = by_name(examine(config_of(values_of(tmp_path / "b", exact, two_ends(), **plain))))["student's ends"]
    assert either.verdict == "red" and f"objective.eos_groups: [[{SECOND_END}, {EOS}]]" in either.mend
    grouped = values_of(tmp_path / "c", exact, two_ends(), **plain, objective__eos_groups=[[EOS, SECOND_END]])
    assert by_name(examine(config_of(grouped)))["student's ends"].verdict == "green"


# --- the answers themselves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", ["vllm", "sglang", "openai"])
def test_a_server_s_answer_keeps_its_end_and_the_student_s_rendering(tmp_path: Path, api: str):
    with serving(server_of(answering(0.999))) as (running,):
        parts = RunComponents(config_of(values_of(tmp_path, running.url, answering(0.5), teacher__api=api)))
        sampler = parts.teachers.sampler(parts.config.rollout, parts.pad_id, parts.loaded, servers=True)
        assert sampler is not None
        prompts = parts.schedule.take(0, 4)
        rollouts = draw(sampler, prompts, 1, seed=1)
        cut = draw(sampler.with_sampling(Sampling(max_new_tokens=1)), prompts, 1, seed=1)
    for one, short in zip(rollouts, cut, strict=True):
        right = TOKENIZER.convert_tokens_to_ids(one.prompt.answer)
        assert one.response_ids == (right, EOS) and one.finished and one.source == "teacher"
        assert one.prompt_ids == parts.renderer.prompt_ids(one.prompt)
        assert short.response_ids == (right,) and not short.finished
    assert parts.teachers.sampler(parts.config.rollout, parts.pad_id, parts.loaded) is None


def test_a_stop_string_ends_a_server_s_answer(tmp_path: Path):
    with serving(server_of(answering(0.999))) as (running,):
        values = values_of(tmp_path, running.url, answering(0.5), rollout__stop=[str(d) for d in range(10)])
        parts = RunComponents(config_of(values))
        sampler = parts.teachers.sampler(parts.config.rollout, parts.pad_id, parts.loaded, servers=True)
        assert sampler is not None
        rollouts = draw(sampler, parts.schedule.take(0, 4), 1, seed=1)
    assert all(len(one.response_ids) == 1 and one.finished for one in rollouts)


def answer_of(body: Any) -> Answer:
    address = Address(url="http://127.0.0.1:1", host="127.0.0.1", encrypted=False)
    return Answer(server=address, content=json.dumps(body).encode(), headers={})


@pytest.mark.parametrize(
    ("api", "body"),
    [
        ("vllm", {"choices": [{"text": "7", "finish_reason": "stop"}]}),
        ("vllm", {"choices": [{"text": "", "token_ids": [], "finish_reason": "stop"}]}),
        ("openai", {"choices": [{"text": "7", "finish_reason": "stop", "logprobs": {"tokens": ["7", "<eos>"]}}]}),
        ("sglang", {"meta_info": {"finish_reason": {"type": "length"}, "output_token_logprobs": [[-1.0, None]]}}),
    ],
)
def test_an_answer_without_ids_is_not_asked_for_again(api: str, body: Any):
    with pytest.raises(ServerError, match="text without token ids"):
        WRITERS[api]().read(answer_of(body))


@pytest.mark.parametrize(("api", "body"), [("vllm", {"choices": []}), ("sglang", {"text": "7"}), ("openai", [])])
def test_an_answer_of_another_form_is_asked_for_again(api: str, body: Any):
    with pytest.raises(BadAnswer):
        WRITERS[api]().read(answer_of(body))


def test_what_ended_an_answer_of_sglang_is_its_last_id_once():
    def read(ids: list[int], reason: dict[str, Any]) -> Written:
        return SglangWriter().read(
            answer_of({"meta_info": {"finish_reason": reason, "output_token_logprobs": [[-1.0, i, None] for i in ids]}})
        )

    ended = {"type": "stop", "matched": 11}
    assert read([7], ended) == read([7, 11], ended) == Written(ids=(7, 11), finished=True)
    assert read([7], {"type": "length", "length": 1}) == Written(ids=(7,), finished=False)


# --- bounds, by pencil --------------------------------------------------------------------------------------------------


class Told:
    """A teacher that has said this."""

    def __init__(self, target: DenseTarget | TopKTarget | SampledTarget) -> None:
        self.target = target

    def score(self, rollouts: Any, kind: str) -> list[Any]:
        return [self.target]


def ended_with(token: int, parts: Any = None) -> Rollout:
    return Rollout(
        prompt=None, prompt_ids=(), response_ids=(3, token), sampler_logp=None, finished=True, policy_version=0
    )  # pyright: ignore[reportArgumentType]


def test_what_a_server_leaves_out_is_bounded_by_its_least_and_by_the_rest():
    logp = torch.tensor([[0.9, 0.1], [0.5, 0.3]]).log()
    target = TopKTarget(
        ids=torch.tensor([[1, 2], [5, 6]]), teacher_logp=logp, sampled_logp=torch.tensor([0.1, 0.15]).log()
    )
    mass = end_mass(Told(target), [ended_with(7)], [5, 7, 8], "top_k")  # pyright: ignore[reportArgumentType]
    assert mass.least == pytest.approx((0.5, 0.15, 0.0))
    assert mass.most == pytest.approx((0.5, 0.15, 0.05))  # 1 − 0.5 − 0.3 − 0.15
    likely = TopKTarget(ids=torch.tensor([[5, 6]]), teacher_logp=torch.tensor([[0.2, 0.1]]).log())
    mass = end_mass(Told(likely), [ended_with(5)], [5, 8], "top_k")  # pyright: ignore[reportArgumentType]
    assert mass.most == pytest.approx((0.2, 0.1))  # no likelier than the least that was told
    alone = SampledTarget(teacher_logp=torch.tensor([0.2, 0.7]).log())
    mass = end_mass(Told(alone), [ended_with(5)], [5, 8], "sampled")  # pyright: ignore[reportArgumentType]
    assert mass.least == pytest.approx((0.7, 0.0)) and mass.most == pytest.approx((0.7, 0.3))
    whole = DenseTarget(logits=torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log())
    assert end_mass(Told(whole), [ended_with(1)], [0, 1], "dense").least == pytest.approx((0.25, 0.75))  # pyright: ignore[reportArgumentType]
