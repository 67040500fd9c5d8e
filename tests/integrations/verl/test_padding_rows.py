"""verl's engines sample from every row of the output layer: a padding row, which is no token, costs its place in a loss at most."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from test_engine import ADVANTAGES, plainly
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl_engines import PROMPT_LENGTHS, RESPONSE_LENGTHS, batch, engine, jagged, policy_loss, same, step

from opd.integrations.verl.dry_run.sampling import score
from opd.integrations.verl.plugin.packed_reading import followed
from opd.integrations.verl.plugin.teachers.hidden_server import read_states
from opd.losses import Objective
from opd.teachers.vocabulary import VocabularyMatch
from opd.testing import save_model

PADDING = (
    280  # of student `padded` (300 rows) and teacher `wide` (320), not of `teacher` (258, as many as there are tokens)
)
TOKENS = sum(RESPONSE_LENGTHS)
K1 = {"support": "sampled", "estimator": "k1", "delivery": "advantage"}


def sampled(*places: tuple[int, int], token: int = PADDING, **settings):
    """The batch with an id in place of response tokens, each given as (sequence, token)."""
    data = batch(**settings)
    for sequence, position in places:
        start = int(data["input_ids"].offsets()[sequence]) + PROMPT_LENGTHS[sequence]
        data["input_ids"].values()[start + position] = token
        data["responses"].values()[int(data["responses"].offsets()[sequence]) + position] = token
    return data


def built(models: Path, teacher: str, **settings):
    return engine(models, student="padded", teacher={"model": str(models / teacher)}, **settings)


@pytest.fixture(scope="module")
def resized(models: Path) -> str:
    """`teacher` with rows for all that the student may draw."""
    model = AutoModelForCausalLM.from_pretrained(models / "teacher", dtype=torch.float32)
    model.resize_token_embeddings(300)
    save_model(model, AutoTokenizer.from_pretrained(models / "teacher"), models / "resized")
    return "resized"


def counted(metrics: dict[str, float]) -> tuple[float, float]:
    return metrics["actor/opd/padding_tokens"], metrics["actor/opd/unread_tokens"]


@pytest.mark.parametrize("remove_padding", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("settings", [{}, {"support": "teacher_top_k", "top_k": 16}], ids=["full", "top-k"])
def test_a_loss_over_the_vocabulary_does_not_need_the_token(models: Path, settings: dict, remove_padding: bool):
    data = sampled((2, 3), (0, 5), remove_padding=remove_padding)
    loss, gradients, metrics = step(built(models, "wide", remove_padding=remove_padding, **settings), data)
    expected, plain_gradients = plainly(models, data, Objective(**settings), student="padded", teacher="wide")
    assert loss == pytest.approx(expected, rel=1e-5)
    same(gradients, plain_gradients)
    assert counted(metrics) == (2, 0)
    assert all(math.isfinite(value) for value in metrics.values()), metrics


@pytest.mark.parametrize("size", [4, 1])
def test_what_a_teacher_could_not_read_is_left_out(models: Path, resized: str, size: int):
    """The padding row is the fourth of eight tokens, and the teacher has no row for it: the four after it weigh nothing."""
    data = sampled((2, 3), micro_batch_size=size)
    loss, gradients, metrics = step(built(models, "teacher"), data)
    later = tuple((2, position) for position in range(4, 8))
    hidden = sampled((2, 3), hide=later)
    expected, plain_gradients = plainly(models, hidden, Objective(), student="padded", teacher=resized)
    share = (TOKENS - len(later)) / TOKENS  # verl divides by all response tokens
    assert loss == pytest.approx(share * expected, rel=1e-5)
    same(gradients, {name: share * gradient for name, gradient in plain_gradients.items()})
    assert counted(metrics) == (1, 4)
    by_hand = step(built(models, "wide"), sampled())[2]
    assert metrics.keys() == by_hand.keys() and counted(by_hand) == (0, 0)


@pytest.mark.parametrize("teacher", ["wide", "teacher"])
def test_a_loss_of_the_sampled_token_leaves_it_out(models: Path, resized: str, teacher: str):
    """The last token of its response, so that nothing is read after it."""
    loss, gradients, metrics = step(built(models, teacher, **K1), sampled((2, 7)))
    plain = {"wide": "wide", "teacher": resized}[teacher]
    expected, plain_gradients = plainly(
        models, sampled((2, 7), token=100, hide=((2, 7),)), Objective(**K1), student="padded", teacher=plain
    )
    share = (TOKENS - 1) / TOKENS
    assert loss == pytest.approx(share * expected, rel=1e-5)
    same(gradients, {name: share * gradient for name, gradient in plain_gradients.items()})
    assert counted(metrics) == (1, 0)


def test_its_advantage_is_verls_alone_where_both_are_added(models: Path):
    data = sampled((2, 3))
    both, gradients, _ = step(built(models, "wide", rl_weight=0.7, rl_distill_weight=0.2, **ADVANTAGES), data)
    learner, expert = (
        AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32) for name in ("padded", "wide")
    )
    combined = []
    for prompt, response, advantage in zip(
        *(data[k].unbind() for k in ("prompts", "responses", "advantages")), strict=True
    ):
        ids = torch.cat([prompt, response]).unsqueeze(0)
        with torch.no_grad():
            logp, logq = (
                m(input_ids=ids).logits[0, len(prompt) - 1 : -1, :258].log_softmax(-1) for m in (learner, expert)
            )
        inside = response.where(response != PADDING, 0).unsqueeze(-1)
        gap = (logq - logp).gather(-1, inside).squeeze(-1) * (response != PADDING)
        combined.append(0.7 * advantage + 0.2 * gap)
    data["advantages"] = jagged(combined)
    stock, stock_gradients, _ = step(built(models, "wide", rl_weight=1.0, rl_distill_weight=0.0), data)
    assert both == pytest.approx(stock, rel=1e-5)
    same(gradients, stock_gradients)


def test_every_response_may_be_padding_alone(models: Path):
    everywhere = [(s, t) for s, length in enumerate(RESPONSE_LENGTHS) for t in range(length)]
    for settings in (
        {},
        K1,
        {"rl_weight": 0.5},
        {**ADVANTAGES, "rl_weight": 0.5},
        {"rl_scale": "match", "rl_weight": 0.5},
    ):
        loss, gradients, metrics = step(built(models, "teacher", **settings), sampled(*everywhere), policy_loss())
        assert math.isfinite(loss) and all(gradient.isfinite().all() for gradient in gradients.values()), settings
        assert counted(metrics) == (TOKENS, TOKENS - len(RESPONSE_LENGTHS))


def test_of_several_teachers_all_must_have_read_it(models: Path):
    named = {name: {"model": str(models / name)} for name in ("teacher", "wide")}
    data = sampled((2, 3))
    _, _, metrics = step(engine(models, student="padded", teacher=None, teachers=named, mixture_kind="logit"), data)
    assert counted(metrics) == (1, 4)


@pytest.mark.parametrize("settings", [{}, K1], ids=["full", "sampled"])
def test_an_id_in_a_hole_of_the_vocabulary_is_no_token_either(models: Path, settings: dict):
    data = batch()
    holes = [int(data["responses"].values()[-1])]
    drawn = int((data["responses"].values() == holes[0]).sum())
    learner = built(models, "wide", **settings)
    learner.teachers.vocabulary = VocabularyMatch(size=258, invalid_ids=tuple(holes))
    loss, gradients, metrics = step(learner, data)
    assert counted(metrics) == (drawn, 0)
    assert all(math.isfinite(value) for value in (loss, *metrics.values()))
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def answered(models: Path, teacher: str, placement: str, settings: dict, data):
    """The batch with what a server of ours says about every sequence."""
    model = AutoModelForCausalLM.from_pretrained(models / teacher, dtype=torch.float32)
    sequences = [ids.tolist() for ids in data["input_ids"].unbind()]
    if placement == "hidden":
        said = [([[token] for token in [*ids[1:], 0]], read_states(model, ids)) for ids in sequences]
    else:
        said = [score(model, ids, 0 if settings == K1 else settings["top_k"]) for ids in sequences]
    data["teacher_ids"] = jagged([torch.tensor(ids, dtype=torch.int32) for ids, _ in said])
    data["teacher_logprobs"] = jagged([torch.as_tensor(values) for _, values in said])
    return data


@pytest.mark.parametrize(
    ("teacher", "placement", "settings"),
    [
        ("wide", "hidden", {}),
        ("teacher", "hidden", {}),
        ("teacher", "hidden", K1),
        ("teacher", "pool", K1),
        ("teacher", "pool", {"support": "teacher_top_k", "top_k": 16}),
    ],
    ids=["hidden, read on", "hidden, full", "hidden, sampled", "pool, sampled", "pool, top-k"],
)
def test_a_teacher_in_a_server_is_one_in_the_worker(models: Path, teacher: str, placement: str, settings: dict):
    data = answered(models, teacher, placement, settings, sampled((2, 3)))
    loss, gradients, metrics = step(built(models, teacher, placement=placement, **settings), data)
    expected, others, theirs = step(built(models, teacher, **settings), sampled((2, 3)))
    assert loss == pytest.approx(expected, rel=1e-5)
    same(gradients, others)
    assert counted(metrics) == counted(theirs) == (1, 0 if teacher == "wide" else 4)


def test_ids_that_no_token_owns_are_told_by_the_vocabulary():
    """Beyond the last token, and in a hole below it."""
    vocabulary = VocabularyMatch(size=6, invalid_ids=(0, 4))
    ids = torch.tensor([0, 1, 4, 5, 6, 1000])
    assert vocabulary.owns(ids).tolist() == [False, True, False, True, False, False]
    assert vocabulary.with_stand_ins(ids).tolist() == [1, 1, 1, 5, 1, 1]


def test_a_sequence_is_read_up_to_an_id_without_a_row():
    ids, offsets = torch.tensor([1, 9, 2, 3, 4, 9, 5]), torch.tensor([0, 3, 5, 7])
    assert followed(ids, offsets, torch.arange(7), rows=9).tolist() == [True, False, False, True, True, False, False]
    assert followed(ids, offsets, torch.arange(7), rows=10).all()


def test_servers_of_ours_read_on_after_an_id_without_a_row(models: Path):
    model = AutoModelForCausalLM.from_pretrained(models / "teacher", dtype=torch.float32)
    states = read_states(model, [97, 98, PADDING, 99])
    assert torch.equal(states[:2], read_states(model, [97, 98, 1, 99])[:2]) and states.shape[0] == 4
    ids, logps = score(model, [97, 98, PADDING, 99], 0)
    assert [row[0] for row in ids] == [98, PADDING, 99, 0] and logps[1][0] == -math.inf
    assert logps[0] == score(model, [97, 98, 1, 99], 0)[1][0]
