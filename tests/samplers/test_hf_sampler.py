"""Rollouts come from the model's plain distribution, say where they end, and carry the log-probs they were drawn with."""

from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch

from opd.data.pack import layout_sequences
from opd.data.rendering import Renderer
from opd.errors import DataError, NonFiniteError
from opd.models import response_logits
from opd.samplers.base import Sampling
from opd.samplers.hf import HfSampler
from opd.samplers.off_policy import DatasetResponses, OnOffPolicySampler
from opd.teachers.vocabulary import VocabularyMatch
from opd.testing import byte_tokenizer, digit_tokenizer, tiny_causal_lm
from opd.types import Prompt, Rollout

PROMPTS = [Prompt(index=i, text=t) for i, t in enumerate(("12>", "3>", "4567>", "89>"))]
EOS, PAD = 12, 11


@pytest.fixture(scope="module")
def model():
    return tiny_causal_lm(digit_tokenizer(), max_positions=64, initializer_range=0.3, vocab_size=20)


def sampler_of(model, tokenizer=None, *, eos=(EOS,), pad=PAD, vocabulary=None, **sampling) -> HfSampler:
    tokenizer = tokenizer or digit_tokenizer()
    return HfSampler(
        model,
        Renderer(tokenizer, name="student"),
        Sampling(**({"max_new_tokens": 8} | sampling)),
        eos_ids=eos,
        pad_id=pad,
        vocabulary=vocabulary or VocabularyMatch(size=13),
        batch_size=3,
    )


def plain_logp(model, rollout: Rollout, *, size: int = 13) -> torch.Tensor:
    sequences = layout_sequences([rollout.prompt_ids], [rollout.response_ids], layout="packed", pad_id=0)
    with torch.no_grad():
        return response_logits(model, sequences)[:, :size].log_softmax(-1)


def test_sampler_log_probs_are_the_model_s_own_at_temperature_one(model):
    for rollout in sampler_of(model).sample(PROMPTS, seed=1):
        logp = plain_logp(model, rollout).gather(-1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.sampler_logp), logp, atol=1e-5, rtol=0)


def test_sampler_log_probs_are_those_after_temperature_and_top_k(model):
    for rollout in sampler_of(model, temperature=0.7, top_k=4).sample(PROMPTS, seed=1):
        logits = plain_logp(model, rollout) / 0.7
        kept = logits.topk(4, dim=-1)
        warped = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values).log_softmax(-1)
        logp = warped.gather(-1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.sampler_logp), logp, atol=1e-5, rtol=0)


def test_top_p_keeps_the_smallest_set_that_reaches_p(model):
    for rollout in sampler_of(model, top_p=0.5).sample(PROMPTS * 5, seed=2):
        probs = plain_logp(model, rollout).exp()
        for row, token in zip(probs, rollout.response_ids, strict=True):
            above = row[row > row[token]].sum()
            assert above < 0.5 + 1e-5, "a token outside the nucleus was sampled"


def test_samples_follow_the_model_s_distribution(model):
    rollouts = sampler_of(model, max_new_tokens=1).sample([PROMPTS[0]] * 3000, seed=5)
    counts = Counter(r.response_ids[0] for r in rollouts)
    expected = plain_logp(model, rollouts[0])[0].exp()
    for token, p in enumerate(expected.tolist()):
        deviation = 4.5 * math.sqrt(p * (1 - p) / 3000) + 1e-3
        assert abs(counts[token] / 3000 - p) < deviation


def test_the_model_s_own_generation_config_has_no_say(model):
    """A released model may carry a repetition penalty or top_k; rollouts under it would not be the student's own."""
    before = sampler_of(model).sample(PROMPTS, seed=1)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.top_k = 1
    model.generation_config.temperature = 0.1
    try:
        assert sampler_of(model).sample(PROMPTS, seed=1) == before
        assert model.generation_config.repetition_penalty == 5.0, "the model's own config is given back"
    finally:
        for name, value in (("repetition_penalty", None), ("top_k", None), ("temperature", None)):
            setattr(model.generation_config, name, value)


