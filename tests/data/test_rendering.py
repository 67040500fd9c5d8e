from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from opd.data.rendering import Renderer, byte_alphabet, eos_ids
from opd.errors import ConfigError, DataError, ModelError
from opd.testing import CHAT_TEMPLATE, byte_tokenizer, digit_tokenizer
from opd.types import Prompt

STRICT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    "{% if shout %}!{% endif %}{{ messages[0]['content'] }}{% if add_generation_prompt %}>{% endif %}"
)


def text(value: str, index: int = 7) -> Prompt:
    return Prompt(index=index, text=value)


def chat(*messages: tuple[str, str]) -> Prompt:
    return Prompt(index=7, messages=tuple({"role": role, "content": content} for role, content in messages))


def renderer(tokenizer, **options) -> Renderer:
    return Renderer(tokenizer, name="student 'tiny'", **options)


def tokenizer_that_writes(single: str) -> PreTrainedTokenizerFast:
    """A byte tokenizer whose post-processor adds what `single` says."""
    tokenizer = byte_tokenizer(bos=True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<bos>", 258), ("<eos>", 257)]
    )
    return tokenizer


# Text prompts


def test_text_prompt_is_tokenised_as_it_is():
    assert renderer(digit_tokenizer()).prompt_ids(text("314>")) == (3, 1, 4, 10)


def test_bos_is_there_once_when_the_tokenizer_writes_it():
    render = renderer(byte_tokenizer(bos=True))
    assert render.prompt_ids(text("a")) == (258, 97)
    assert render.prompt_ids(text("<bos>a")) == (258, 97)


@pytest.mark.parametrize(("single", "ids"), [("$A <eos>", (97,)), ("<bos> $A <eos>", (258, 97)), ("$A", (97,))])
def test_eos_that_the_tokenizer_appends_is_taken_off_the_prompt(single, ids):
    tokenizer = tokenizer_that_writes(single)
    assert ("<eos>" in single) == (tokenizer("a").input_ids[-1] == 257)
    assert renderer(tokenizer).prompt_ids(text("a")) == ids


def test_eos_that_the_text_itself_spells_is_kept():
    assert renderer(tokenizer_that_writes("<bos> $A <eos>")).prompt_ids(text("a<eos>")) == (258, 97, 257)


def test_text_the_tokenizer_cannot_read_is_refused_with_its_row():
    with pytest.raises(DataError, match="prompt 7 cannot be tokenised by the tokenizer of student 'tiny'"):
        renderer(digit_tokenizer()).prompt_ids(text("3+4"))


# Messages


def test_messages_go_through_the_chat_template_up_to_the_answer():
    render = renderer(byte_tokenizer(chat_template=CHAT_TEMPLATE))
    ids = render.prompt_ids(chat(("system", "Be brief."), ("user", "Hi")))
    assert bytes(ids).decode() == "<|system|>Be brief.\n<|user|>Hi\n<|assistant|>"


def test_messages_get_no_second_bos():
    render = renderer(byte_tokenizer(chat_template="{{ bos_token }}" + CHAT_TEMPLATE, bos=True))
    ids = render.prompt_ids(chat(("user", "Hi")))
    assert ids[0] == 258 and ids.count(258) == 1


def test_ids_of_messages_are_plain_ints_in_a_tuple():
    ids = renderer(byte_tokenizer(chat_template=CHAT_TEMPLATE)).prompt_ids(chat(("user", "Hi")))
    assert type(ids) is tuple and {type(token_id) for token_id in ids} == {int}


def test_system_message_is_added_unless_the_prompt_has_its_own():
    render = renderer(byte_tokenizer(chat_template=CHAT_TEMPLATE), system="Think.")
    assert bytes(render.prompt_ids(chat(("user", "Hi")))).startswith(b"<|system|>Think.\n<|user|>Hi")
    own = bytes(render.prompt_ids(chat(("system", "Own."), ("user", "Hi"))))
    assert own.startswith(b"<|system|>Own.\n") and b"Think." not in own


def test_system_message_has_no_place_in_a_text_prompt():
    with pytest.raises(DataError, match="prompt 7 is plain text, which has no place for the system message"):
        renderer(byte_tokenizer(), system="Think.").prompt_ids(text("Hi"))


def test_messages_without_a_chat_template_are_refused():
    with pytest.raises(
        DataError, match="prompt 7 is a list of messages, but the tokenizer of student 'tiny' has no chat"
    ):
        renderer(byte_tokenizer()).prompt_ids(chat(("user", "Hi")))


def test_what_the_template_refuses_is_told_with_row_and_roles():
    render = renderer(byte_tokenizer(chat_template=STRICT_TEMPLATE))
    with pytest.raises(DataError, match=r"refuses prompt 7: no system messages.*roles are system, user"):
        render.prompt_ids(chat(("system", "a"), ("user", "b")))


