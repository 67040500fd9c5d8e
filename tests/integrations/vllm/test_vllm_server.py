"""A real vLLM server: its samples are the student's own, after every update, and nothing of it is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import vllm_world as world_of
from vllm_world import EOS, PROMPTS, TOKENS, recipe, sampler_gap

from opd.errors import ServerError
from opd.samplers.base import Sampling
from opd.samplers.vllm import Request
from opd.trainer.from_config import RunComponents

pytestmark = pytest.mark.timeout(300)
WIDE = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def parts(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunComponents]:
    """A managed server with the student's first weights; tests of this file use it in order."""
    config = recipe(world, tmp_path_factory.mktemp("run"), rollout__vllm__max_model_len=96)
    made = RunComponents(config)
    made.sampler.load(made.student)
    yield made
    assert made.engine is not None
    made.engine.close()
    assert not world_of.servers(), "a server or a child of it is left"


def worst(parts: RunComponents, sampling: Sampling, seed: int = 3) -> float:
    """The largest difference of a sampler's log-prob from transformers'."""
    rollouts = parts.student_sampler.with_sampling(sampling).sample(PROMPTS * 4, seed=seed)
    return max(sampler_gap(parts.student.model, r, sampling) for r in rollouts)


def nudge(parts: RunComponents, scale: float = 0.02) -> None:
    """Other weights, as an update would leave them."""
    with torch.no_grad():
        for parameter in parts.student.model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    parts.student.version += 1


@pytest.mark.parametrize(
    "sampling",
    [
        WIDE,
        replace(WIDE, temperature=0.7),
        replace(WIDE, top_k=5),
        replace(WIDE, top_p=0.8),
        replace(WIDE, temperature=1.3, top_k=20, top_p=0.9),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "all"],
)
def test_log_probs_are_those_of_the_distribution_that_was_sampled(parts: RunComponents, sampling: Sampling):
    assert worst(parts, sampling) < 1e-4


def test_ids_that_are_no_token_of_both_sides_are_never_drawn(parts: RunComponents):
    rollouts = parts.student_sampler.with_sampling(replace(WIDE, temperature=2.0)).sample(PROMPTS * 50, seed=1)
    drawn = {i for r in rollouts for i in r.response_ids}
    assert max(drawn) < TOKENS and len(drawn) > 150


def test_a_prompt_has_a_seed_of_its_own(parts: RunComponents):
    sampler = parts.student_sampler.with_sampling(WIDE)
    first, again, other = (sampler.sample([PROMPTS[0]] * 8, seed=seed) for seed in (1, 1, 2))
    ids = [[r.response_ids for r in rollouts] for rollouts in (first, again, other)]
    assert ids[0] == ids[1] != ids[2] and len(set(ids[0])) == 8


def test_responses_end_where_those_of_transformers_would(parts: RunComponents):
    rollouts = parts.student_sampler.with_sampling(replace(WIDE, max_new_tokens=40)).sample(PROMPTS * 10, seed=5)
    ended = [r for r in rollouts if r.finished]
    assert ended and len(ended) < len(rollouts)
    assert all(r.response_ids[-1] == EOS and EOS not in r.response_ids[:-1] for r in ended)
    assert all(len(r.response_ids) == 40 for r in rollouts if not r.finished)
    stop = rollouts[0].text[2:4] if rollouts[0].text[2:4].isascii() else "e"
    stopped = parts.student_sampler.with_sampling(replace(WIDE, max_new_tokens=40, stop=(stop,))).sample(
        PROMPTS * 10, seed=5
    )
    hit = [r for r in stopped if stop in r.text]
    assert hit and all(r.finished and stop not in parts.renderer.decode(r.response_ids[:-1]) for r in hit)


def test_greedy_takes_the_likeliest_token_and_has_no_log_probs(parts: RunComponents):
    (rollout,) = parts.student_sampler.with_sampling(replace(WIDE, temperature=0.0)).sample(PROMPTS[:1], seed=0)
    ids = [*rollout.prompt_ids, *rollout.response_ids]
    with torch.no_grad():
        logits = parts.student.model(torch.tensor([ids[:-1]])).logits[0, len(rollout.prompt_ids) - 1 :, :TOKENS]
    assert rollout.sampler_logp is None and list(rollout.response_ids) == logits.argmax(-1).tolist()


