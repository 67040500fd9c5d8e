"""Several teachers, the student's own base, and the sanity check: in one process, against plain transformers and plain losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM
from verl.utils import tensordict_utils as tu
from verl_engines import batch, engine, same, step

from opd.errors import ConfigError, ModelError
from opd.integrations.verl.plugin.metrics import POSITIONS, MetricSums
from opd.integrations.verl.plugin.sanity_check import check_teacher
from opd.losses import full_divergence
from opd.testing import tiny_causal_lm
from opd.types import Head, HiddenTarget, TopKTarget

TOKENS = 258
PROBABILITY = (0.3, 0.7)


def two(models: Path, weights: tuple[float, float] | None = PROBABILITY) -> dict:
    """`one` and `other`, of different sizes of output layer."""
    names = {"one": "teacher", "other": "wide"}
    teachers = {name: {"model": str(models / folder)} for name, folder in names.items()}
    weights = {} if weights is None else {"mixture_weights": dict(zip(names, weights, strict=True))}
    return {"teacher": None, "teachers": teachers, **weights}


def plainly(models: Path, data, mixture: str, routes: tuple[str, ...] = ()) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean reverse KL over the response tokens, from whole logits."""
    learner, one, other = (
        AutoModelForCausalLM.from_pretrained(models / name, attn_implementation="eager", dtype=torch.float32)
        for name in ("student", "teacher", "wide")
    )
    losses = []
    for i, (prompt, response) in enumerate(zip(data["prompts"].unbind(), data["responses"].unbind(), strict=True)):
        ids = torch.cat([prompt, response]).unsqueeze(0)
        at = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        p, q1, q2 = (m(input_ids=ids).logits[0, at, :TOKENS].log_softmax(-1) for m in (learner, one, other))
        q1, q2 = q1.detach(), q2.detach()
        w1, w2 = PROBABILITY
        if mixture == "loss":
            losses.append(w1 * full_divergence("reverse_kl", p, q1) + w2 * full_divergence("reverse_kl", p, q2))
            continue
        if mixture == "routing":
            q = q1 if routes[i] == "one" else q2
        elif mixture == "probability":
            q = (w1 * q1.exp() + w2 * q2.exp()).log()
        else:
            q = (w1 * q1 + w2 * q2).log_softmax(-1)
        losses.append(full_divergence("reverse_kl", p, q))
    loss = torch.cat(losses).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mixture", ["probability", "logit", "loss"])
def test_mixtures_are_those_of_plain_transformers(models: Path, mixture: str):
    loss, gradients, metrics = step(engine(models, **two(models), mixture_kind=mixture), batch())
    expected, plain_gradients = plainly(models, batch(), mixture)
    assert loss == pytest.approx(expected, rel=1e-6)
    same(gradients, plain_gradients)
    assert metrics["actor/opd/reverse_kl"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [4, 1])
def test_routing_gives_each_sample_its_teacher(models: Path, size: int):
    routes = ("one", "other", "other", "one")
    data = batch(micro_batch_size=size)
    tu.assign_non_tensor_stack(data, "domain", list(routes))
    built = engine(models, **two(models, None), mixture_kind="routing", teacher_column="domain")
    loss, gradients, metrics = step(built, data)
    expected, plain_gradients = plainly(models, batch(), "routing", routes)
    assert loss == pytest.approx(expected, rel=1e-6)
    same(gradients, plain_gradients)
    lengths = data["responses"].offsets().diff()
    shares = torch.tensor([float(lengths[[i for i, r in enumerate(routes) if r == n]].sum()) for n in ("one", "other")])
    apart = torch.tensor([metrics[f"actor/opd/{n}/reverse_kl"] for n in ("one", "other")])
    assert float((apart * shares).sum() / shares.sum()) == pytest.approx(expected, rel=1e-5)


def test_routing_by_what_is_not_there_is_refused(models: Path):
    built = engine(models, **two(models, None), mixture_kind="routing", teacher_column="domain")
    with pytest.raises(ConfigError, match=r"opd\.prompts\.teacher_column=domain: the training batch has no such field"):
        step(built, batch())
    data = batch()
    tu.assign_non_tensor_stack(data, "domain", ["one", "one", "else", "one"])
    with pytest.raises(ConfigError, match="a sample says 'else', and the teachers are one, other"):
        step(built, data)


def adapted(models: Path, **teacher):
    """An engine whose adapter does something, the same one each time."""
    torch.manual_seed(0)
    built = engine(models, teacher=teacher, lora_rank=4)
    with torch.no_grad():
        for name, parameter in built.module.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    return built