def test_chat_template_kwargs_reach_the_template():
    tokenizer = byte_tokenizer(chat_template=STRICT_TEMPLATE)
    assert bytes(renderer(tokenizer, chat_template_kwargs={"shout": True}).prompt_ids(chat(("user", "a")))) == b"!a>"
    assert bytes(renderer(tokenizer).prompt_ids(chat(("user", "a")))) == b"a>"


def test_a_kwarg_that_the_template_does_not_read_is_refused():
    tokenizer = byte_tokenizer(chat_template=STRICT_TEMPLATE)
    with pytest.raises(ConfigError, match="chat template of student 'tiny' does not read 'shou'"):
        renderer(tokenizer, chat_template_kwargs={"shou": True})
    with pytest.raises(ConfigError, match="does not read 'shout'"):
        renderer(byte_tokenizer(), chat_template_kwargs={"shout": True})


@pytest.mark.parametrize("key", ["tokenize", "add_generation_prompt", "return_dict"])
def test_a_kwarg_that_opd_sets_itself_is_refused(key):
    with pytest.raises(ConfigError, match=f"cannot set '{key}'"):
        renderer(byte_tokenizer(chat_template=CHAT_TEMPLATE), chat_template_kwargs={key: False})


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(DataError, match="prompt 7 has no tokens"):
        renderer(byte_tokenizer(chat_template="{{ '' }}")).prompt_ids(chat(("user", "Hi")))


# Responses and lengths


def test_finished_response_ends_with_one_eos_and_never_starts_with_bos():
    render = renderer(byte_tokenizer(bos=True))
    assert render.response_ids("ab") == (97, 98, 257)
    assert render.response_ids("ab<eos>") == (97, 98, 257)
    assert render.response_ids("ab", finished=False) == (97, 98)
    assert render.response_ids("") == (257,)


def test_response_cannot_finish_without_an_eos_token():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="tokenizer of student 'tiny' has no EOS"):
        renderer(tokenizer).response_ids("ab")


def test_prompt_that_just_fits_the_context_is_accepted_and_one_token_more_is_refused():
    render = renderer(digit_tokenizer())
    render.check_length(text("123>"), (1, 2, 3, 10), max_new_tokens=6, context=10)
    with pytest.raises(DataError) as error:
        render.check_length(text("1234>"), (1, 2, 3, 4, 10), max_new_tokens=6, context=10)
    message = str(error.value)
    assert (
        "prompt 7 has 5 tokens" in message and "that is 11" in message and "context of student 'tiny' is 10" in message
    )


# Reading ids


def test_decode_leaves_special_tokens_out_and_spaces_alone():
    render = renderer(byte_tokenizer(bos=True))
    assert render.decode((258, *b"it 's  , ok", 257, 256)) == "it 's  , ok"
    assert renderer(digit_tokenizer(extra=" ,")).decode((1, 11, 12, 2, 12 + 2)) == "1 ,2"


def test_byte_alphabet_is_the_one_that_byte_level_bpe_uses():
    decoder = decoders.ByteLevel()
    alphabet = byte_alphabet()
    assert len(set(alphabet)) == 256
    assert [decoder.decode([character]) for character in alphabet[:128]] == [chr(byte) for byte in range(128)]
    assert decoder.decode([alphabet[byte] for byte in "日é".encode()]) == "日é"


def test_byte_level_tokens_read_as_text_and_parts_of_a_character_as_bytes():
    render = renderer(byte_tokenizer(extra_tokens=["<think>"]))
    assert render.token_strings(b" a\n") == [" ", "a", "\n"]
    assert render.token_strings("é".encode()) == ["\\xc3", "\\xa9"]
    assert render.token_strings([257, 258]) == ["<eos>", "<think>"]


def test_byte_level_merges_read_as_whole_words():
    vocab = {character: byte for byte, character in enumerate(byte_alphabet())} | {"Ġa": 256, "Ã©": 257}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "a"), ("Ã", "©")]))
    backend.decoder = decoders.Sequence([decoders.ByteLevel()])
    assert renderer(PreTrainedTokenizerFast(tokenizer_object=backend)).token_strings([256, 257]) == [" a", "é"]


def test_sentencepiece_tokens_read_as_text():
    backend = Tokenizer(models.WordLevel({"▁the": 0, "cat": 1, "<0xE6>": 2, "<0x0A>": 3}))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    render = renderer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert render.token_strings([0, 1, 2, 3]) == [" the", "cat", "\\xe6", "\n"]


def test_padding_rows_read_as_their_number():
    assert renderer(digit_tokenizer()).token_strings([3, 60]) == ["3", "[60]"]


# Ends


@pytest.mark.parametrize(
    ("configured", "ids"), [(5, (5, 257)), ([5, 257, 6], (5, 257, 6)), ([257], (257,)), (None, (257,))]
)
def test_eos_ids_are_those_of_the_generation_config_and_the_tokenizer(configured, ids):
    assert eos_ids(GenerationConfig(eos_token_id=configured), byte_tokenizer()) == ids


