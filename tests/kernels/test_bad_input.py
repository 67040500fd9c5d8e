"""Everything a fused loss refuses: what is wrong, why, what to do; before the first product."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace

import pytest
import torch
from kernel_cases import Products, World

from opd.errors import MissingDependencyError, NonFiniteError, ObjectiveError
from opd.kernels import PolicyTerm, TeacherMixture, linear_divergence
from opd.types import DenseTarget, Head, HiddenTarget, SampledTarget, TopKTarget

WORLD = World(6, 4, 11, torch.float32)
HIDDEN, WEIGHT, BIAS = WORLD.hidden_states.float(), WORLD.weight.float(), WORLD.bias.float()
TARGET = WORLD.target("hidden", torch.float32)
DENSE = WORLD.target("dense", torch.float32)
TOP_K = WORLD.target("top_k", torch.float32)
SAMPLED = WORLD.target("sampled", torch.float32)
MIXTURE = WORLD.target("probability", torch.float32)
IDS, ADVANTAGES = WORLD.response_ids, WORLD.advantages.float()
META = torch.device("meta")


def refused(error: type[Exception], *fragments: str, **changes: object) -> None:
    given = {
        "student_hidden": HIDDEN, "student_weight": WEIGHT, "target": TARGET, "bias": BIAS, "response_ids": IDS,
        "token_weights": torch.ones(6),
    } | changes  # fmt: skip
    args = [given.pop(name) for name in ("student_hidden", "student_weight", "target")]
    with Products() as seen, pytest.raises(error) as caught:
        linear_divergence(*args, **given)  # pyright: ignore[reportArgumentType]
    assert seen.count == 0
    for fragment in fragments:
        assert fragment in str(caught.value), str(caught.value)


def policy(**changes: object) -> PolicyTerm:
    return PolicyTerm(**({"advantages": ADVANTAGES} | changes))


def spoilt(tensor: torch.Tensor, row: int, value: float) -> torch.Tensor:
    wrong = tensor.clone()
    wrong[row if tensor.dim() == 1 else (row, 1)] = value
    return wrong


def teacher(**changes: object) -> HiddenTarget:
    return replace(TARGET, head=replace(TARGET.head, **changes))


# --- shapes and dtypes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"student_hidden": HIDDEN[None]}, ("student's hidden states must be [tokens, hidden]", "(1, 6, 4)", "flatten")),
        ({"student_weight": WEIGHT[0]}, ("its weight [vocab, hidden]", "(4,)")),
        ({"student_weight": WEIGHT.T.contiguous()}, ("4 features and its weight 11", "different models", "transposed")),
        ({"student_weight": WEIGHT.bfloat16()}, ("torch.float32 and its weight torch.bfloat16", "cast one to the other's")),
        ({"student_hidden": HIDDEN.long(), "student_weight": WEIGHT.long()}, ("torch.int64", "floating-point dtype")),
        ({"student_hidden": HIDDEN.cfloat(), "student_weight": WEIGHT.cfloat()}, ("torch.complex64",)),
        ({"bias": BIAS[:5]}, ("student's bias has shape (5,)", "11 rows", "one floating-point number per row")),
        ({"bias": BIAS.long()}, ("student's bias", "torch.int64")),
        ({"token_weights": torch.ones(5)}, ("token_weights has shape (5,)", "6 tokens", "one number per token")),
        ({"token_weights": torch.ones(6, 1)}, ("token_weights has shape (6, 1)",)),
        ({"token_weights": torch.ones(6, dtype=torch.long)}, ("token_weights must be floating point", "torch.int64")),
        ({"token_weights": torch.ones(6, dtype=torch.bool)}, ("token_weights must be floating point", "torch.bool")),
        ({"response_ids": IDS[:3]}, ("response_ids has shape (3,)", "6 tokens")),
        ({"response_ids": IDS.float()}, ("response_ids must be whole numbers", "torch.float32")),
        ({"response_ids": IDS.bool()}, ("response_ids must be whole numbers", "torch.bool")),
        ({"response_ids": IDS.to(torch.uint8)}, ("response_ids must be whole numbers", "int64 or int32", "torch.uint8")),
        ({"sampler_logp": torch.zeros(7)}, ("sampler_logp has shape (7,)",)),
        ({"sampler_logp": torch.zeros(6, dtype=torch.long)}, ("sampler_logp must be floating point",)),
        ({"policy": policy(advantages=torch.zeros(5))}, ("policy.advantages has shape (5,)",)),
        ({"policy": policy(old_log_prob=torch.zeros(5))}, ("policy.old_log_prob has shape (5,)",)),
        ({"policy": policy(importance_weights=torch.zeros(6, dtype=torch.long))}, ("policy.importance_weights must be",)),
    ],
)  # fmt: skip
def test_a_student_that_does_not_fit_together(changes, fragments):
    refused(ObjectiveError, *fragments, **changes)


@pytest.mark.parametrize(
    ("target", "fragments"),
    [
        (replace(TARGET, hidden=TARGET.hidden[:4]), ("target has 4 tokens and the student 6", "row t", "a mask or a shift")),
        (replace(TARGET, hidden=TARGET.hidden[:, :3]), ("teacher's hidden states have 3 features and its weight 7",)),
        (teacher(weight=TARGET.head.weight.bfloat16()), ("teacher's hidden states are torch.float32", "cast")),
        (teacher(bias=torch.zeros(3)), ("teacher's bias has shape (3,)", "11 rows")),
        (DenseTarget(logits=DENSE.logits[0]), ("teacher logits must be floating point [tokens, vocab]", "(11,)")),
        (DenseTarget(logits=DENSE.logits.long()), ("teacher logits must be floating point", "torch.int64")),
        (DenseTarget(logits=DENSE.logits[:2]), ("target has 2 tokens and the student 6",)),
        (replace(TOP_K, ids=TOP_K.ids[:, :2]), ("ids and teacher_logp of one shape [tokens, k]", "(6, 2)", "(6, 4)")),
        (TopKTarget(ids=TOP_K.ids[:, :0], teacher_logp=TOP_K.teacher_logp[:, :0]), ("of one shape [tokens, k]", "(6, 0)")),
        (replace(TOP_K, ids=TOP_K.ids.float()), ("of one shape [tokens, k]", "torch.float32")),
        (replace(TOP_K, teacher_logp=TOP_K.teacher_logp.long()), ("TopKTarget.teacher_logp must be floating point",)),
        (replace(TOP_K, sampled_logp=torch.zeros(3)), ("sampled_logp has 3 numbers and ids 6 rows", "one per token")),
        (replace(TOP_K, sampled_logp=torch.zeros(6, 2)), ("sampled_logp must be floating point [tokens]", "(6, 2)")),
        (SampledTarget(teacher_logp=torch.zeros(6, 2)), ("SampledTarget.teacher_logp must be", "[tokens]", "(6, 2)")),
        (SampledTarget(teacher_logp=torch.tensor(0.0)), ("SampledTarget.teacher_logp must be", "[tokens]", "()")),
        (SampledTarget(teacher_logp=torch.zeros(6, dtype=torch.long)), ("must be floating point [tokens]", "torch.int64")),
        (SampledTarget(teacher_logp=torch.zeros(4)), ("target has 4 tokens and the student 6",)),
        ("the teacher", ("target is a str", "HiddenTarget, DenseTarget, TopKTarget, SampledTarget or TeacherMixture")),
        (replace(MIXTURE, mixture="sum"), ("mixture='sum' is not one of probability, logit, loss",)),
        (replace(MIXTURE, targets=(TARGET, SAMPLED)), ("one member is a SampledTarget", "add the losses of several calls")),
        (replace(MIXTURE, targets=(TARGET, replace(TARGET, hidden=TARGET.hidden[:4]))), ("target has 4 tokens",)),
        (replace(MIXTURE, targets=(TARGET,)), ("1 teachers, but weights of shape (6, 2)", "[tokens, teachers]")),
        (replace(MIXTURE, targets=(), weights=torch.ones(0)), ("0 teachers",)),
        (replace(MIXTURE, weights=torch.ones(1, 6, 2) / 2), ("weights of shape (1, 6, 2)",)),
        (replace(MIXTURE, weights=torch.tensor([0.5, 0.6])), ("≥ 0 and sum to 1 at every token", "divide them by their sum")),
        (replace(MIXTURE, weights=torch.tensor([1.5, -0.5])), ("≥ 0 and sum to 1",)),
        (replace(MIXTURE, weights=torch.tensor([math.nan, 1.0])), ("≥ 0 and sum to 1",)),
    ],
)  # fmt: skip
def test_a_teacher_that_does_not_fit_the_student(target, fragments):
    refused(ObjectiveError, *fragments, target=target)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"student_weight": WEIGHT.to(META)}, "the student's weight"),
        ({"bias": BIAS.to(META)}, "the student's bias"),
        ({"token_weights": torch.ones(6, device=META)}, "token_weights"),
        ({"response_ids": IDS.to(META)}, "response_ids"),
        ({"sampler_logp": torch.zeros(6, device=META)}, "sampler_logp"),
        ({"policy": policy(advantages=ADVANTAGES.to(META))}, "policy.advantages"),
        ({"policy": policy(old_log_prob=ADVANTAGES.to(META))}, "policy.old_log_prob"),
        ({"policy": policy(importance_weights=ADVANTAGES.to(META))}, "policy.importance_weights"),
        ({"target": DenseTarget(logits=DENSE.logits.to(META))}, "the target"),
        ({"target": teacher(weight=TARGET.head.weight.to(META))}, "the teacher's weight"),
        ({"target": teacher(bias=torch.zeros(11, device=META))}, "the teacher's bias"),
        ({"target": replace(TOP_K, teacher_logp=TOP_K.teacher_logp.to(META))}, "TopKTarget.teacher_logp"),
        ({"target": replace(TOP_K, sampled_logp=TOP_K.sampled_logp.to(META))}, "TopKTarget.sampled_logp"),
        ({"target": SampledTarget(teacher_logp=SAMPLED.teacher_logp.to(META))}, "the target"),
        ({"target": replace(MIXTURE, weights=MIXTURE.weights.to(META))}, "the mixture's weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tensor_on_another_device_is_named(changes, name):
    refused(ObjectiveError, f"{name} is on meta", "move it there", **changes)


# --- vocabularies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("valid", [0, -1, 12])
def test_a_valid_vocabulary_that_the_student_does_not_have(valid):
    refused(ObjectiveError, f"valid_vocab={valid}", "11 rows", "counts the rows that are tokens", valid_vocab=valid)


def test_two_vocabularies_with_nothing_in_common():
    for target in (teacher(valid_vocab=0), teacher(valid_vocab=-3), DenseTarget(logits=torch.zeros(6, 0))):
        refused(ObjectiveError, "nothing is common to both", target=target, response_ids=None)
    refused(ObjectiveError, "nothing is common to both", student_weight=WEIGHT[:0], bias=None, response_ids=None)


@pytest.mark.parametrize(("wrong", "row"), [(11, 2), (-1, 0), (-100, 5)])
def test_an_id_outside_the_vocabulary_is_named_with_its_token(wrong, row):
    ids = IDS.clone()
    ids[row] = wrong
    advice = (f"{wrong} at token {row}", "11 entries", "same tokenizer", "masked tokens need a valid id too")
    refused(ObjectiveError, "response_ids has", *advice, response_ids=ids)
    top = TOP_K.ids.clone()
    top[row, 3] = wrong
    refused(ObjectiveError, "TopKTarget.ids has", *advice, target=replace(TOP_K, ids=top))


def test_an_id_beyond_the_common_vocabulary_is_outside_it():
    ids = torch.full((6,), 9)
    refused(ObjectiveError, "9 at token 0", "9 entries", response_ids=ids, valid_vocab=9)
    refused(
        ObjectiveError, "9 at token 0", "8 entries", response_ids=ids, target=DenseTarget(logits=DENSE.logits[:, :8])
    )
    refused(ObjectiveError, "9 at token 0", "7 entries", response_ids=ids, target=teacher(valid_vocab=7))


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"divergence": "kl"}, ("divergence='kl' is not known", "reverse_kl")),
        ({"divergence": "generalized_jsd", "beta": 1.5}, ("0 ≤ beta ≤ 1", "beta=1.5")),
        ({"divergence": "skew_reverse_kl", "beta": 0.0}, ("identically 0", "beta=1")),
        ({"divergence": "skew_forward_kl", "beta": 1.0}, ("identically 0", "beta=0")),
        ({"beta": 0.7}, ("beta=0.7 is not read by reverse_kl",)),
        ({"normalize": False}, ("normalize=False is read by generalized_jsd only",)),
        ({"student_temperature": 0.0}, ("student_temperature=0.0 must be > 0",)),
        ({"teacher_temperature": math.inf}, ("teacher_temperature=inf", "finite")),
        ({"target": TOP_K, "divergence": "alpha_beta_divergence"}, ("alpha_beta_divergence with support='teacher_top_k'",)),
        ({"target": TOP_K, "tail": "ignore"}, ("tail='ignore' is wrong", "use tail='bucket'")),
        ({"target": replace(TOP_K, ids=TOP_K.ids[:, :1], teacher_logp=TOP_K.teacher_logp[:, :1]), "tail": "renormalize"},
         ("identically 0", "larger top_k")),
        ({"target": replace(TOP_K, sampled_logp=None), "tail": "sampled"}, ("sampled_logp in the TopKTarget",)),
        ({"target": TOP_K, "tail": "sampled", "response_ids": None}, ("pass response_ids",)),
        ({"tail": "generalized"}, ("outside a top-k support", "this target has none; drop it")),
        ({"target": SAMPLED, "tail": "generalized"}, ("this target has none; drop it",)),
        ({"target": SAMPLED, "divergence": "generalized_jsd"}, ("k1", "estimates reverse KL, not generalized_jsd")),
        ({"target": SAMPLED, "estimator": "k2", "divergence": "forward_kl"}, ("estimator='k2' has the gradient of reverse KL",)),
        ({"target": SAMPLED, "estimator": "k3"}, ("estimator='k3' as a loss has the gradient of forward KL",)),
        ({"target": SAMPLED, "estimator": "k4"}, ("estimator='k4' is not known",)),
        ({"target": SAMPLED, "response_ids": None}, ("a SampledTarget is about the response tokens; pass response_ids",)),
        ({"estimator": "k3"}, ("estimator='k3' is what is made of a SampledTarget", "drop it")),
        ({"target": TOP_K, "estimator": "k2"}, ("estimator='k2' is what is made of a SampledTarget",)),
        ({"target": TOP_K, "teacher_temperature": 2.0}, ("teacher_temperature=2.0 needs the teacher's logits", "HiddenTarget")),
        ({"target": SAMPLED, "teacher_temperature": 2.0}, ("teacher_temperature=2.0 needs the teacher's logits",)),
        ({"target": None}, ("target, policy and entropy_bonus are all missing",)),
        ({"distill_weight": 0.0}, ("distill_weight=0 with a target", "pass target=None")),
        ({"distill_weight": math.nan}, ("distill_weight=nan must be a finite number",)),
        ({"entropy_bonus": math.inf}, ("entropy_bonus=inf must be a finite number",)),
        ({"entropy_bonus": -0.1}, ("entropy_bonus=-0.1 must be ≥ 0",)),
        ({"policy": policy(), "response_ids": None}, ("a policy term is about the response tokens; pass response_ids",)),
        ({"policy": policy(weight=math.nan)}, ("policy.weight=nan must be a finite number",)),
        ({"policy": policy(likelihood=True, clip_range=0.2)}, ("nothing is divided by an old probability nor clipped",)),
        ({"policy": policy(likelihood=True, old_log_prob=ADVANTAGES)}, ("drop old_log_prob and clip_range",)),
    ],
)  # fmt: skip
def test_a_loss_that_cannot_be_computed(changes, fragments):
    refused(ObjectiveError, *fragments, **changes)


@pytest.mark.parametrize(
    "clip", [0.0, -0.2, math.inf, math.nan, (0.2, 0.0), (-1.0, 0.2), (0.1, math.inf), (None, 0.2), (0.2,), (0.1, 0.2, 0.3), [0.1, 0.2]]
)  # fmt: skip
def test_a_clip_range_that_clips_nothing_or_everything(clip):
    refused(ObjectiveError, f"policy.clip_range={clip} must be > 0", "(low, high)", policy=policy(clip_range=clip))


@pytest.mark.parametrize("chunk", [0, -1, 2.5, math.nan])
def test_a_chunk_that_is_no_number_of_tokens(chunk):
    refused(ObjectiveError, f"chunk_tokens={chunk} must be a whole number ≥ 1", "leave it out", chunk_tokens=chunk)


# --- implementations --------------------------------------------------------------------------------------------------


def test_an_unknown_implementation_is_refused_with_those_there_are():
    refused(ObjectiveError, "impl='cuda' is not one of auto, reference, chunked, triton", impl="cuda")
    refused(ObjectiveError, "memory='small' is not one of fast, minimal", memory="small")


def test_triton_is_never_replaced_by_something_slower(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        refused(MissingDependencyError, "impl='triton' needs Triton", "pip install triton", impl="triton")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: object())
        refused(ObjectiveError, "runs on CUDA", "on cpu", "use impl='chunked'", "TRITON_INTERPRET=1", impl="triton")


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_a_teachers_weight_that_was_written_to_is_searched_again():
    weight = TARGET.head.weight.clone()
    target = replace(TARGET, head=replace(TARGET.head, weight=weight))
    for _ in range(2):
        linear_divergence(HIDDEN, WEIGHT, target)
    weight[4, 1] = math.nan
    refused(NonFiniteError, "the teacher's weight has nan in row 4", target=target)
    refused(NonFiniteError, "the teacher's weight has nan in row 4", target=target)
    with torch.inference_mode():
        blind = replace(TARGET, head=replace(TARGET.head, weight=spoilt(TARGET.head.weight, 2, math.nan)))
    refused(NonFiniteError, "the teacher's weight has nan in row 2", target=blind)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_named_with_its_row(value):
    def named(what: str, **changes: object) -> None:
        refused(NonFiniteError, f"{what} has {value} in row 3", "would be NaN", "look at the model or batch", **changes)

    named("student_hidden", student_hidden=spoilt(HIDDEN, 3, value))
    named("student_weight", student_weight=spoilt(WEIGHT, 3, value))
    named("token_weights", token_weights=spoilt(torch.ones(6), 3, value))
    named("the teacher's hidden states", target=replace(TARGET, hidden=spoilt(TARGET.hidden, 3, value)))
    named("the teacher's weight", target=teacher(weight=spoilt(TARGET.head.weight, 3, value)))
    named("the teacher's weight", target=replace(MIXTURE, targets=(TARGET, teacher(weight=spoilt(TARGET.head.weight, 3, value)))))  # fmt: skip
    named("policy.advantages", policy=policy(advantages=spoilt(ADVANTAGES, 3, value)))
    named("policy.importance_weights", policy=policy(importance_weights=spoilt(ADVANTAGES, 3, value)))
    if value == -math.inf:  # which a bias, a logit and a log-prob may be
        return
    named("bias", bias=spoilt(BIAS, 3, value))
    named("sampler_logp", sampler_logp=spoilt(torch.zeros(6), 3, value))
    named("policy.old_log_prob", policy=policy(old_log_prob=spoilt(torch.zeros(6), 3, value)))
    named("the teacher's bias", target=teacher(bias=spoilt(BIAS, 3, value)))
    named("the teacher's logits", target=DenseTarget(logits=spoilt(DENSE.logits, 3, value)))
    named("the teacher's log-probs", target=replace(TOP_K, teacher_logp=spoilt(TOP_K.teacher_logp, 3, value)))
    named("the teacher's log-probs", target=SampledTarget(teacher_logp=spoilt(SAMPLED.teacher_logp, 3, value)))


def test_numbers_whose_sum_overflows_are_numbers():
    """The quick look adds everything up; what it finds suspicious is looked at again."""
    hidden = torch.zeros(6, 4)
    hidden[:, 0] = 3e38
    weight = WEIGHT.clone()
    weight[:, 0] = 0.0
    out = linear_divergence(hidden, weight, DENSE)
    assert out.loss.isfinite()


def test_logits_of_mixed_teachers_that_rule_out_every_token():
    never = torch.full((6, 11), -math.inf)
    one, other = never.clone(), never.clone()
    one[:, 0], other[:, 1] = 0.0, 0.0
    target = TeacherMixture(
        targets=(DenseTarget(logits=one), DenseTarget(logits=other)), weights=torch.tensor([0.5, 0.5]), mixture="logit"
    )
    for impl in ("reference", "chunked"):
        with pytest.raises(ObjectiveError, match=r"no tokens left at some position.*use mixture='probability'"):
            linear_divergence(HIDDEN, WEIGHT, target, impl=impl)


def test_what_is_refused_without_a_bias_or_a_policy_is_refused_with_them():
    target = HiddenTarget(hidden=TARGET.hidden, head=Head(weight=TARGET.head.weight[:, :3]))
    refused(ObjectiveError, "7 features and its weight 3", target=target, bias=None, policy=policy())
