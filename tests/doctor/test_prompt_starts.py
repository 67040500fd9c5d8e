"""The beginning of text stands once before a prompt that is text, whoever writes it, and is missed where nobody does."""

from __future__ import annotations

import pytest

from opd.data.rendering import Renderer
from opd.doctor.prompt_starts import check_starts
from opd.testing import byte_tokenizer
from opd.types import Prompt

TEMPLATE = "<bos>{{ messages[0].content }}"


@pytest.mark.parametrize("text", ["<bos>2 + 2", "2 + 2"])
def test_a_tokenizer_that_writes_the_beginning_writes_it_once(text: str):
    reader = Renderer(byte_tokenizer(bos=True), name="student")
    prompt = Prompt(index=0, text=text)
    ids = reader.prompt_ids(prompt)
    assert ids.count(reader.tokenizer.bos_token_id) == 1 and ids[0] == reader.tokenizer.bos_token_id  # pyright: ignore[reportArgumentType]
    assert not check_starts([prompt], {"student": reader}, system=None)


@pytest.mark.parametrize(("text", "missed"), [("<bos>2 + 2", False), ("2 + 2", True)])
def test_a_beginning_that_only_the_chat_template_writes_is_missed_in_texts(text: str, missed: bool):
    tokenizer = byte_tokenizer(bos=True, chat_template=TEMPLATE)
    tokenizer.backend_tokenizer.post_processor = None
    said = check_starts([Prompt(index=0, text=text)], {"student": Renderer(tokenizer, name="student")}, system=None)
    assert ["without '<bos>'" in one for one in said] == ([True] if missed else [])
