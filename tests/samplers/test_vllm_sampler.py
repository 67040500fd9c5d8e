"""VllmSampler against a server with vLLM's calls: its rollouts are the student's own, and every fault ends in an error that says so."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import FakeVllm, serving

from opd.data.pack import layout_sequences
from opd.data.rendering import Renderer
from opd.errors import DataError, ServerError
from opd.models import response_logits
from opd.remote.keys import ApiKey
from opd.samplers import vllm_http, vllm_server, vllm_weights
from opd.samplers.base import Sampling
from opd.samplers.vllm import VllmSampler
from opd.samplers.vllm_checks import Preflight
from opd.samplers.vllm_http import VllmHttp
from opd.samplers.vllm_server import VllmServer
from opd.samplers.vllm_weights import SyncFolder
from opd.teachers.vocabulary import VocabularyMatch
from opd.testing import digit_tokenizer, save_model, tiny_causal_lm
from opd.types import Prompt, Rollout

TOKENIZER = digit_tokenizer()
TOKENS, ROWS, EOS, PAD = 13, 20, 12, 11
PROMPTS = [Prompt(index=i, text=text) for i, text in enumerate(("12>", "3>", "4567>", "89>"))]


@dataclass
class Learner:
    model: Any
    version: int = 0


@pytest.fixture
def student() -> Learner:
    model = tiny_causal_lm(TOKENIZER, layers=1, hidden=32, max_positions=64, initializer_range=0.4, vocab_size=ROWS)
    return Learner(model)


@pytest.fixture
def server(student: Learner, tmp_path: Path) -> Iterator[FakeVllm]:
    with serving(save_model(student.model, TOKENIZER, tmp_path / "served")) as running:
        yield running


def sampler_of(
    server: FakeVllm, tmp_path: Path, *, key: str | None = None, timeout: float = 20.0, **sampling: Any
) -> VllmSampler:
    connect = partial(VllmHttp, key=key and ApiKey("VLLM_KEY", key), timeout=timeout, connections=8)
    engine = VllmServer(connect, SyncFolder(str(tmp_path / "sync"), {}), url=server.url, concurrency=8, patience=3.0)
    renderer = Renderer(TOKENIZER, name="student")
    return VllmSampler(
        engine,
        renderer,
        Sampling(**({"max_new_tokens": 8} | sampling)),
        eos_ids=(EOS,),
        vocabulary=VocabularyMatch(size=TOKENS, invalid_ids=(0,)),
        rows=ROWS,
        check=Preflight(prompts=[renderer.prompt_ids(p) for p in PROMPTS], needed_len=13, pad_id=PAD, rows=ROWS),
    )


@pytest.fixture
def sampler(server: FakeVllm, tmp_path: Path) -> Iterator[VllmSampler]:
    made = sampler_of(server, tmp_path)
    yield made
    made.engine.close()


@torch.no_grad()
def logp_of(model: Any, rollout: Rollout, temperature: float = 1.0) -> torch.Tensor:
    sequences = layout_sequences([rollout.prompt_ids], [rollout.response_ids], layout="packed", pad_id=0)
    logits = response_logits(model, sequences)[:, :TOKENS] / temperature
    logits[:, 0] = -torch.inf
    return logits.log_softmax(-1).gather(-1, torch.tensor(rollout.response_ids)[:, None])[:, 0]


def assert_on_policy(sampler: VllmSampler, student: Learner) -> None:
    for rollout in sampler.sample(PROMPTS * 3, seed=student.version):
        assert rollout.policy_version == student.version
        torch.testing.assert_close(
            torch.tensor(rollout.sampler_logp), logp_of(student.model, rollout), atol=1e-4, rtol=0
        )


def nudge(student: Learner) -> None:
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    student.version += 1


def test_rollouts_come_back_in_order_with_the_log_probs_of_their_sampler(sampler: VllmSampler, student: Learner):
    sampler.load(student)
    rollouts = sampler.sample(PROMPTS * 3, seed=1)
    assert [r.prompt.index for r in rollouts] == [0, 1, 2, 3] * 3
    assert all(0 not in r.response_ids and max(r.response_ids) < TOKENS for r in rollouts)
    assert all(r.finished == (r.response_ids[-1] == EOS) for r in rollouts)
    assert len({r.response_ids for r in rollouts[::4]}) > 1, "every prompt has a seed of its own"
    assert [r.response_ids for r in sampler.sample(PROMPTS * 3, seed=1)] == [r.response_ids for r in rollouts]
    assert_on_policy(sampler, student)
    warm = sampler.with_sampling(Sampling(max_new_tokens=8, temperature=0.7)).sample(PROMPTS, seed=1)
    for r in warm:
        torch.testing.assert_close(torch.tensor(r.sampler_logp), logp_of(student.model, r, 0.7), atol=1e-4, rtol=0)
    assert (
        sampler.with_sampling(Sampling(max_new_tokens=8, temperature=0.0)).sample(PROMPTS, seed=1)[0].sampler_logp
        is None
    )


@pytest.mark.parametrize("versions", [True, False], ids=["tokens", "completions"])
def test_weights_of_five_updates_arrive_with_their_version(
    student: Learner, server: FakeVllm, tmp_path: Path, versions: bool
):
    server.versions = versions
    sampler = sampler_of(server, tmp_path)
    for _ in range(5):
        sampler.load(student)
        assert server.version == f"opd-{sampler.run}-{student.version}" and not server.paused
        assert_on_policy(sampler, student)
        assert len(list((tmp_path / "sync").glob("*/step-*"))) == 1, "the folder before is gone"
        nudge(student)
    order = [
        path for path, _ in server.asked if path in ("/pause", "/collective_rpc", "/reset_prefix_cache", "/resume")
    ]
    assert order == ["/pause", "/collective_rpc", "/reset_prefix_cache", "/resume"] * 5
    sampler.engine.close()
    assert not list((tmp_path / "sync").iterdir())


def test_all_that_bears_on_a_response_is_sent(sampler: VllmSampler, student: Learner, server: FakeVllm):
    """What is left out would come from the model's generation_config.json."""
    sampler.load(student)
    sampler.limit(5)
    sampler.sample(PROMPTS[:1], seed=1)
    sent = server.asked[-1][1]["sampling_params"]
    assert sent["max_tokens"] == 5 and sent["stop_token_ids"] == [EOS] and sent["ignore_eos"] is True
    assert {int(i) for i in sent["logit_bias"]} == {0, *range(TOKENS, ROWS)}
    neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "n": 1}
    assert neutral.items() <= sent.items()