def test_after_each_of_five_updates_the_samples_are_the_new_student_s(parts: RunComponents):
    for _ in range(5):
        old = [p.clone() for p in parts.student.model.parameters()]
        nudge(parts)
        version = parts.student.version
        parts.sampler.load(parts.student)
        (rollout,) = parts.sampler.sample(PROMPTS[:1], seed=1)
        assert rollout.policy_version == version
        assert worst(parts, WIDE, seed=version) < 1e-4
        now = [p.clone() for p in parts.student.model.parameters()]
        with torch.no_grad():
            for parameter, before in zip(parts.student.model.parameters(), old, strict=True):
                parameter.copy_(before)
            assert worst(parts, WIDE, seed=version) > 1e-2, "the weights before would be seen"
            for parameter, after in zip(parts.student.model.parameters(), now, strict=True):
                parameter.copy_(after)


def kill_servers() -> None:
    """All of vLLM's processes, and not the guard above them."""
    for process in world_of.servers():
        if "vllm_guard" not in " ".join(process.cmdline()):
            process.kill()


def test_a_server_killed_while_it_samples_is_started_again_with_the_same_weights(parts: RunComponents):
    engine: Any = parts.engine
    starts = engine._process.starts
    nudge(parts)
    parts.sampler.load(parts.student)
    draw, killed = engine._http.draw, []

    def killing(request: Request, settings: Any) -> Any:
        if not killed:
            killed.append(True)
            kill_servers()
        return draw(request, settings)

    engine._http.draw = killing
    assert worst(parts, WIDE) < 1e-4
    assert engine._process.starts == starts + 1


def test_a_server_killed_while_it_takes_weights_is_started_again_with_the_new_ones(parts: RunComponents):
    engine: Any = parts.engine
    starts = engine._process.starts
    nudge(parts)
    call = engine._http._call

    def killing(method: str, path: str, *more: Any, **options: Any) -> Any:
        if path == "/collective_rpc":
            kill_servers()
        return call(method, path, *more, **options)

    engine._http._call = killing
    parts.sampler.load(parts.student)
    assert engine._process.starts == starts + 1 and worst(parts, WIDE) < 1e-4


def test_a_server_whose_engine_alone_is_killed_as_by_a_full_memory_is_started_again(parts: RunComponents):
    """Its API lives on and answers 500. The engine is a worker's process, or the core's where the core does the work itself."""
    engine: Any = parts.engine
    starts = engine._process.starts
    below = psutil.Process(engine._process._guard.pid).children(recursive=True)
    named = {process: " ".join([process.name(), *process.cmdline()]) for process in below}
    victims = [process for process, name in named.items() if "VLLM::Worker" in name]
    victims = victims or [process for process, name in named.items() if "VLLM::EngineCore" in name]
    assert victims, named
    for process in victims:
        process.kill()
    nudge(parts)
    parts.sampler.load(parts.student)
    assert engine._process.starts == starts + 1 and worst(parts, WIDE) < 1e-4


def test_weights_of_another_run_are_seen_and_refused(parts: RunComponents):
    engine: Any = parts.engine
    engine._http._call("POST", "/update_weight_version", {"new_version": "opd-other-3"})
    with pytest.raises(ServerError, match=r"answered from weights opd-other-3.*another run changes the weights"):
        parts.sampler.sample(PROMPTS, seed=1)
    with pytest.raises(ServerError, match=r"has weights opd-other-3.*two runs share the server"):
        parts.sampler.load(parts.student)
    engine._http._call("POST", "/update_weight_version", {"new_version": parts.sampler.tag})


def test_a_server_of_the_user_s_without_versions_in_its_answers_does_as_well(
    parts: RunComponents, world: Path, tmp_path: Path
):
    """rollout.vllm.url, and the completions API."""
    url = parts.engine._process.url
    student = str(world / "untied")
    other = RunComponents(recipe(world, tmp_path / "run", student__model=student, rollout__vllm__url=url))
    other.engine._calls().tells_versions = False
    other.sampler.load(other.student)
    assert worst(other, replace(WIDE, temperature=0.7)) < 1e-4
    third = RunComponents(recipe(world, tmp_path / "third", rollout__vllm__url=url))
    with pytest.raises(ServerError, match="in use by another run of opd on this machine"):
        third.sampler.load(third.student)
    other.engine.close()
    with pytest.raises(ServerError, match=r"tied to the embedding no new weights.*mode=managed, which unties it"):
        third.sampler.load(third.student)
    third.engine.close()
    parts.engine._http._call("POST", "/update_weight_version", {"new_version": parts.sampler.tag})
    parts.sampler.load(parts.student)
    assert worst(parts, WIDE) < 1e-4