def test_the_same_seed_repeats_and_the_global_generator_is_left_alone(model):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first = sampler_of(model).sample(PROMPTS, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert sampler_of(model).sample(PROMPTS, seed=1) == first
    assert sampler_of(model).sample(PROMPTS, seed=2) != first


def test_rollouts_come_back_in_the_order_of_the_prompts(model):
    rollouts = sampler_of(model).sample(PROMPTS, seed=1)
    assert [r.prompt.index for r in rollouts] == [0, 1, 2, 3]
    assert [len(r.prompt_ids) for r in rollouts] == [3, 2, 5, 3]


def test_padding_rows_and_holes_are_never_sampled(model):
    vocabulary = VocabularyMatch(size=13, invalid_ids=(0, 1, 2, 3))
    rollouts = sampler_of(model, vocabulary=vocabulary).sample(PROMPTS * 50, seed=3)
    drawn = {token for r in rollouts for token in r.response_ids}
    assert drawn <= set(range(4, 13)) and len(drawn) > 5


def always(model, token_ids: list[int]):
    """A model that answers with these tokens, one after the other, whatever came before."""
    scripted = copy.deepcopy(model)
    start: list[int] = []

    def force(_module, args, kwargs, output):
        positions = kwargs["position_ids"][:, -1]
        if not start:
            start.append(int(positions.max()))
        step = int(positions.max()) - start[0]
        output.logits.fill_(-30.0)
        output.logits[..., token_ids[min(step, len(token_ids) - 1)]] = 30.0
        return output

    scripted.register_forward_hook(force, with_kwargs=True)
    return scripted


def test_a_finished_response_ends_with_its_eos_and_a_truncated_one_does_not(model):
    (finished,) = sampler_of(always(model, [5, 6, EOS])).sample(PROMPTS[:1], seed=0)
    assert finished.response_ids == (5, 6, EOS) and finished.finished
    assert finished.text == "56"
    (truncated,) = sampler_of(always(model, [5, 6, 7]), max_new_tokens=3).sample(PROMPTS[:1], seed=0)
    assert truncated.response_ids == (5, 6, 7) and not truncated.finished


def test_pad_equal_to_eos_hides_no_eos(model):
    (rollout,) = sampler_of(always(model, [5, EOS]), pad=EOS).sample(PROMPTS[:1], seed=0)
    assert rollout.response_ids == (5, EOS) and rollout.finished
    assert len(rollout.sampler_logp) == 2


def test_any_of_several_eos_ids_ends_a_response(model):
    (rollout,) = sampler_of(always(model, [5, 9, 6]), eos=(EOS, 9)).sample(PROMPTS[:1], seed=0)
    assert rollout.response_ids == (5, 9) and rollout.finished


def test_a_stop_string_ends_a_response_and_is_part_of_it(model):
    (rollout,) = sampler_of(always(model, [5, 6, 7, 8]), stop=("67",)).sample(PROMPTS[:1], seed=0)
    assert rollout.response_ids == (5, 6, 7) and rollout.finished and rollout.text == "567"


def test_greedy_takes_the_likeliest_token_and_has_no_sampler_log_probs(model):
    (rollout,) = sampler_of(model, temperature=0.0).sample(PROMPTS[:1], seed=0)
    assert rollout.sampler_logp is None
    assert list(rollout.response_ids) == plain_logp(model, rollout).argmax(-1).tolist()


def test_a_model_of_nans_is_not_sampled_from(model):
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[3] = math.nan
    with pytest.raises(NonFiniteError, match=r"(?s)probabilities are NaN.*Lower optimizer.lr"):
        sampler_of(broken).sample(PROMPTS, seed=0)


def test_a_rollout_does_not_depend_on_the_batch_that_it_is_drawn_in(model):
    """Its uniform numbers are its own, so that only rounding is left of rollout.batch_size."""
    sampler = sampler_of(model)
    before = sampler.sample(PROMPTS, seed=1)
    for sampler.batch_size in (1, 2, 100):
        again = sampler.sample(PROMPTS, seed=1)
        assert [r.response_ids for r in again] == [r.response_ids for r in before]
    assert [r.response_ids for r in sampler.sample(PROMPTS[:2], seed=1)] == [r.response_ids for r in before[:2]]


def test_no_gradient_flows_through_sampling(model):
    sampler_of(model).sample(PROMPTS, seed=0)
    assert all(p.grad is None for p in model.parameters())


def test_a_prompt_longer_than_the_context_is_refused_with_its_row(model):
    with pytest.raises(DataError, match=r"(?s)prompt 9 has 60 tokens.*context"):
        sampler_of(model).sample([Prompt(index=9, text="1" * 59 + ">")], seed=0)


def mixed(model, lmbda: float) -> list[Rollout]:
    renderer = Renderer(digit_tokenizer(), name="student")
    prompts = [Prompt(index=i, text=f"{i}>", response="42") for i in range(400)]
    return OnOffPolicySampler(sampler_of(model), DatasetResponses(renderer, 8), lmbda).sample(prompts, seed=11)


def test_lmbda_is_the_share_of_on_policy_samples(model):
    rollouts = mixed(model, 0.25)
    share = sum(r.source == "student" for r in rollouts) / len(rollouts)
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 400)
    assert [r.prompt.index for r in rollouts] == list(range(400))


