"""A teacher behind a server says what the same model says in this process, and a server that does not say it is found out."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from model_server import ModelServer

import opd
from opd.data.rendering import Renderer
from opd.errors import DataError, OpdError, ServerError, VocabularyError
from opd.remote.breaker import Patience
from opd.remote.pool import ServerPool
from opd.teachers.local import LocalTeacher
from opd.teachers.server import RemoteTeacher
from opd.teachers.vocabulary import VocabularyMatch
from opd.testing import byte_tokenizer, tiny_causal_lm
from remote.scripted import Asked, Reply, free_port, serving

TOKENIZER = byte_tokenizer()
VOCABULARY = VocabularyMatch(size=len(TOKENIZER))
TOP_K = 8
OBJECTIVE = opd.Objective(support="teacher_top_k", top_k=TOP_K, tail="sampled")
SAMPLED = opd.Objective(support="sampled", estimator="k1", delivery="advantage")
QUICK = Patience(first_wait=0.005, longest_wait=0.02, first_rest=0.01, longest_rest=0.03)
APIS = ("vllm", "openai", "sglang")


def teacher_model(seed: int = 2) -> Any:
    return tiny_causal_lm(TOKENIZER, layers=1, hidden=32, seed=seed, initializer_range=0.4)


MODEL = teacher_model()


def rollouts(count: int = 5) -> list[opd.Rollout]:
    """Of different lengths, some with one token."""
    made = []
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(len(TOKENIZER), (1 + 7 * i % 11,), generator=generator).tolist()
        prompt = opd.Prompt(index=i, text=f"{i * 37} plus {i}")
        made.append(
            opd.Rollout(
                prompt=prompt,
                prompt_ids=(1, 2),
                response_ids=tuple(ids),
                sampler_logp=None,
                finished=True,
                policy_version=0,
                id=i,
            )
        )
    return made


def local(model: Any = MODEL, objective: opd.Objective = OBJECTIVE) -> LocalTeacher:
    supply = "sampled" if objective.support == "sampled" else "top_k"
    teacher = LocalTeacher(model, Renderer(TOKENIZER, name="teacher"), vocabulary=VOCABULARY, pad_id=0, supply=supply)
    teacher.bind_objective(objective)
    return teacher


@pytest.fixture
def remote():
    """A teacher behind servers that answer with the given functions."""
    with ExitStack() as stack:

        def make(
            *answers: Callable[[Asked], Reply | None],
            api: str = "vllm",
            objective: opd.Objective = OBJECTIVE,
            vocabulary: VocabularyMatch = VOCABULARY,
            canary_every: int = 0,
            **options: Any,
        ) -> RemoteTeacher:
            servers = stack.enter_context(serving(*(answers or (ModelServer(MODEL, TOKENIZER),))))
            pool = ServerPool(
                [server.url for server in servers],
                section="teacher",
                **{"patience": QUICK, "timeout": 5.0, "deadline": 20.0} | options,
            )
            stack.callback(pool.close)
            teacher = RemoteTeacher(
                pool,
                Renderer(TOKENIZER, name="teacher"),
                api=api,
                vocabulary=vocabulary,
                canary_every=canary_every,
            )
            teacher.servers = servers  # pyright: ignore[reportAttributeAccessIssue]
            teacher.bind_objective(objective)
            return teacher

        yield make


def assert_same(mine: Sequence[Any], theirs: Sequence[Any]) -> None:
    assert len(mine) == len(theirs) > 0
    for one, other in zip(mine, theirs, strict=True):
        assert type(one) is type(other)
        if isinstance(one, opd.SampledTarget):
            assert torch.allclose(one.teacher_logp, other.teacher_logp, atol=1e-4)
            continue
        assert torch.equal(one.ids, other.ids)
        assert torch.allclose(one.teacher_logp, other.teacher_logp, atol=1e-4)
        assert torch.allclose(one.sampled_logp, other.sampled_logp, atol=1e-4)


# --- the same targets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("objective", [OBJECTIVE, SAMPLED], ids=["top_k", "sampled"])
@pytest.mark.parametrize("concurrency", [1, 3, 16])
def test_it_says_what_the_same_model_says_in_this_process(
    remote: Callable[..., RemoteTeacher], api: str, objective: opd.Objective, concurrency: int
):
    mine = remote(api=api, objective=objective, concurrency=concurrency).score(rollouts())
    assert_same(mine, local(objective=objective).score(rollouts()))


def test_rows_share_requests_within_the_tokens_of_one(remote: Callable[..., RemoteTeacher]):
    teacher = remote(concurrency=2)
    teacher.connect()
    asked = teacher.servers[0].asked  # pyright: ignore[reportAttributeAccessIssue]
    before = len(asked)
    teacher.score(rollouts(8))
    assert sorted(len(one.body["prompt"]) for one in asked[before:]) == [4, 4]
    teacher.tokens_per_request = 1
    before = len(asked)
    assert_same(teacher.score(rollouts(8)), local().score(rollouts(8)))
    assert [len(one.body["prompt"]) for one in asked[before:]] == [1] * 8


def test_answers_out_of_order_are_put_in_order(remote: Callable[..., RemoteTeacher]):
    def reversed_choices(asked: Asked, body: Any) -> Any:
        return {**body, "choices": body["choices"][::-1]} if "choices" in body else body

    teacher = remote(ModelServer(MODEL, TOKENIZER, change=reversed_choices), concurrency=1)
    assert_same(teacher.score(rollouts()), local().score(rollouts()))


def test_the_tokens_that_it_cannot_read_are_replaced_as_a_local_teacher_does(remote: Callable[..., RemoteTeacher]):
    odd = [dataclasses.replace(r, response_ids=(*r.response_ids, len(TOKENIZER) + 5, 7)) for r in rollouts()]
    for mine, theirs, r in zip(remote().score(odd), local().score(odd), odd, strict=True):
        assert torch.allclose(mine.teacher_logp[:-1], theirs.teacher_logp[:-1], atol=1e-4)
        assert len(mine) == len(r.response_ids)


# --- what is found out before the run ---------------------------------------------------------------------------------


def spoiled(how: Callable[[dict[str, Any]], Any]) -> ModelServer:
    """A server whose every vLLM choice went through `how`."""

    def change(asked: Asked, body: Any) -> Any:
        if asked.path == "/v1/completions":
            body = {**body, "choices": [how(copy.deepcopy(choice)) for choice in body["choices"]]}
        return body

    return ModelServer(MODEL, TOKENIZER, change=change)


def every_entry(how: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda choice: {**choice, "prompt_logprobs": [None, *map(how, choice["prompt_logprobs"][1:])]}


def without_the_last_likeliest(entry: dict[str, Any]) -> dict[str, Any]:
    last = max(entry, key=lambda token: entry[token]["rank"])
    own = next(iter(entry))
    return {token: one for token, one in entry.items() if token != (last if last != own else [*entry][-1])}


def value(entry: dict[str, Any], logprob: Any) -> dict[str, Any]:
    return {
        token: {**one, "logprob": logprob if n == 0 else one["logprob"]} for n, (token, one) in enumerate(entry.items())
    }


def shifted(choice: dict[str, Any]) -> dict[str, Any]:
    return {**choice, "prompt_logprobs": [*choice["prompt_logprobs"][1:], choice["prompt_logprobs"][-1]]}


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "ignores the field": (
        lambda c: {k: v for k, v in c.items() if k != "prompt_logprobs"},
        "without prompt_logprobs.*transformers serve",
    ),
    "other ids": (lambda c: {**c, "prompt_token_ids": [1, *c["prompt_token_ids"]]}, "other prompt ids"),
    "one position less": (
        lambda c: {**c, "prompt_logprobs": c["prompt_logprobs"][:-1]},
        r"\d+ positions for \d+ tokens",
    ),
    "k short": (every_entry(without_the_last_likeliest), f"7 of its likeliest|{TOP_K} were asked for"),
    "NaN": (every_entry(lambda e: value(e, float("nan"))), "nan as a log-prob"),
    "inf": (every_entry(lambda e: value(e, float("inf"))), "inf as a log-prob"),
    "minus inf": (every_entry(lambda e: value(e, -9999.0)), "cut off by a top-p|contradict"),
    "null": (every_entry(lambda e: value(e, None)), "nothing that can be read"),
    "a probability": (every_entry(lambda e: value(e, 0.5)), "0.5 as a log-prob"),
    "shifted": (shifted, "shifted"),
    "index twice": (lambda c: {**c, "index": 0}, "answers .* to 3 rows"),
    "another id": (
        every_entry(lambda e: {str(300 + n) if n == 3 else t: v for n, (t, v) in enumerate(e.items())}),
        "no token of the student",
    ),
    "uniform": (every_entry(lambda e: {t: {**v, "logprob": -5.5} for t, v in e.items()}), "same log-prob"),
    "other log-probs than its likeliest": (
        every_entry(lambda e: value(e, -0.001)),
        "contradict|sum to",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_cannot_be_a_teacher_is_refused_with_its_address_and_the_fault(
    remote: Callable[..., RemoteTeacher], fault: str
):
    how, said = FAULTS[fault]
    teacher = remote(spoiled(how))
    with pytest.raises(OpdError, match=said) as raised:
        teacher.connect()
    assert teacher.servers[0].url in str(raised.value)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("fault", [name for name in FAULTS if name not in ("uniform", "index twice")])
def test_a_fault_in_the_middle_of_a_run_is_scored_again_or_stops_it(remote: Callable[..., RemoteTeacher], fault: str):
    how, said = FAULTS[fault]
    sick = spoiled(how)
    well = sick.change
    sick.change = lambda asked, body: body
    teacher = remote(sick)
    teacher.connect()
    left = 2

    def twice(asked: Asked, body: Any) -> Any:
        nonlocal left
        left -= asked.path == "/v1/completions"
        return well(asked, body) if left >= 0 else body

    sick.change = twice
    assert_same(teacher.score(rollouts()), local().score(rollouts()))
    sick.change = well
    with pytest.raises(ServerError, match=said):
        teacher.score(rollouts())


def test_a_shift_of_whole_answers_shows_where_no_id_could_tell(remote: Callable[..., RemoteTeacher]):
    """With texts in the place of ids, alignment can be seen from what a change of the last token changes."""

    def change(asked: Asked, body: Any) -> Any:
        if asked.path == "/v1/completions":
            for choice in body["choices"]:
                said = choice["logprobs"]
                said["tokens"] = ["?"] * len(said["tokens"])
                said["token_logprobs"] = [*said["token_logprobs"][1:], said["token_logprobs"][1]]
        return body

    teacher = remote(ModelServer(MODEL, TOKENIZER, change=change), api="openai", objective=SAMPLED)
    with pytest.raises(ServerError, match="shifted by one"):
        teacher.connect()


def test_texts_in_the_place_of_ids_are_refused_where_ids_are_needed(remote: Callable[..., RemoteTeacher]):
    def change(asked: Asked, body: Any) -> Any:
        for choice in body.get("choices", ()):
            choice["logprobs"]["tokens"] = ["a"] * len(choice["logprobs"]["tokens"])
        return body

    answers = ModelServer(MODEL, TOKENIZER, change=change)
    with pytest.raises(ServerError, match="--return-tokens-as-token-ids"):
        remote(answers, api="openai").connect()
    assert_same(
        remote(answers, api="openai", objective=SAMPLED).score(rollouts()), local(objective=SAMPLED).score(rollouts())
    )


@pytest.mark.parametrize("api", ["vllm", "openai"])
def test_a_k_beyond_the_servers_limit_names_the_flag(remote: Callable[..., RemoteTeacher], api: str):
    with pytest.raises(ServerError, match=r"--max-logprobs 20.*lower objective\.top_k"):
        remote(ModelServer(MODEL, TOKENIZER, max_logprobs=5), api=api).connect()


def test_a_chat_server_is_refused_with_the_reason(remote: Callable[..., RemoteTeacher]):
    def chat(asked: Asked) -> Reply:
        if asked.path == "/v1/models":
            return Reply(body={"data": [{"id": "gpt"}]})
        return Reply(status=404, body={"detail": "Not Found"})

    with pytest.raises(ServerError, match="A chat API cannot score given tokens"):
        remote(chat).connect()


def test_another_model_name_lists_what_is_served(remote: Callable[..., RemoteTeacher]):
    teacher = remote()
    teacher.served_model = "qwen"
    with pytest.raises(ServerError, match=r"serves tiny, and not 'qwen'; set teacher\.served_model"):
        teacher.connect()


def test_a_server_that_is_not_there_is_an_error_soon(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("opd.teachers.probe.START_SECONDS", 3.0)
    pool = ServerPool(f"http://127.0.0.1:{free_port()}", section="teacher", patience=QUICK)
    teacher = RemoteTeacher(pool, Renderer(TOKENIZER, name="teacher"), api="vllm", vocabulary=VOCABULARY)
    with pytest.raises(ServerError, match=r"ConnectError.*curl http://127\.0\.0\.1"):
        teacher.connect()


def test_another_vocabulary_is_found_by_token_texts(remote: Callable[..., RemoteTeacher]):
    class Other:
        def decode(self, ids: list[int]) -> str:
            return str(TOKENIZER.decode([(i + 1) % len(TOKENIZER) for i in ids]))

    with pytest.raises(VocabularyError, match=r"reads other tokens.*here and .* there"):
        remote(ModelServer(MODEL, Other())).connect()  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        VocabularyError, match=r"reads other tokens"
    ):  # no texts beside the log-probs; /detokenize tells
        remote(ModelServer(MODEL, Other()), api="openai").connect()  # pyright: ignore[reportArgumentType]


def test_two_models_are_no_pool(remote: Callable[..., RemoteTeacher]):
    with pytest.raises(ServerError, match="hold different models"):
        remote(ModelServer(MODEL, TOKENIZER), ModelServer(teacher_model(9), TOKENIZER)).connect()


def test_processed_log_probs_are_said(remote: Callable[..., RemoteTeacher]):
    (said,) = remote(api="sglang").connect()
    assert "temperature" in said and "processed" in said
    assert remote(api="vllm").connect() == []


def test_a_response_longer_than_the_server_reads_is_named(remote: Callable[..., RemoteTeacher]):
    teacher = remote(ModelServer(MODEL, TOKENIZER, context=16))
    with pytest.raises(DataError, match=r"Prompt \d and its response take \d+ tokens.*--max-model-len"):
        teacher.score(rollouts())


# --- the canary -------------------------------------------------------------------------------------------------------


def test_weights_that_are_lost_in_the_middle_stop_the_run(remote: Callable[..., RemoteTeacher]):
    server = ModelServer(MODEL, TOKENIZER)
    teacher = remote(server, canary_every=2)
    assert_same(teacher.score(rollouts()), local().score(rollouts()))
    teacher.score(rollouts())
    server.model = teacher_model(7)
    with pytest.raises(ServerError, match="other log-probs to a fixed text than at the start"):
        [teacher.score(rollouts()) for _ in range(3)]


def test_a_server_that_comes_back_with_another_model_is_not_used(remote: Callable[..., RemoteTeacher]):
    first, second = ModelServer(MODEL, TOKENIZER), ModelServer(MODEL, TOKENIZER)
    down = False
    teacher = remote(lambda asked: None if down else first(asked), second, concurrency=2)
    teacher.connect()
    down = True
    assert_same(teacher.score(rollouts(20)), local().score(rollouts(20)))
    first.model = teacher_model(7)
    down = False
    for _ in range(4):
        assert_same(teacher.score(rollouts(20)), local().score(rollouts(20)))


# --- in a run ---------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": f"{n} plus {n}", "answer": str(2 * n)} for n in range(10, 40)]


def distiller(teacher: Any, run_dir: Path, **more: Any) -> opd.Distiller:
    student = tiny_causal_lm(TOKENIZER, layers=1, hidden=32, seed=1, initializer_range=0.4)
    settings: dict[str, Any] = {
        "objective": OBJECTIVE,
        "rollout": {"max_new_tokens": 5},
        "train": {"steps": 4, "prompts_per_step": 6, "samples_per_prompt": 2},
        "optimizer": {"lr": 0.01, "warmup_steps": 0},
        "log": {"progress": "off"},
        "eval": {"every": 0},
    }
    arguments: dict[str, Any] = {"prompts": ROWS, **settings, **more}
    return opd.Distiller(student=(student, TOKENIZER), teacher=teacher, run_dir=run_dir, **arguments)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    "objective",
    [
        OBJECTIVE,
        opd.Objective(support="teacher_top_k", top_k=TOP_K),
        opd.Objective(support="teacher_top_k", top_k=TOP_K, divergence="forward_kl"),
        SAMPLED,
    ],
    ids=["tail=sampled", "bucket", "forward_kl", "k1"],
)
def test_a_teacher_by_url_gives_the_loss_and_gradient_of_a_local_one(
    tmp_path: Path, api: str, objective: opd.Objective
):
    supply = "sampled" if objective.support == "sampled" else "top_k"
    with serving(ModelServer(MODEL, TOKENIZER), ModelServer(MODEL, TOKENIZER)) as servers:
        served = distiller(
            {"url": [server.url for server in servers], "api": api}, tmp_path / "served", objective=objective
        )
        here = distiller(
            {"model": (teacher_model(), TOKENIZER), "supply": supply}, tmp_path / "local", objective=objective
        )
        for _ in range(3):
            mine, theirs = served.step(), here.step()
            for name in ("loss", "grad_norm", "teacher_logp"):
                assert mine[name] == pytest.approx(theirs[name], abs=1e-4), name
        assert all(len(server.asked) > 3 for server in servers)
    pairs = zip(served.components.student.model.parameters(), here.components.student.model.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in pairs)


def test_the_local_oracle_is_not_blind_to_another_teacher(tmp_path: Path):
    with serving(ModelServer(teacher_model(3), TOKENIZER)) as (server,):
        mine = distiller({"url": server.url}, tmp_path / "a").step()
    theirs = distiller({"model": (teacher_model(), TOKENIZER), "supply": "top_k"}, tmp_path / "b").step()
    assert abs(mine["loss"] - theirs["loss"]) > 1e-2


def test_teachers_by_routing_may_be_behind_servers_and_in_this_process(tmp_path: Path):
    rows = [{**row, "teacher": ("near", "far")[n % 2]} for n, row in enumerate(ROWS)]
    near = {"model": (teacher_model(5), TOKENIZER), "supply": "top_k"}
    with serving(ModelServer(MODEL, TOKENIZER)) as (server,):
        mine = distiller(None, tmp_path / "a", teachers={"near": near, "far": {"url": server.url}}, prompts=rows).step()
    far = {"model": (teacher_model(), TOKENIZER), "supply": "top_k"}
    theirs = distiller(None, tmp_path / "b", teachers={"near": near, "far": far}, prompts=rows).step()
    assert mine["teacher/far/share"] == theirs["teacher/far/share"] > 0
    for name in ("loss", "grad_norm", "teacher/near/reverse_kl", "teacher/far/reverse_kl"):
        assert mine[name] == pytest.approx(theirs[name], abs=1e-4), name
