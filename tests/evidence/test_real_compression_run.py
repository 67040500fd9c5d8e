"""Fake-quantised weights are those that are rounded in the end, and every arm runs through the Distiller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opd.testing import byte_tokenizer, tiny_causal_lm

pytest.importorskip("torchao")
pytestmark = pytest.mark.timeout(300)

IDS = torch.arange(40)[None]


@pytest.fixture
def model() -> Any:
    from benchmarks.real.compression.quantise import fake_quantise

    made = tiny_causal_lm(byte_tokenizer(), initializer_range=0.2)
    fake_quantise(made)
    return made


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_the_rounded_model_computes_what_the_fake_quantised_one_does_with_16_values_a_row(model):
    from benchmarks.real.compression.quantise import fake_layers, rounded

    made = rounded(model)
    assert torch.equal(logits(made), logits(model))
    assert fake_layers(made) == [] and len(fake_layers(model)) == 14
    for name, layer in fake_layers(model):
        whole = made.get_submodule(name).weight
        assert type(whole) is torch.nn.Parameter
        assert all(2 < len(row.unique()) <= 16 for row in whole), name
        step = layer.weight.abs().amax(1, keepdim=True) / 7.5
        assert ((whole - layer.weight).abs() <= step * 0.51).all(), name


def test_embeddings_and_output_layer_stay_whole(model):
    from benchmarks.real.compression.quantise import rounded

    plain = tiny_causal_lm(byte_tokenizer(), initializer_range=0.2)
    assert torch.equal(rounded(model).get_output_embeddings().weight, plain.get_output_embeddings().weight)
    assert torch.equal(rounded(model).get_input_embeddings().weight, plain.get_input_embeddings().weight)


@pytest.mark.parametrize("fused", [False, True])
def test_sampling_sees_the_weights_of_the_newest_update(model, fused: bool):
    from benchmarks.real.compression.quantise import fake_layers, rounded

    before = logits(model)
    assert torch.equal(logits(model), before)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    model(IDS).logits.log_softmax(-1)[..., 3].sum().backward()
    assert all(layer.weight.grad.norm() > 0 for _, layer in fake_layers(model))
    optimizer.step()
    after = logits(model)
    assert (after - before).abs().max() > 0.1
    assert torch.equal(after, logits(rounded(model)))
    with torch.no_grad():  # weights that are loaded come without a gradient
        for _, layer in fake_layers(model):
            layer.weight.mul_(2)
    assert (logits(model) - after).abs().max() > 0.1
    assert torch.equal(logits(model), logits(rounded(model)))


def test_the_gradient_of_a_rounded_weight_passes_to_the_weight_that_training_moves(model):
    """Straight through: with the rounded weights in its place, an ordinary layer has the same gradient."""
    from benchmarks.real.compression.quantise import fake_layers, rounded

    made, name = rounded(model), fake_layers(model)[0][0]
    found = []
    for one in (model, made):
        one.requires_grad_(True)
        one(IDS).logits.log_softmax(-1)[..., 3].sum().backward()
        found.append(one.get_submodule(name).weight.grad)
    inside = found[0] != 0  # the entry that a row's scale cannot reach is clamped, and has none
    assert inside.float().mean() > 0.9
    torch.testing.assert_close(found[0][inside], found[1][inside], rtol=1e-4, atol=1e-6)


def test_two_steps_of_every_arm_bring_the_rounded_student_closer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from benchmarks.real.compression.command import smoke
    from benchmarks.real.compression.plan import INT4, PROMPTS, TOKENS, mean

    monkeypatch.setenv("OPD_REAL", str(tmp_path / "work"))
    store = smoke(tmp_path)
    rows = {(r["weights"], r["arm"]): r for r in store.rows.values()}
    assert rows["full", "untrained"].series("reverse_kl") == [0.0] * 64
    before = rows[INT4, "untrained"]
    for arm in ("opd", "off_policy"):
        after = rows[INT4, arm]
        assert mean(after, "reverse_kl") < mean(before, "reverse_kl")
        assert 0.8 * 2 * PROMPTS * TOKENS < after.number("teacher_tokens") <= 2 * PROMPTS * TOKENS
        assert len(after.series("training_reverse_kl")) == 2
