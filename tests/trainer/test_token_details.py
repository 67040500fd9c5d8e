"""What both models said at each recorded token is what their whole logits say in float64, before the update."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opd.config.recipe import build, merge
from opd.data.pack import pack
from opd.data.rendering import Renderer
from opd.losses import Objective, mix_teachers
from opd.reporting.details import token_details
from opd.reporting.record import SampleRecord, TokenDetails, TopTokens, read_samples
from opd.teachers.local import LocalTeacher
from opd.teachers.vocabulary import VocabularyMatch
from opd.testing import byte_tokenizer, digit_tokenizer, random_rollout, save_model, tiny_causal_lm
from opd.trainer.details import ViewCollector
from opd.trainer.metrics import TokenMetrics
from opd.trainer.policy import Policy
from opd.trainer.run import train
from opd.types import ModelView, TokenViews
from worlds import make_world, settings

TOKENIZER = digit_tokenizer()
IDS = TOKENIZER.get_vocab()
NAMES = ("even", "odd")
SHORT = 6e-4  # four digits are kept in a record


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A student, a teacher, and two more teachers to which prompts are routed."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    for name, hidden, seed in (("even", 32, 5), ("odd", 48, 6)):
        model = tiny_causal_lm(TOKENIZER, hidden=hidden, layers=1, max_positions=64, seed=seed, initializer_range=0.4)
        save_model(model, TOKENIZER, folder / name)
    rows = [{"prompt": f"{i * 7919 % 10_000}>", "answer": str(i), "teacher": NAMES[i % 2]} for i in range(40)]
    (folder / "routed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def samples_of(world: Path, run_dir: Path, **more: object) -> list[SampleRecord]:
    values = settings(
        world, run_dir, **{"train__steps": 2, "log__samples_every": 1, "checkpoint__every": 1, "eval__every": 0} | more
    )
    train(build(merge({}, {key: value for key, value in values.items() if value is not None})))
    return read_samples(run_dir)


def routed(world: Path, **more: object) -> dict[str, object]:
    own = {
        "teacher__model": None,
        "prompts__path": world / "routed.jsonl",
        "prompts__eval_path": world / "routed.jsonl",
    }
    return {key: value and str(value) for key, value in own.items()} | {f"teachers__{n}__model": str(world / n) for n in NAMES} | more  # fmt: skip


def by_hand(folder: Path, sample: SampleRecord, weights: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """log softmax of whole logits in float64: row t is about response token t, which the position before it predicts."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    if weights is not None:
        model.load_state_dict(weights, strict=False)
    prompt = TOKENIZER(sample.prompt).input_ids
    response = [IDS[token] for token in sample.tokens]
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def check_values(found: object, logp: torch.Tensor, sample: SampleRecord, who: str) -> None:
    """The log-probs of the tokens, and the entropies."""
    response = torch.tensor([IDS[token] for token in sample.tokens])
    expected = {
        "logp": logp.gather(-1, response[:, None])[:, 0],
        "entropy": -(logp.exp() * logp).sum(-1),
    }
    for name, values in expected.items():
        own = torch.tensor(getattr(found, f"{who}_{name}"), dtype=torch.float64)
        torch.testing.assert_close(own, values, rtol=SHORT, atol=1e-5)


def check_top(top: TopTokens | None, logp: torch.Tensor, k: int = 5) -> None:
    assert top is not None and len(top.tokens) == len(logp)
    best = logp.exp().topk(k, dim=-1)
    for tokens, probabilities, values, ids in zip(
        top.tokens, top.probabilities, best.values, best.indices, strict=True
    ):
        assert list(tokens) == TOKENIZER.convert_ids_to_tokens(ids.tolist())
        assert list(probabilities) == pytest.approx(values.tolist(), rel=SHORT)


def check_whole(sample: SampleRecord, student: torch.Tensor, teacher: torch.Tensor) -> None:
    details = sample.details
    assert details is not None
    check_values(details, student, sample, "student")
    check_values(details, teacher, sample, "teacher")
    check_top(details.student_top, student)
    check_top(details.teacher_top, teacher)


