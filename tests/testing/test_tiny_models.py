import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd.testing import CHAT_TEMPLATE, byte_tokenizer, digit_tokenizer, save_model, tiny_causal_lm


def test_digit_tokenizer_gives_digit_d_the_id_d_and_decodes_without_spaces():
    tokenizer = digit_tokenizer()
    ids = tokenizer("31415926>").input_ids
    assert ids == [3, 1, 4, 1, 5, 9, 2, 6, 10]
    assert tokenizer.decode(ids) == "31415926>"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (11, 12, None)


def test_digit_tokenizer_takes_a_separator_and_extra_characters():
    tokenizer = digit_tokenizer(separator="=", extra="+ ")
    assert tokenizer("1 + 2=").input_ids == [1, 12, 11, 12, 2, 10]
    assert tokenizer.decode(tokenizer("1 + 2=").input_ids) == "1 + 2="


def test_digit_tokenizer_refuses_a_character_twice():
    with pytest.raises(ValueError, match="once"):
        digit_tokenizer(extra=">")


def test_byte_tokenizer_gives_every_byte_its_own_value_and_survives_any_text():
    tokenizer = byte_tokenizer()
    text = "héllo 日本\n\t\x00 🙂  end"
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_byte_tokenizer_reads_special_and_extra_tokens_as_one_id():
    tokenizer = byte_tokenizer(extra_tokens=["<think>"])
    assert tokenizer("a<think><eos>").input_ids == [97, 258, 257]
    assert tokenizer.decode([97, 258, 257], skip_special_tokens=True) == "a"


@pytest.mark.parametrize("make", [digit_tokenizer, byte_tokenizer])
def test_bos_is_added_only_when_asked_for(make):
    with_bos, without = make(bos=True), make()
    assert with_bos("12").input_ids == [with_bos.bos_token_id, *without("12").input_ids]
    assert with_bos("12", add_special_tokens=False).input_ids == without("12").input_ids


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("tokenizer", [digit_tokenizer(bos=True), byte_tokenizer(chat_template=CHAT_TEMPLATE)])
def test_saved_model_and_tokenizer_load_back_identical(architecture, tokenizer, tmp_path):
    model = tiny_causal_lm(tokenizer, architecture=architecture)
    folder = save_model(model, tokenizer, tmp_path / "model")
    loaded_tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("314", return_tensors="pt").input_ids
    assert torch.equal(loaded_tokenizer("314", return_tensors="pt").input_ids, ids)
    assert loaded_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert loaded_tokenizer.chat_template == tokenizer.chat_template
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.dtype == torch.float32
    for config in (loaded.config, loaded.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_same_seed_gives_the_same_model_and_leaves_the_global_random_state_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, second, other = (tiny_causal_lm(16, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gpt2"])
def test_vocabulary_may_be_padded_beyond_the_tokenizer_but_not_cut(architecture):
    model = tiny_causal_lm(digit_tokenizer(), architecture=architecture, vocab_size=64)
    assert model(torch.tensor([[3, 1]])).logits.shape[-1] == 64
    with pytest.raises(ValueError, match="smaller than the 13 tokens"):
        tiny_causal_lm(digit_tokenizer(), architecture=architecture, vocab_size=12)


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("tie", [True, False])
def test_tie_decides_whether_head_and_embedding_are_one_tensor(architecture, tie):
    model = tiny_causal_lm(16, architecture=architecture, tie=tie)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) is tie
