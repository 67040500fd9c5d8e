"""The benchmark's decoder as transformers' GPT-2, and its token ids as text: for other trainers on the same task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from benchmarks.convergence.model import Shape, TinyDecoder

CHARACTERS = "0123456789><"
"""Text of token ids 0 to 11, in the order of `opd.testing.digit_tokenizer`. Its <pad> and <eos> have ids that the model has no rows for,
so a response is never shorter."""


def gpt2(decoder: TinyDecoder) -> GPT2LMHeadModel:
    """GPT-2 with the decoder's weights. Its attention biases, which the decoder lacks, are zero and frozen."""
    shape = decoder.shape
    config = GPT2Config(
        vocab_size=shape.vocab,
        n_positions=shape.positions,
        n_embd=shape.hidden,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_inner=2 * shape.hidden,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config)
    model.load_state_dict(as_gpt2(decoder.state_dict(), shape.layers), strict=False)
    for name, parameter in model.named_parameters():
        if name.endswith(("c_attn.bias", "attn.c_proj.bias")):
            parameter.data.zero_()
            parameter.requires_grad_(False)
    return model


def _pairs(layers: int) -> Iterator[tuple[str, str, bool]]:
    """Names of a weight in the decoder and in GPT-2, and True where GPT-2 keeps the transpose; without query, key and value."""
    yield "tokens.weight", "transformer.wte.weight", False
    yield "places.weight", "transformer.wpe.weight", False
    for i in range(layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        yield f"{ours}.out.weight", f"{theirs}.attn.c_proj.weight", True
        for name, other, turned in (
            ("norm1", "ln_1", False),
            ("norm2", "ln_2", False),
            ("up", "mlp.c_fc", True),
            ("down", "mlp.c_proj", True),
        ):
            yield f"{ours}.{name}.weight", f"{theirs}.{other}.weight", turned
            yield f"{ours}.{name}.bias", f"{theirs}.{other}.bias", False
    yield "norm.weight", "transformer.ln_f.weight", False
    yield "norm.bias", "transformer.ln_f.bias", False


_ATTENTION = ("query", "key", "value")


def as_gpt2(named: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The decoder's weights under GPT-2's names and in its shapes."""
    found = {theirs: named[ours].T if turned else named[ours] for ours, theirs, turned in _pairs(layers)}
    for i in range(layers):
        parts = [named[f"layers.{i}.{part}.weight"].T for part in _ATTENTION]
        found[f"transformer.h.{i}.attn.c_attn.weight"] = torch.cat(parts, dim=1)
    return found | {"lm_head.weight": named["tokens.weight"]}


def as_decoder(named: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The inverse of `as_gpt2`."""
    found = {ours: named[theirs].T if turned else named[theirs] for ours, theirs, turned in _pairs(layers)}
    for i in range(layers):
        parts = named[f"transformer.h.{i}.attn.c_attn.weight"].chunk(3, dim=1)
        found |= {f"layers.{i}.{name}.weight": part.T for name, part in zip(_ATTENTION, parts, strict=True)}
    return found


def decoder_of(model: PreTrainedModel, shape: Shape) -> TinyDecoder:
    """The inverse of `gpt2`."""
    decoder = TinyDecoder(shape, 0)
    decoder.load_state_dict(as_decoder(model.state_dict(), shape.layers))
    return decoder


def texts(ids: Tensor) -> list[str]:
    return ["".join(CHARACTERS[i] for i in row) for row in ids.tolist()]