WHOLE = {
    "hidden states": {},
    "packed": {"train__layout": "packed"},
    "whole logits, made when they are used": {"teacher__supply": "dense"},
    "at other temperatures": {"objective__student_temperature": 2.0, "objective__teacher_temperature": 3.0},
    "drawn at another temperature": {"rollout__temperature": 0.7},
    "a loss of the sampled token": {"objective__support": "sampled", "objective__estimator": "k2"},
    "LoRA": {"student__lora__rank": 4},
    "natural gradient": {"optimizer__name": "natural_gradient"},
    "both losses, matched": {"rl__weight": 1.0, "rl__scale": "match", "rl__reward": "exact_match"},
    "one advantage": {
        "rl__weight": 1.0, "rl__combine": "advantages", "rl__reward": "exact_match", "objective__support": "sampled",
        "objective__estimator": "k1", "objective__delivery": "advantage", "teacher__supply": "dense",
    },
    "answers of the data set": {"rollout__lmbda": 0.0, "rollout__off_policy": "dataset"},
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_details_are_what_whole_logits_say(world, tmp_path, name):
    samples = samples_of(world, tmp_path / "run", **WHOLE[name])
    first = [sample for sample in samples if sample.step == 0]
    assert len(first) == 4 and any(len(sample.tokens) > 2 for sample in first)
    for sample in first:
        check_whole(sample, by_hand(world / "student", sample), by_hand(world / "teacher", sample))
        assert sample.teacher is None


def test_details_are_those_of_the_weights_before_the_update(world, tmp_path):
    samples = samples_of(world, tmp_path / "run", optimizer__lr=0.03, train__steps=3, checkpoint__keep=3)
    last = next(sample for sample in samples if sample.step == 2)
    before, after = (by_hand(world / "student", last, checkpoint(tmp_path / "run", n)) for n in (2, 3))
    check_whole(last, before, by_hand(world / "teacher", last))
    assert (before - after).abs().max() > 0.01, "the check above could not have failed"


def checkpoint(run_dir: Path, version: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"step-{version:08d}" / "weights.safetensors")


def test_the_named_tokens_of_a_top_k_target_are_the_teachers(world, tmp_path):
    for k, expected in ((8, 5), (3, 3)):
        more = {"teacher__supply": "top_k", "objective__support": "teacher_top_k", "objective__top_k": k}
        for sample in samples_of(world, tmp_path / str(k), train__steps=1, **more):
            teacher, details = by_hand(world / "teacher", sample), sample.details
            assert details is not None and details.teacher_entropy is None
            check_top(details.teacher_top, teacher, expected)
            check_top(details.student_top, by_hand(world / "student", sample))
            response = torch.tensor([IDS[token] for token in sample.tokens])
            own = teacher.gather(-1, response[:, None])[:, 0]
            assert details.teacher_logp == pytest.approx(own.tolist(), rel=SHORT)


def test_a_sampled_target_tells_the_log_prob_alone(world, tmp_path):
    more = {"teacher__supply": "sampled", "objective__support": "sampled", "objective__estimator": "k2"}
    for sample in samples_of(world, tmp_path / "run", train__steps=1, **more):
        details, teacher = sample.details, by_hand(world / "teacher", sample)
        assert details is not None and details.teacher_entropy is details.teacher_top is None
        own = [row[IDS[token]].item() for row, token in zip(teacher, sample.tokens, strict=True)]
        assert details.teacher_logp == pytest.approx(own, rel=SHORT)
        check_top(details.student_top, by_hand(world / "student", sample))


def test_a_reward_alone_has_the_students_view(world, tmp_path):
    more = {"rl__weight": 1.0, "rl__distill_weight": 0.0, "rl__reward": "exact_match"}
    for sample in samples_of(world, tmp_path / "run", train__steps=1, teacher__model=None, **more):
        details, student = sample.details, by_hand(world / "student", sample)
        assert details is not None and details.teacher_logp is details.teacher_entropy is details.teacher_top is None
        check_values(details, student, sample, "student")
        check_top(details.student_top, student)


@pytest.mark.parametrize("more", [{}, {"teachers__even__supply": "dense"}], ids=["hidden states", "whole logits"])
def test_each_sample_names_its_teacher_and_has_that_teachers_view(world, tmp_path, more):
    samples = samples_of(
        world, tmp_path / "run", train__steps=1, log__samples=12, prompts__shuffle=False, **routed(world, **more)
    )
    assert {sample.teacher for sample in samples} == set(NAMES)
    for sample in samples:
        assert sample.teacher is not None
        check_whole(sample, by_hand(world / "student", sample), by_hand(world / sample.teacher, sample))


@pytest.mark.parametrize(("kind", "temperature"), [("probability", 1.0), ("probability", 2.0), ("logit", 1.0)])
def test_a_mixture_has_the_mixed_distribution(world, tmp_path, kind, temperature):
    """Teachers are mixed at the objective's temperature, and the mixture is shown at 1, as `reverse_kl` is."""
    more = {"mixture__kind": kind, "mixture__weights": {"even": 0.3, "odd": 0.7}}
    more["objective__teacher_temperature"] = temperature
    for sample in samples_of(world, tmp_path / "run", train__steps=1, **routed(world, **more)):
        members = [(by_hand(world / name, sample) / temperature).log_softmax(-1) for name in NAMES]
        mixed = mix_teachers(members, torch.tensor([0.3, 0.7]), kind) * temperature
        check_whole(sample, by_hand(world / "student", sample), mixed.log_softmax(-1))
        assert sample.teacher is None


def test_added_losses_have_no_one_teacher(world, tmp_path):
    for sample in samples_of(world, tmp_path / "run", train__steps=1, **routed(world, mixture__kind="loss")):
        details = sample.details
        assert details is not None and details.teacher_logp is details.teacher_top is details.teacher_entropy is None
        check_top(details.student_top, by_hand(world / "student", sample))


def test_tokens_that_are_left_out_have_no_values(world, tmp_path):
    samples = samples_of(world, tmp_path / "run", train__steps=1, log__samples=12, train__token_fraction=0.5)
    left_out, seen = 0, 0
    for sample in samples:
        details, student, teacher = (
            sample.details,
            by_hand(world / "student", sample),
            by_hand(world / "teacher", sample),
        )
        assert details is not None
        assert details.sampler_logp is not None and not any(map(math.isnan, details.sampler_logp))
        if details.student_logp is None:  # none of its tokens is kept
            assert details.teacher_top is details.student_top is details.teacher_logp is None
            left_out += len(sample.tokens)
            continue
        assert details.student_top and details.teacher_top and details.teacher_entropy
        for place, token in enumerate(sample.tokens):
            best = details.student_top.tokens[place], details.teacher_top.tokens[place]
            if math.isnan(details.student_logp[place]):
                assert best == ((), ()) and math.isnan(details.teacher_entropy[place])
                left_out += 1
                continue
            seen += 1
            assert details.student_logp[place] == pytest.approx(student[place, IDS[token]].item(), rel=SHORT)
            for tokens, logp in zip(best, (student, teacher), strict=True):
                assert list(tokens) == TOKENIZER.convert_ids_to_tokens(logp[place].topk(5).indices.tolist())
    assert seen == math.ceil((seen + left_out) / 2) > 4


def test_the_samplers_log_probs_are_the_rollouts_own(world, tmp_path):
    """Drawn at temperature 0.7 from the student, they are its log-probs at 0.7."""
    for sample in samples_of(world, tmp_path / "run", train__steps=1, rollout__temperature=0.7):
        hot = (by_hand(world / "student", sample) / 0.7).log_softmax(-1)
        own = [row[IDS[token]].item() for row, token in zip(hot, sample.tokens, strict=True)]
        assert sample.details is not None and sample.details.sampler_logp == pytest.approx(own, rel=1e-3)


def test_first_samples_of_evaluations_have_details(world, tmp_path):
    """The teacher's own answers are shown to no student."""
    samples = samples_of(world, tmp_path / "run", eval__every=2, log__samples=3)
    evaluations = [sample for sample in samples if sample.phase == "eval"]
    assert [(s.step, s.who) for s in evaluations] == [(0, "student")] * 3 + [(0, "teacher")] * 3 + [(2, "student")] * 3
    for sample in evaluations:
        details, teacher = sample.details, by_hand(world / "teacher", sample)
        assert details is not None
        check_values(details, teacher, sample, "teacher")
        check_top(details.teacher_top, teacher)
        if sample.who == "teacher":
            assert details.student_logp is details.student_top is details.student_entropy is None
            continue
        weights = checkpoint(tmp_path / "run", 2) if sample.step == 2 else None
        student = by_hand(world / "student", sample, weights)
        check_whole(sample, student, teacher)


def test_only_steps_that_keep_samples_have_details(world, tmp_path):
    samples = samples_of(world, tmp_path / "run", train__steps=4, log__samples_every=3, log__samples=2)
    assert [sample.step for sample in samples] == [0, 0, 3, 3]
    assert all(sample.details is not None for sample in samples)


@pytest.mark.parametrize("layout", ["packed", "right_padded", "left_padded"])
@pytest.mark.parametrize("product", [True, False], ids=["from hidden states", "from whole logits"])
def test_views_are_of_the_common_vocabulary(layout, product):
    """Rows of padding and ids that are no token of both have no probability, and each rollout has its own rows."""
    tokenizer, vocabulary = byte_tokenizer(), VocabularyMatch(size=258, invalid_ids=(7, 250))
    models = [tiny_causal_lm(tokenizer, vocab_size=300, seed=seed, initializer_range=0.3) for seed in (1, 2)]
    renderer = Renderer(tokenizer, name="tiny")
    teacher = LocalTeacher(models[1], renderer, vocabulary=vocabulary, pad_id=256)
    policy = Policy(models[0], vocabulary=vocabulary, eos_ids=(257,), teacher_logits=teacher.logits)
    policy.head_is_a_product = product
    rollouts = [random_rollout(3 + i, 9 - 2 * i, 250, seed=i, index=i) for i in range(4)]
    rollouts = [
        dataclasses.replace(rollout, id=10 + i, prompt_ids=renderer.prompt_ids(rollout.prompt))
        for i, rollout in enumerate(rollouts)
    ]
    assert all(vocabulary.owns(torch.tensor(rollout.response_ids)).all() for rollout in rollouts)
    teacher.bind_objective(Objective())
    watch = ViewCollector(rollouts[1:])
    batches = pack(rollouts, teacher.score(rollouts, "hidden"), layout=layout, tokens_per_microbatch=24, pad_id=256)
    for batch in batches:
        policy.loss(batch, Objective(), TokenMetrics(), watch)
    assert len(batches) > 1 and watch.found.keys() == {rollout.id for rollout in rollouts[1:]}
    for rollout in rollouts[1:]:
        found, ids = watch.found[rollout.id], torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])
        assert found.positions.tolist() == list(range(len(rollout.response_ids)))
        for model, view in zip(models, (found.student, found.teacher), strict=True):
            logits = copy.deepcopy(model).double()(ids).logits[0, len(rollout.prompt_ids) - 1 : -1, :258].detach()
            logits[:, [7, 250]] = -torch.inf
            logp = logits.log_softmax(-1)
            assert view.top_ids is not None and torch.equal(view.top_ids, logp.topk(5).indices)
            assert view.logp is not None and view.top_probabilities is not None
            torch.testing.assert_close(view.top_probabilities.double(), logp.topk(5).values.exp(), rtol=1e-4, atol=1e-6)
            own = logp.gather(-1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
            torch.testing.assert_close(view.logp.double(), own, rtol=1e-4, atol=1e-5)


def test_a_token_of_probability_0_is_none_of_the_likeliest():
    strings = Renderer(TOKENIZER, name="tiny").token_strings
    ids, probabilities = torch.tensor([[4, 2, 9, 9]]), torch.tensor([[0.75, 0.25, 0.0, 0.0]])
    view = ModelView(top_ids=ids, top_probabilities=probabilities)
    views = TokenViews(positions=torch.tensor([0]), student=view, teacher=ModelView())
    found = token_details(views, 1, None, strings)
    assert found is not None and found.student_top == TopTokens(tokens=[("4", "2")], probabilities=[(0.75, 0.25)])


def test_what_nobody_scored_has_the_samplers_log_probs_or_nothing():
    strings = Renderer(TOKENIZER, name="tiny").token_strings
    assert token_details(None, 2, (-1.0, -2.0), strings) == TokenDetails(sampler_logp=(-1.0, -2.0))
    assert token_details(None, 2, None, strings) is None