def test_the_base_of_an_adapted_student_is_its_teacher(models: Path):
    """As if the student's folder had been loaded once more. At the start the adapter does nothing, so the loss is exactly 0."""
    loss, _, _ = step(engine(models, teacher={"source": "adapter_off"}, lora_rank=4), batch())
    assert loss == 0.0
    moved, gradients, _ = step(adapted(models, source="adapter_off"), batch())
    against, same_gradients, _ = step(adapted(models, model=str(models / "student")), batch())
    assert moved > 1e-3
    assert moved == pytest.approx(against, rel=1e-5)
    same(gradients, same_gradients)


def test_without_an_adapter_there_is_no_base(models: Path):
    with pytest.raises(ConfigError, match="the student has no LoRA adapter"):
        engine(models, teacher={"source": "adapter_off"})


def test_metrics_hold_positions_and_perplexity(models: Path):
    _, _, metrics = step(engine(models), batch())
    assert metrics["actor/opd/reverse_kl_at/0-15"] == pytest.approx(metrics["actor/opd/reverse_kl"], rel=1e-6)
    assert "actor/opd/reverse_kl_at/16-63" not in metrics  # the longest response has 8 tokens
    perplexity = torch.tensor(-metrics["actor/opd/teacher_logp"]).exp()
    assert metrics["actor/opd/teacher_perplexity"] == pytest.approx(float(perplexity), rel=1e-5)


def test_buckets_take_every_position_once():
    class Tokens:
        position = torch.tensor([0, 15, 16, 63, 64, 4095, 4096, 9999])

    tally = MetricSums()
    tally.add_diagnostics({"reverse_kl": torch.arange(8.0)}, Tokens())  # pyright: ignore[reportArgumentType]
    assert {name: held for name, held in tally.sums.items() if name != "reverse_kl"} == {
        "reverse_kl_at/0-15": [1.0, 2],
        "reverse_kl_at/16-63": [5.0, 2],
        "reverse_kl_at/64-255": [4.0, 1],
        "reverse_kl_at/1024-4095": [5.0, 1],
        "reverse_kl_at/4096+": [13.0, 2],
    }
    assert POSITIONS[0] == 0


# ---- the sanity check --------------------------------------------------------------------------------------------------------


def sharp(tokens: int = 200, vocab: int = 50, shift: int = 0, scale: float = 8.0):
    """A teacher whose likeliest token is the one that was sampled `shift` places on, and the sampled tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (tokens,), generator=generator)
    hidden = torch.nn.functional.one_hot(ids.roll(-shift), vocab).float() * scale
    hidden += torch.randn(tokens, vocab, generator=generator)
    return HiddenTarget(hidden=hidden, head=Head(weight=torch.eye(vocab))), ids


def as_top_k(target: HiddenTarget, k: int = 8) -> TopKTarget:
    logp, ids = target.hidden.log_softmax(-1).topk(k)
    return TopKTarget(ids=ids, teacher_logp=logp)


def look(target, ids, vocab: int = 50, student_logp: float = -1.0) -> None:
    sequences = torch.arange(len(ids)) // 50
    check_teacher(target, ids, sequences, torch.full((len(ids),), student_logp), vocab=vocab, name="math")


@pytest.mark.parametrize("kind", [lambda t: t, as_top_k], ids=["hidden", "top_k"])
def test_a_teacher_of_another_position_is_found(kind):
    target, ids = sharp()
    look(kind(target), ids)
    for shift, said in ((1, "next"), (-1, "previous")):
        target, ids = sharp(shift=shift)
        with pytest.raises(ModelError, match=rf"the teacher 'math' seems shifted by one.*fit the {said} token"):
            look(kind(target), ids)


@pytest.mark.parametrize("kind", [lambda t: t, as_top_k], ids=["hidden", "top_k"])
def test_a_teacher_that_knows_nothing_is_found(kind):
    target, ids = sharp(scale=0.0)
    flat = HiddenTarget(hidden=target.hidden * 0.0, head=target.head)
    with pytest.raises(ModelError, match="the same probability"):
        look(kind(flat), ids)
    look(kind(target), ids)  # merely a bad one


def test_a_teacher_that_disagrees_is_no_shifted_one():
    """Unrelated to what was sampled, at any position: that is what distillation is for."""
    target, _ = sharp()
    for seed in range(20):
        ids = torch.randint(50, (200,), generator=torch.Generator().manual_seed(seed + 1))
        look(target, ids)
        look(target, torch.full((200,), seed))


def random_model(kind: str, seed: int, spread: float):
    """Weights of no training; in Gemma 2 and the tied Qwen3 the output layer is the embedding."""
    if kind != "gemma2":
        architecture, tie = kind.split("-")[0], kind.endswith("tied")
        return tiny_causal_lm(50, architecture=architecture, seed=seed, tie=tie, initializer_range=spread)
    config = Gemma2Config(
        vocab_size=50, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, initializer_range=spread, final_logit_softcapping=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    return Gemma2ForCausalLM(config).eval()


@torch.no_grad()
def drawn(model, sequences: int = 16, tokens: int = 20) -> torch.Tensor:
    """Sampled at temperature 1, after eight random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(50, (sequences, 8), generator=generator)
    for _ in range(tokens):
        p = model(input_ids=ids).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], dim=1)
    return ids


