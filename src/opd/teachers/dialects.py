"""How each kind of server is asked to score given tokens, and where its answer has them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from opd.remote.questions import Answer, BadAnswer, Request
from opd.teachers.row_scores import Position, Row

TOKEN_ID = "token_id:"  # how vLLM writes an id in the place of a token's text
IGNORES = "it leaves out fields that it does not know, as `transformers serve` does, and cannot score"


class Dialect(Protocol):
    """One kind of server. Log-probs are asked for at temperature 1, so that a server that scales them scales by nothing."""

    name: str

    def request(self, model: str, rows: Sequence[Row], k: int, temperature: float = 1.0) -> Request:
        """Asks for the k likeliest tokens at every response token of the rows, and for each token's own log-prob."""
        ...

    def read(self, answer: Answer, rows: Sequence[Row], k: int) -> list[list[Position]]:
        """One list of positions for every row, in order. Raises BadAnswer for an answer that is not about these rows."""
        ...

    def texts(self, answer: Answer) -> dict[int, str]:
        """The texts of token ids, where an answer shows them."""
        ...

    def advice(self, k: int) -> str:
        """How the server is started so that it answers."""
        ...


class VllmDialect:
    """/v1/completions with prompt_logprobs."""

    name = "vllm"

    def request(self, model: str, rows: Sequence[Row], k: int, temperature: float = 1.0) -> Request:
        body = _completion(model, rows, temperature) | {
            "max_tokens": 1,
            "prompt_logprobs": k,
            "return_token_ids": True,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        return Request(path="/v1/completions", json=body)

    def read(self, answer: Answer, rows: Sequence[Row], k: int) -> list[list[Position]]:
        found = []
        for row, choice in zip(rows, _choices(answer, len(rows)), strict=True):
            scores = choice.get("prompt_logprobs")
            if not isinstance(scores, list):
                raise BadAnswer(f"an answer without prompt_logprobs: {IGNORES}")
            _same_ids(choice.get("prompt_token_ids"), row.ids)
            _same_length(len(scores), row)
            found.append(
                [
                    _table(entry, token, place, k)
                    for place, (token, entry) in enumerate(
                        zip(row.response_ids, scores[len(row.prompt_ids) :], strict=True)
                    )
                ]
            )
        return found

    def texts(self, answer: Answer) -> dict[int, str]:
        entries = [entry or {} for choice in answer.json()["choices"] for entry in choice["prompt_logprobs"]]
        return {
            int(key): str(value["decoded_token"])
            for e in entries
            for key, value in e.items()
            if value.get("decoded_token")
        }

    def advice(self, k: int) -> str:
        return f"Start vLLM with --max-logprobs {max(20, k)} (20 is its default)."


class OpenAiDialect:
    """/v1/completions that repeats the prompt with its log-probs (echo), the oldest way."""

    name = "openai"

    def request(self, model: str, rows: Sequence[Row], k: int, temperature: float = 1.0) -> Request:
        body = _completion(model, rows, temperature) | {
            "max_tokens": 0,
            "echo": True,
            "logprobs": k,
            "return_tokens_as_token_ids": True,
        }
        return Request(path="/v1/completions", json=body)

    def read(self, answer: Answer, rows: Sequence[Row], k: int) -> list[list[Position]]:
        found = []
        for row, choice in zip(rows, _choices(answer, len(rows)), strict=True):
            scores = choice.get("logprobs")
            if not isinstance(scores, Mapping) or not isinstance(scores.get("token_logprobs"), list):
                raise BadAnswer(f"an answer without logprobs: {IGNORES}")
            values, tokens = scores["token_logprobs"], scores.get("tokens") or []
            tables = scores.get("top_logprobs") or [None] * len(values)
            _same_length(len(values), row)
            _same_length(len(tables), row)
            ids = [_token_id(token) for token in tokens]
            if None not in ids:
                _same_ids(ids, row.ids)
            elif k:
                raise BadAnswer(
                    "the texts of tokens instead of their ids, and several ids can have one text; start vLLM with "
                    "--return-tokens-as-token-ids, or use api=vllm"
                )
            start = len(row.prompt_ids)
            found.append(
                [
                    _echoed(token, values[start + place], tables[start + place] if k else {}, place)
                    for place, token in enumerate(row.response_ids)
                ]
            )
        return found

    def texts(self, answer: Answer) -> dict[int, str]:
        return {}

    def advice(self, k: int) -> str:
        return f"The server has to allow echo with logprobs={k}; vLLM does with --max-logprobs {max(20, k)}."


class SglangDialect:
    """/generate with return_logprob. Entries begin at logprob_start_len, the first of them empty."""

    name = "sglang"

    def request(self, model: str, rows: Sequence[Row], k: int, temperature: float = 1.0) -> Request:
        body = {
            "input_ids": [row.ids for row in rows],
            "sampling_params": {"max_new_tokens": 0, "temperature": temperature, "top_p": 1.0, "top_k": -1},
            "return_logprob": True,
            "logprob_start_len": [len(row.prompt_ids) - 1 for row in rows],
            "top_logprobs_num": k,
            "return_text_in_logprobs": temperature == 1.0 and len(rows) <= 4,
        }
        return Request(path="/generate", json=body)

    def read(self, answer: Answer, rows: Sequence[Row], k: int) -> list[list[Position]]:
        said = answer.json()
        if not isinstance(said, list) or len(said) != len(rows):
            raise BadAnswer(f"{len(said) if isinstance(said, list) else 'no list of'} answers to {len(rows)} rows")
        found = []
        for row, one in zip(rows, said, strict=True):
            meta = one.get("meta_info") if isinstance(one, Mapping) else None
            given = meta.get("input_token_logprobs") if isinstance(meta, Mapping) else None
            if not isinstance(meta, Mapping) or not isinstance(given, list):
                raise BadAnswer(f"an answer without meta_info.input_token_logprobs: {IGNORES}")
            tables = meta.get("input_top_logprobs") or [None] * len(given)
            _same_length(meta.get("prompt_tokens", len(row.ids)), row)
            for entries in (given, tables):
                if len(entries) != len(row.response_ids) + 1:
                    raise BadAnswer(f"{len(entries) - 1} positions for {len(row.response_ids)} response tokens")
            found.append(
                [
                    self._position(token, given[1 + place], tables[1 + place] if k else (), place)
                    for place, token in enumerate(row.response_ids)
                ]
            )
        return found

    @staticmethod
    def _position(token: int, given: Any, table: Any, place: int) -> Position:
        try:
            logp, echoed = given[0], given[1]
            likeliest = {int(entry[1]): float(entry[0]) for entry in table}
            own = float(logp)
        except (TypeError, ValueError, IndexError, KeyError):
            raise BadAnswer(f"nothing that can be read at response token {place}") from None
        if echoed not in (token, 0):  # SGLang shows the last id of a vocabulary as 0
            raise BadAnswer(f"the token {echoed} at response token {place}, where {token} was sent")
        return Position(token=token, token_logp=own, likeliest=likeliest)

    def texts(self, answer: Answer) -> dict[int, str]:
        tables = [table or [] for one in answer.json() for table in one["meta_info"].get("input_top_logprobs") or []]
        return {int(entry[1]): str(entry[2]) for table in tables for entry in table if len(entry) > 2 and entry[2]}

    def advice(self, k: int) -> str:
        return f"The server has to allow top_logprobs_num={k}."


DIALECTS: dict[str, type[Dialect]] = {"vllm": VllmDialect, "openai": OpenAiDialect, "sglang": SglangDialect}


def _completion(model: str, rows: Sequence[Row], temperature: float) -> dict[str, Any]:
    return {"model": model, "prompt": [row.ids for row in rows], "temperature": temperature, "top_p": 1.0, "n": 1}


def _choices(answer: Answer, count: int) -> list[Mapping[str, Any]]:
    """The choices in the order of the rows, by their index: one each."""
    said = answer.json()
    choices = said.get("choices") if isinstance(said, Mapping) else None
    if not isinstance(choices, list) or not all(isinstance(choice, Mapping) for choice in choices):
        raise BadAnswer("an answer without choices")
    by_index = {choice.get("index"): choice for choice in choices}
    if len(choices) != count or sorted(by_index, key=str) != sorted(range(count), key=str):
        raise BadAnswer(f"answers {[choice.get('index') for choice in choices]} to {count} rows")
    return [by_index[index] for index in range(count)]


def _same_ids(said: Any, sent: list[int]) -> None:
    if said is not None and said != sent:
        raise BadAnswer("other prompt ids than were sent: it adds or changes tokens, or it answers another request")


def _same_length(said: int, row: Row) -> None:
    if said != len(row.ids):
        raise BadAnswer(f"{said} positions for {len(row.ids)} tokens")


def _table(entry: Any, token: int, place: int, k: int) -> Position:
    """vLLM's {"id": {"logprob": …, "rank": …}}, which holds the token itself, whatever its rank."""
    try:
        likeliest = {int(key): float(value["logprob"]) for key, value in entry.items()}
        rank = int(entry[str(token)]["rank"]) if token in likeliest else 0
    except (AttributeError, TypeError, ValueError, KeyError):
        raise BadAnswer(f"nothing that can be read at response token {place}") from None
    if token not in likeliest:
        raise BadAnswer(
            f"no log-prob of token {token} at response token {place}: the positions are shifted, or of another text"
        )
    own = likeliest[token]
    if rank > k and own < min((value for other, value in likeliest.items() if other != token), default=math.inf):
        del likeliest[token]
    return Position(token=token, token_logp=own, likeliest=likeliest)


def _echoed(token: int, value: Any, table: Any, place: int) -> Position:
    try:
        likeliest = {_token_id(key): float(logp) for key, logp in table.items()}
        own = float(value)
    except (AttributeError, TypeError, ValueError):
        raise BadAnswer(f"nothing that can be read at response token {place}") from None
    return Position(token=token, token_logp=own, likeliest={i: v for i, v in likeliest.items() if i is not None})


def _token_id(text: Any) -> int | None:
    """The id in "token_id:N"; None for a token's text."""
    number = str(text).removeprefix(TOKEN_ID)
    return int(number) if str(text).startswith(TOKEN_ID) and number.isdecimal() else None