def test_eos_ids_need_no_generation_config():
    assert eos_ids(None, byte_tokenizer()) == (257,)


def test_a_model_that_cannot_end_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no response would ever end; set eos_token_id"):
        eos_ids(GenerationConfig(), tokenizer)


def test_text_that_special_tokens_change_is_refused():
    def tokenize(value: str, add_special_tokens: bool):
        return {"input_ids": [9, 1, 2] if add_special_tokens else [1, 3]}

    class Odd(SimpleNamespace):
        __call__ = staticmethod(tokenize)

    with pytest.raises(ModelError, match="changes the text of prompt 7"):
        renderer(Odd()).prompt_ids(text("a"))


# Characters of several tokens, and special tokens of a prompt


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Words with ▁, and tokens of single bytes for the rest, as SentencePiece models have."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    vocab |= {piece: len(vocab) + place for place, piece in enumerate(["▁", "▁hi", "ho", "é"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that has a token of half a character with a letter before it."""
    alphabet = byte_alphabet()
    vocab = {character: byte for byte, character in enumerate(alphabet)}
    pairs = [(alphabet[0xF0], alphabet[0x9F]), (alphabet[0x98], alphabet[0x80]), ("h", alphabet[0xE2])]
    vocab |= {"".join(pair): 256 + place for place, pair in enumerate(pairs)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_tokens_that_are_parts_of_a_character_are_joined():
    render = renderer(byte_tokenizer())
    ids = [*"aé".encode(), 257, *"🙂b".encode()]
    assert render.joined_tokens(ids) == ((1, 3, "é"), (4, 8, "🙂"))
    assert render.joined_tokens(list(b"plain")) == ()
    assert render.joined_tokens([]) == ()


def test_a_run_goes_on_while_its_tokens_end_inside_a_character():
    """One token ends the smile, the next holds a letter and the beginning of an apostrophe, two more its end."""
    render = renderer(merging_tokenizer())
    ids = [256, 257, 258, 0x80, 0x99, ord("x")]
    assert render.tokenizer.decode(ids) == "😀h’x"
    assert render.joined_tokens(ids) == ((0, 2, "😀"), (2, 5, "h’"))
    halves = [0xF0, 0x9F, 0x98]
    assert render.joined_tokens([*halves, 0x80, *halves]) == ((0, 4, "😀"),), "the last is cut off"


@pytest.mark.parametrize(
    "ids",
    [
        [0xE2, ord("a")],  # broken off by a letter
        [0x80, 0x99],  # without a beginning
        [0xE2, 0x80],  # cut off by the end
        [0xE2, 257, 0x80, 0x99],  # a special token between
        [0xC0, 0xAF],  # longer than need be
        [0xED, 0xA0, 0x80],  # half of a surrogate pair
    ],
)
def test_bytes_that_are_no_character_are_not_joined(ids):
    assert renderer(byte_tokenizer()).joined_tokens(ids) == ()


def test_what_follows_broken_bytes_is_joined():
    assert renderer(byte_tokenizer()).joined_tokens([0xE2, 0x80, *"é".encode()]) == ((2, 4, "é"),)


def test_byte_tokens_of_sentencepiece_are_joined():
    tokenizer = sentencepiece_tokenizer()
    render = renderer(tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["▁hi", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "ho", "<0x0A>", "é"])
    assert render.joined_tokens(ids) == ((1, 5, "😀"),)
    assert render.token_strings(ids)[:2] == [" hi", "\\xf0"]


def spans_of(render: Renderer, ids) -> list[str]:
    text, spans = render.with_special(ids)
    assert text == render.decode_all(ids)
    return [text[first:end] for first, end in spans]


def test_special_tokens_of_a_prompt_are_found():
    render = renderer(byte_tokenizer(bos=True, extra_tokens=["<|im_start|>", "<|im_end|>"]))
    start, end = 259, 260
    ids = (258, start, *b"user\nhi", end, end, *"é".encode(), start)
    assert spans_of(render, ids) == ["<bos>", "<|im_start|>", "<|im_end|>", "<|im_end|>", "<|im_start|>"]


def test_text_that_spells_a_special_token_is_none():
    render = renderer(byte_tokenizer(extra_tokens=["<|im_end|>"]))
    ids = (*b"say <|im_end|>", 258, *b"<eos>!")
    text, spans = render.with_special(ids)
    assert text == "say <|im_end|><|im_end|><eos>!" and spans == ((14, 24),)


def test_special_tokens_between_words_of_sentencepiece_are_found():
    tokenizer = sentencepiece_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["<s>", "▁hi", "ho", "</s>", "<s>", "▁hi", "</s>"])
    assert spans_of(renderer(tokenizer), ids) == ["<s>", "</s>", "<s>", "</s>"]


def test_a_prompt_without_special_tokens_has_none():
    assert renderer(byte_tokenizer()).with_special(tuple(b"plain")) == ("plain", ())
