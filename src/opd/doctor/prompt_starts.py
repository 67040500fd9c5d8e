"""Checks of how prompts begin: the beginning-of-text token, today's date, and system messages that templates write of their own accord.
Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from opd.data.rendering import Renderer
from opd.errors import DataError
from opd.types import Prompt

TODAY = re.compile(r"strftime_now\(\s*(['\"])(.+?)\1\s*\)")
SPECIAL = re.compile(r"<[^<>\s]+>")
WORDS_OF_A_HEAD = 3  # such as "system" and "user": what the format of a turn has without any message
SHOWN = 100  # characters of a system message
ITS_OWN = ("system", "developer")


def check_starts(prompts: Sequence[Prompt], readers: Mapping[str, Renderer], *, system: str | None) -> list[str]:
    """Warnings about the first tokens of the prompts; `readers` are by role, the student first. `system` is prompts.system."""
    texts = [prompt for prompt in prompts if prompt.messages is None]
    chats = [prompt for prompt in prompts if prompt.messages is not None]
    found = _without(texts, readers)
    if chats:
        found += _dates(chats[0], readers)
    if system is None:
        own = next((chat for chat in chats if _role(chat) not in ITS_OWN), None)
        found += [] if own is None else _system_messages(own, readers)
    return found


def _role(prompt: Prompt) -> str:
    return str((prompt.messages or ({},))[0].get("role"))


# --- the beginning of text ----------------------------------------------------------------------------------------------


def _without(texts: Sequence[Prompt], readers: Mapping[str, Renderer]) -> list[str]:
    """Texts are read without a token that the model was trained to begin with."""
    if not texts:
        return []
    roles: dict[tuple[str, str], list[str]] = {}
    for role, reader in readers.items():
        bos: Any = reader.tokenizer.bos_token_id
        if bos is not None and any(reader.prompt_ids(prompt)[0] != bos for prompt in texts) and _expects(reader, bos):
            roles.setdefault((str(reader.tokenizer.bos_token), _expects(reader, bos)), []).append(role)
    return [
        f"{_named(whose)} read{'s' if len(whose) == 1 else ''} text prompts without {token!r}, although {reason}. Some models answer much "
        f"worse without it; begin each text with {token!r}, which is read as that one token."
        for (token, reason), whose in roles.items()
    ]


def _named(roles: Sequence[str]) -> str:
    return " and ".join(f"the {role}" if "." not in role else role for role in roles)


def _expects(reader: Renderer, bos: int) -> str:
    """The reason to think that a model was trained with a beginning of text; empty where there is none."""
    if reader.tokenizer.init_kwargs.get("add_bos_token"):
        return "tokenizer_config.json asks for it (add_bos_token)"
    if not reader.tokenizer.chat_template:
        return ""
    probe = Prompt(index=0, messages=({"role": "user", "content": "1"},))
    try:
        written = reader.chat.ids(probe, None)[:1] == [bos]
    except DataError:  # a template for conversations of another kind
        return ""
    return "the chat template begins with it" if written else ""


# --- today's date -------------------------------------------------------------------------------------------------------


def _dates(prompt: Prompt, readers: Mapping[str, Renderer]) -> list[str]:
    dates = {role: _date(prompt, reader) for role, reader in readers.items()}
    dated = [role for role, date in dates.items() if date]
    if not dated:
        return []
    settable = [role for role in dated if "date_string" in _template(readers[role])]
    fixed = [role for role in dated if role not in settable]
    advice = []
    if settable:
        advice.append(f"set chat_template_kwargs.date_string={dates[settable[0]]!r} for {_named(settable)}")
    if fixed:
        advice.append(
            f"put a copy of the template with the date written out, as chat_template.jinja, into the folder of {_named(fixed)}"
        )
    return [
        f"the chat template of {_named(dated)} writes today's date ({dates[dated[0]]}) into every prompt, so the run reads other prompts "
        f"tomorrow, also after --resume. To keep them: {'; '.join(advice)}."
    ]


def _date(prompt: Prompt, reader: Renderer) -> str:
    """Today's date as this prompt holds it; empty where it holds none."""
    now = datetime.now()
    dates = [now.strftime(layout) for _, layout in TODAY.findall(_template(reader))]
    text = reader.decode_all(reader.prompt_ids(prompt)) if dates else ""
    return next((date for date in dates if date in text and date not in str(prompt.messages)), "")


def _template(reader: Renderer) -> str:
    return str(reader.chat_template_kwargs.get("chat_template") or reader.tokenizer.chat_template)


# --- system messages ----------------------------------------------------------------------------------------------------


def _system_messages(prompt: Prompt, readers: Mapping[str, Renderer]) -> list[str]:
    heads = {role: _head(prompt, reader) for role, reader in readers.items()}
    mine = heads.pop("student", "")
    for role, theirs in heads.items():
        if mine is None or theirs is None or mine == theirs:
            continue
        return [
            f"the rows have no system message, and the chat templates write {_shown(mine)} for the student and {_shown(theirs)} for the {role} "
            f"(prompt {prompt.index}). Where that is not meant, prompts.system gives both the same message."
        ]
    return []


def _head(prompt: Prompt, reader: Renderer) -> str | None:
    """The words before the first message; empty where they are but the format's, and None where the message cannot be found."""
    content = str((prompt.messages or ({},))[0].get("content") or "").strip()
    text = reader.decode_all(reader.prompt_ids(prompt))
    if not content or content not in text:
        return None
    words = SPECIAL.sub(" ", text[: text.find(content)]).split()
    if len(words) <= WORDS_OF_A_HEAD:
        return ""
    return " ".join(words).removeprefix("system ").removesuffix(f" {_role(prompt)}")


def _shown(words: str) -> str:
    return repr(words if len(words) <= SHOWN else words[:SHOWN] + "…") if words else "none"