def test_lmbda_one_and_zero_are_pure(model):
    assert all(r.source == "student" for r in mixed(model, 1.0))
    assert all(r.source == "dataset" for r in mixed(model, 0.0))


def test_a_dataset_response_ends_with_eos_and_a_long_one_is_cut_without(model):
    renderer = Renderer(digit_tokenizer(), name="student")
    prompts = [Prompt(index=0, text="1>", response="42"), Prompt(index=1, text="1>", response="123456")]
    short, long = DatasetResponses(renderer, 4).sample(prompts, seed=0)
    assert short.response_ids == (4, 2, EOS) and short.finished
    assert long.response_ids == (1, 2, 3, 4) and not long.finished


def test_a_chat_response_ends_as_its_template_ends_a_turn():
    """Gemma's way: the model stops at two ids, and the template writes the one that is not the tokenizer's EOS."""
    template = "{% for m in messages %}{{ m['content'] }}<turn>{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    tokenizer = byte_tokenizer(chat_template=template, extra_tokens=["<turn>"])
    turn, eos = tokenizer.convert_tokens_to_ids("<turn>"), tokenizer.eos_token_id
    chat = Prompt(index=0, messages=({"role": "user", "content": "hi"},), response="yo")
    text = Prompt(index=1, text="hi", response="yo")
    source = DatasetResponses(Renderer(tokenizer, name="student"), 8, eos_ids=(eos, turn))
    ends = [rollout.response_ids for rollout in source.sample([chat, text], seed=0)]
    assert ends == [(*b"yo", turn), (*b"yo", eos)]


def test_a_prompt_without_a_response_says_what_to_do(model):
    renderer = Renderer(digit_tokenizer(), name="student")
    with pytest.raises(DataError, match=r"(?s)Prompt 3 has no response.*off_policy=teacher"):
        DatasetResponses(renderer, 4).sample([Prompt(index=3, text="1>")], seed=0)


def test_a_teacher_s_samples_carry_the_student_s_rendering_of_the_prompt(model):
    tokenizer = byte_tokenizer()
    model = tiny_causal_lm(tokenizer, max_positions=128)
    teacher_tokenizer = byte_tokenizer(chat_template="{% for m in messages %}T:{{ m['content'] }}{% endfor %}=")
    student_tokenizer = byte_tokenizer(chat_template="{% for m in messages %}S:{{ m['content'] }}{% endfor %}")
    sampler = HfSampler(
        model,
        Renderer(teacher_tokenizer, name="teacher"),
        Sampling(max_new_tokens=3),
        eos_ids=(257,),
        pad_id=256,
        vocabulary=VocabularyMatch(size=258),
        source="teacher",
        student_renderer=Renderer(student_tokenizer, name="student"),
    )
    (rollout,) = sampler.sample([Prompt(index=0, messages=({"role": "user", "content": "hi"},))], seed=0)
    assert bytes(rollout.prompt_ids) == b"S:hi" and rollout.source == "teacher"