def spoil(**changes: Any) -> Any:
    """Change fields of a response's one choice."""

    def tamper(path: str, answer: dict[str, Any]) -> Any:
        for choice in answer.get("choices", ()):
            for name, change in changes.items():
                choice[name] = change(choice[name])
        return answer

    return tamper


def shifted(logprobs: dict[str, Any]) -> dict[str, Any]:
    rows = logprobs["content"]
    values = [row["logprob"] for row in rows]
    return {"content": [row | {"logprob": x} for row, x in zip(rows, values[1:] + values[:1], strict=True)]}


def with_logp(value: Any) -> Any:
    return lambda logprobs: {"content": [row | {"logprob": value} for row in logprobs["content"]]}


def at(path_wanted: str, found: Any) -> Any:
    return lambda path, answer: found if path == path_wanted else answer


FAULTS: dict[str, tuple[Any, str]] = {
    "log-probs shifted by one": (spoil(logprobs=shifted), "disagree about the same tokens by"),
    "uniform log-probs": (spoil(logprobs=with_logp(-2.5)), "disagree about the same tokens by"),
    "no log-prob": (spoil(logprobs=with_logp(None)), "a token without a log-prob"),
    "a probability above one": (spoil(logprobs=with_logp(0.5)), "gave the log-prob 0.5 to a token that it sampled"),
    "log-probs of other tokens": (
        spoil(token_ids=lambda ids: [*ids[::-1][:-1], 1, 2]),
        "log-probs of other tokens than it sampled",
    ),
    "log-probs missing": (spoil(logprobs=lambda _: None), "log-probs of other tokens"),
    "ids missing": (spoil(token_ids=lambda _: None), "returned text and no token ids: it ignores return_token_ids"),
    "ids of another model": (
        spoil(
            token_ids=lambda ids: [i + 100 for i in ids],
            logprobs=lambda o: {"content": [r | {"token_id": r["token_id"] + 100} for r in o["content"]]},
        ),
        "output layer has 20 rows: it serves another model",
    ),
    "aborted": (spoil(finish_reason=lambda _: "abort"), "that ended by 'abort'"),
    "no version": (spoil(weight_versions=lambda _: []), "answered from weights no version"),
    "an older version": (spoil(weight_versions=lambda _: [{"version": "opd-x-3"}]), "answered from weights opd-x-3"),
    "a version that changed meanwhile": (
        spoil(weight_versions=lambda spans: [*spans, {"version": "opd-x-9"}]),
        "answered from weights opd-x-9",
    ),
    "another prompt": (
        lambda path, answer: (
            answer | {"prompt_token_ids": [1, *answer["prompt_token_ids"]]} if "choices" in answer else answer
        ),
        "it adds or changes tokens",
    ),
    "two choices": (
        lambda path, a: a | {"choices": a["choices"] * 2} if "choices" in a else a,
        "without the one choice",
    ),
    "another kind of server": (at("/v1/models", {"data": [{"id": "it"}]}), "so it is no vLLM server"),
    "no calls for weights": (at("/pause", 404), "answered 404 to /pause: no; start it with VLLM_SERVER_DEV_MODE=1"),
    "a folder that it does not see": (
        at("/collective_rpc", 500),
        "rollout.vllm.sync_dir names one on a disk that both share",
    ),
    "a prefix cache that stays": (at("/reset_prefix_cache", {"success": False}), "did not empty its prefix cache"),
    "a version that does not move": (
        at("/weight_info", {"weight_version": "default"}),
        "took new weights and still says version default",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_answer_that_cannot_be_right_ends_the_run_before_its_first_step(
    sampler: VllmSampler, student: Learner, server: FakeVllm, fault: str
):
    server.tamper, what = FAULTS[fault]
    with pytest.raises(ServerError, match=re.escape(what)):
        sampler.load(student)


def test_raw_log_probs_are_told_from_the_sampler_s_own(sampler: VllmSampler, student: Learner, server: FakeVllm):
    server.raw = True
    with pytest.raises(ServerError, match="--logprobs-mode processed_logprobs"):
        sampler.load(student)


def test_a_server_that_takes_weights_and_does_not_use_them_is_seen_at_once(
    sampler: VllmSampler, student: Learner, server: FakeVllm
):
    server.ignores_weights = True
    nudge(student)
    with pytest.raises(ServerError, match="computes with other weights"):
        sampler.load(student)


def test_a_context_that_is_too_short_says_what_is_needed(student: Learner, server: FakeVllm, tmp_path: Path):
    server.context = 9
    with pytest.raises(ServerError, match=r"takes 9 tokens.*needs 13. Start it with --max-model-len 13"):
        sampler_of(server, tmp_path).load(student)


def test_a_prompt_longer_than_the_server_s_context_is_refused_with_its_row(sampler: VllmSampler, student: Learner):
    sampler.load(student)
    with pytest.raises(DataError, match=r"prompt 9 has 60 tokens.*context"):
        sampler.sample([Prompt(index=9, text="1" * 59 + ">")], seed=0)


def test_a_response_that_the_server_s_context_cuts_is_no_rollout(
    sampler: VllmSampler, student: Learner, server: FakeVllm
):
    sampler.load(student)
    server.context = 5
    with pytest.raises(ServerError, match="its context is full"):
        sampler.sample(PROMPTS * 4, seed=1)


def test_two_runs_do_not_share_a_server(
    sampler: VllmSampler, student: Learner, server: FakeVllm, tmp_path: Path, monkeypatch: Any
):
    sampler.load(student)
    other = sampler_of(server, tmp_path)
    with pytest.raises(ServerError, match=r"in use by another run of opd on this machine.*mode=managed starts one"):
        other.load(student)
    monkeypatch.setattr(VllmServer, "_claim", lambda self: None)  # a run on another machine
    other.load(student)
    for act in (lambda: sampler.sample(PROMPTS, seed=1), lambda: sampler.load(student)):
        with pytest.raises(ServerError, match=r"two runs share the server|another run changes the weights"):
            act()


def test_the_claim_on_a_server_is_given_back_and_leaves_no_file(
    sampler: VllmSampler, student: Learner, server: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    claims = tmp_path / "claims"
    claims.mkdir()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(claims))
    for turn in range(2):
        own = sampler_of(server, tmp_path / str(turn))
        own.load(student)
        assert len(list(claims.iterdir())) == 1
        with pytest.raises(ServerError, match="in use by another run"):
            sampler.load(student)
        own.engine.close()
        assert not list(claims.iterdir())


def test_weights_that_change_while_a_server_without_versions_samples_are_seen(
    student: Learner, server: FakeVllm, tmp_path: Path
):
    server.versions = False
    sampler = sampler_of(server, tmp_path)
    sampler.load(student)

    def change(path: str, answer: dict[str, Any]) -> Any:
        if path == "/v1/completions":
            server.version = "opd-other-1"
        return answer

    server.tamper = change
    with pytest.raises(ServerError, match="answered from weights opd-other-1"):
        sampler.sample(PROMPTS, seed=1)


def test_the_key_comes_from_the_environment_and_is_in_no_message(student: Learner, server: FakeVllm, tmp_path: Path):
    server.key = "sk-secret"
    sampler_of(server, tmp_path, key="sk-secret").load(student)
    wrong = sampler_of(server, tmp_path, key="sk-wrong")
    with pytest.raises(ServerError, match="refused the key") as refused:
        wrong.engine._calls()
    assert "sk-" not in str(refused.value)


def test_a_lost_connection_is_asked_again_and_nothing_is_lost_or_mixed_up(
    sampler: VllmSampler, student: Learner, server: FakeVllm, monkeypatch: Any
):
    monkeypatch.setattr(vllm_server, "RETRY_S", 0.01)
    sampler.load(student)
    expected = sampler.sample(PROMPTS * 6, seed=4)
    asked: list[str] = []

    def break_off(path: str, answer: dict[str, Any]) -> Any:
        if path == "/inference/v1/generate":
            asked.append(path)
            if len(asked) in (3, 11, 30):
                return None
            return 503 if len(asked) == 20 else answer
        return answer

    server.tamper = break_off
    assert sampler.sample(PROMPTS * 6, seed=4) == expected


def test_a_server_that_came_back_without_the_weights_gets_them_again(
    sampler: VllmSampler, student: Learner, server: FakeVllm, tmp_path: Path, monkeypatch: Any
):
    monkeypatch.setattr(vllm_server, "RETRY_S", 0.01)
    nudge(student)
    sampler.load(student)
    expected = sampler.sample(PROMPTS * 6, seed=4)

    def restart(path: str, answer: dict[str, Any]) -> Any:
        if path != "/inference/v1/generate":
            return answer
        server.tamper = lambda _, found: found
        server.load(str(tmp_path / "served"))
        server.version = "default"
        return None

    server.tamper = restart
    assert sampler.sample(PROMPTS * 6, seed=4) == expected


def test_a_server_that_is_gone_is_an_error_with_what_to_do(student: Learner, server: FakeVllm, tmp_path: Path):
    sampler = sampler_of(server, tmp_path)
    sampler.engine.patience = 0.1
    sampler.load(student)
    server.tamper = lambda *_: None  # connections that are open already
    server.server_close()
    with pytest.raises(ServerError, match=r"broke off while it was sampling.*go on with --resume"):
        sampler.sample(PROMPTS, seed=1)
    with pytest.raises(ServerError, match=r"broke off while it took new weights"):
        sampler.load(student)


def test_a_server_that_does_not_answer_in_time_says_which_setting(student: Learner, server: FakeVllm, tmp_path: Path):
    sampler = sampler_of(server, tmp_path, timeout=3.0)
    sampler.load(student)

    def slow(path: str, answer: dict[str, Any]) -> Any:
        time.sleep(6.0 if path == "/inference/v1/generate" else 0)
        return answer

    server.tamper = slow
    with pytest.raises(ServerError, match=r"did not answer .* within 3 s. Raise rollout.vllm.timeout"):
        sampler.sample(PROMPTS[:1], seed=1)


def test_a_sync_folder_that_is_full_says_how_much_room_is_needed(
    sampler: VllmSampler, student: Learner, tmp_path: Path, monkeypatch: Any
):
    sampler.load(student)
    nudge(student)

    class Usage:
        free = 100

    monkeypatch.setattr(vllm_weights.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(ServerError, match=r"MB are needed, 0 MB are free.*rollout.vllm.sync_dir"):
        sampler.load(student)
    assert len(list((tmp_path / "sync").glob("*/step-*"))) == 1, "nothing half written is left"


def test_weights_that_a_killed_run_left_are_deleted_and_those_of_a_living_one_are_not(student: Learner, tmp_path: Path):
    living, killed, new = (SyncFolder(str(tmp_path), {}) for _ in range(3))
    kept, left = living.write(student.model, 0), killed.write(student.model, 0)
    assert killed._lock is not None
    os.close(killed._lock)  # as the system does for a process that is gone
    made = new.write(student.model, 0)
    assert kept.exists() and made.exists() and not left.exists()
    living.remove()
    new.remove()
    assert not list(tmp_path.iterdir())


def test_a_tied_head_on_a_cpu_is_refused_where_opd_does_not_run_the_server(
    sampler: VllmSampler, student: Learner, server: FakeVllm
):
    server.tamper = at("/server_info", {"vllm_config": {"device_config": {"device": "cpu"}}})
    with pytest.raises(ServerError, match=r"tied to the embedding no new weights.*mode=managed"):
        sampler.load(student)


def test_responses_longer_than_the_first_check_s_are_no_surprise(student: Learner, server: FakeVllm, tmp_path: Path):
    sampler = sampler_of(server, tmp_path, max_new_tokens=40)
    sampler.load(student)
    assert {len(r.response_ids) for r in sampler.sample(PROMPTS * 10, seed=1) if not r.finished} <= {40}


def test_a_signal_gives_up_what_is_on_its_way_and_the_engine_can_go_on(
    sampler: VllmSampler, student: Learner, server: FakeVllm
):
    sampler.load(student)
    expected = sampler.sample(PROMPTS, seed=1)

    def slow(path: str, answer: dict[str, Any]) -> Any:
        time.sleep(30 if path == "/inference/v1/generate" else 0)
        return answer

    server.tamper = slow
    began = time.monotonic()
    alarm = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    alarm.start()
    with pytest.raises(KeyboardInterrupt):
        sampler.sample(PROMPTS, seed=1)
    assert time.monotonic() - began < 5
    server.tamper = lambda _, answer: answer
    assert sampler.sample(PROMPTS, seed=1) == expected
    sampler.engine.close()
    sampler.load(student)
    assert sampler.sample(PROMPTS, seed=1) == expected


def test_it_samples_nothing_before_it_has_weights(sampler: VllmSampler):
    with pytest.raises(ServerError, match="no weights of this run yet"):
        sampler.sample(PROMPTS, seed=1)


@pytest.mark.parametrize("path", ["/weight_info", "/pause", "/inference/v1/generate"])
@pytest.mark.parametrize("at_once", [True, False])
def test_an_engine_that_died_behind_its_api_is_a_server_that_is_gone(
    server: FakeVllm, student: Learner, tmp_path: Path, path: str, at_once: bool, monkeypatch: pytest.MonkeyPatch
):
    """The API answers 500 in many words; its health says why, at once or a moment later."""
    monkeypatch.setattr(vllm_server, "PATIENCE_S", 0.1)
    monkeypatch.setattr(vllm_http, "SETTLE_S", 0.01)
    sampler = sampler_of(server, tmp_path)
    sampler.load(student)
    looks = iter([] if at_once else [{}])

    def dead(at: str, answer: dict[str, Any]) -> Any:
        if at == "/health":
            return next(looks, 503)
        return (500, "Failed to pause generation: cancelled") if at == path else answer

    server.tamper = dead
    with pytest.raises(ServerError, match=r"is not there, or broke off while it .*its engine died"):  # noqa: PT012
        sampler.sample(PROMPTS, seed=0)
        sampler.load(student)


def test_an_error_of_a_server_that_lives_is_told_in_its_words(server: FakeVllm, student: Learner, tmp_path: Path):
    sampler = sampler_of(server, tmp_path)
    sampler.load(student)
    server.tamper = lambda at, answer: (500, "no room for this") if at == "/collective_rpc" else answer
    with pytest.raises(ServerError, match=r"answered 500 to /collective_rpc: no room for this"):
        sampler.load(student)