@torch.no_grad()
def states(model, ids: torch.Tensor, shift: int = 0) -> HiddenTarget:
    """In the rows that predict the drawn tokens, or as a server gives them that is `shift` places off."""
    hidden = model.base_model(input_ids=ids).last_hidden_state[:, 7:-1]
    head = model.get_output_embeddings()
    return HiddenTarget(hidden=hidden.roll(shift, 1).flatten(0, 1), head=Head(weight=head.weight.detach()))


def likeliest(target: HiddenTarget, k: int = 16) -> TopKTarget:
    logp, ids = target.hidden.matmul(target.head.weight.T).log_softmax(-1).topk(k)
    return TopKTarget(ids=ids, teacher_logp=logp)


def look_with(student, teacher, shift: int = 0, kind=lambda target: target) -> None:
    ids = drawn(student)
    rows = ids[:, 8:]
    said = states(student, ids)
    logp = said.hidden.matmul(said.head.weight.T).log_softmax(-1).gather(-1, rows.reshape(-1, 1)).squeeze(-1)
    sequence = torch.arange(len(rows)).repeat_interleave(rows.shape[1])
    check_teacher(
        kind(states(teacher, ids, shift)), rows.flatten(), sequence, logp, vocab=50, name="math", student=said
    )


@pytest.mark.parametrize("teacher", ["gemma2", "qwen3-tied", "llama-tied"])
@pytest.mark.parametrize("student", ["llama", "gemma2", "qwen3-tied"])
@pytest.mark.parametrize("spreads", [(0.2, 0.2), (0.02, 0.2), (0.2, 0.1)], ids=str)
def test_a_random_model_that_repeats_what_it_reads_is_no_shifted_one(student: str, teacher: str, spreads: tuple):
    """Tied embeddings make the token that was read last the likeliest: that fits the previous token, and nothing is shifted."""
    look_with(random_model(student, 1, spreads[0]), random_model(teacher, 2, spreads[1]))


@pytest.mark.parametrize("kind", [lambda t: t, likeliest], ids=["hidden", "top_k"])
@pytest.mark.parametrize(("shift", "said"), [(1, "previous"), (-1, "next")])
def test_a_teacher_of_another_position_is_found_beside_a_random_student(shift: int, said: str, kind):
    student = random_model("llama", 1, 0.2)
    teacher = random_model("llama", 1, 0.2)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    look_with(student, teacher, kind=kind)
    with pytest.raises(ModelError, match=rf"the teacher 'math' seems shifted by one.*fit the {said} token"):
        look_with(student, teacher, shift, kind)


def test_nan_scores_are_found_and_few_tokens_prove_nothing():
    target, ids = sharp()
    target.hidden[3] = torch.nan
    with pytest.raises(ModelError, match="NaN at 1 of 200"):
        look(target, ids)
    target, ids = sharp(20, shift=1)
    look(target, ids)


def test_the_first_update_and_every_nth_are_looked_at(models: Path):
    built = engine(models, teacher={"model": str(models / "teacher")}, sanity_check_every=2)
    flat = built.teachers.members[0].module
    step(built, batch())
    with torch.no_grad():
        for parameter in flat.parameters():
            parameter.zero_()
    step(built, batch())
    with pytest.raises(ModelError, match=r"knows nothing\. No update was made"):
        step(built, batch())
    blind = engine(models, teacher={"model": str(models / "teacher")}, sanity_check_every=0)
    with torch.no_grad():
        for parameter in blind.teachers.members[0].module.parameters():
            parameter.zero_()
    step(blind, batch())
