"""Is the server what it should be? Asked before the run, and again every few steps (the canary)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from opd.errors import ServerError, VocabularyError
from opd.remote.address import CHAT_CANNOT_SCORE, Address
from opd.remote.pool import ServerPool
from opd.remote.questions import Answer, BadAnswer, ChangedAnswer, Question, RefusedError, Request
from opd.teachers.dialects import Dialect
from opd.teachers.row_scores import Row, RowScores, row_scores
from opd.teachers.vocabulary import VocabularyMatch

START_SECONDS = 30.0  # a server that is not there by then was not started, or has another address
TEXT = "On-policy distillation: the student writes 3 + 4 = 7, and its teacher says what it would have written. Caf\u00e9, 東京."
SPREAD = 16  # ids from all over the vocabulary, after the text
TAILS = 3  # rows that differ in their last token alone
DRIFT = 0.1  # mean nats between two answers of one model; bfloat16 and other batches make some hundredths
EARLIER = 0.5  # nats at one token that stands before the only difference
MAX_DIFFERING = 0.1  # share of token texts: some servers write bytes and spaces in their own way


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What a server says of itself."""

    names: tuple[str, ...]
    context: int | None
    """Tokens that it reads at once; None where it does not say."""


def probe_rows(tokenizer: PreTrainedTokenizerBase, vocabulary: VocabularyMatch, context: int | None) -> list[Row]:
    """Rows of a fixed text that differ in their last token alone; `context` is in tokens."""
    plain = plain_ids(tokenizer, vocabulary)
    known = set(plain)
    text = [token for token in _ids(tokenizer, TEXT) if token in known]
    spread = [plain[(2 * place + 1) * len(plain) // (2 * SPREAD)] for place in range(SPREAD)]
    ids = (text + spread)[: (context or 10_000) - TAILS]
    tails = [plain[place * (len(plain) - 1) // TAILS] for place in range(TAILS)]
    return [Row(prompt_ids=tuple(ids[:1]), response_ids=(*ids[1:], tail)) for tail in tails]


class Probe:
    """A fixed text with the log-probs that the servers gave it at the start."""

    def __init__(
        self,
        pool: ServerPool,
        dialect: Dialect,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocabulary: VocabularyMatch,
        k: int,
    ) -> None:
        """`k` is the likeliest tokens that the run will ask for at each position."""
        self.pool = pool
        self.dialect = dialect
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.k = k
        self.model = ""
        self.rows: list[Row] = []
        self.first: RowScores | None = None

    def models(self) -> dict[Address, ServedModel]:
        """What each server serves. Raises ServerError for one that is not there."""
        return self.pool.ask_each(
            Question(request=Request(path="/v1/models", method="GET"), read=_served), deadline=self._patience
        )

    def start(self, model: str, context: int | None) -> list[str]:
        """Ask everything once, and keep the fixed text's log-probs. Returns warnings; raises ServerError or VocabularyError."""
        self.model = model
        self.rows = probe_rows(self.tokenizer, self.vocabulary, context)
        answers = self._scored(1.0)
        for server, (scores, texts) in answers.items():
            self._check_causal(server, scores)
            self._check_texts(server, texts)
            self.first = self.first or scores[0]
            apart = drift(self.first, scores[0])
            if apart > DRIFT:
                other = self.pool.addresses[0]
                raise ServerError(
                    f"{self.pool.section}.url: {server} and {other} give other log-probs to one text (mean {apart:.2f} nats apart), so they "
                    "hold different models. A pool is one model; name others under teachers, with mixture.kind=routing."
                )
        self._detokenized()
        halved = self._scored(0.5)
        scaled = [str(s) for s, (scores, _) in halved.items() if drift(answers[s][0][0], scores[0]) > DRIFT]
        self.pool.admission = self._question(self._same)
        return [
            f"{self.pool.section}.url: {server} changes its log-probs with the temperature that is asked for (processed log-probs). They are "
            "asked for at temperature 1 without top-p and top-k, where they are the model's own."
            for server in scaled
        ]

    def check(self) -> None:
        """The canary: every server that is in use gives the fixed text the log-probs of the start. Raises ServerError for one that
        does not."""
        assert self.pool.admission is not None
        self.pool.ask_each(self.pool.admission, resting=False)

    def now(self) -> dict[Address, torch.Tensor]:
        """Log-probs (nats) [tokens] that every server in use gives the fixed text now; `first.sampled_logp` are those of the start."""
        answers = self.pool.ask_each(self._question(self._read), resting=False)
        return {server: scores[0].sampled_logp for server, scores in answers.items()}

    @property
    def fingerprint(self) -> str:
        """The fixed text's log-probs, for a run that is resumed."""
        assert self.first is not None
        return " ".join(f"{value:.4f}" for value in self.first.sampled_logp.tolist())

    @property
    def _patience(self) -> float:
        return min(START_SECONDS, self.pool.deadline)

    def _same(self, answer: Answer) -> None:
        assert self.first is not None
        apart = drift(self.first, self._read(answer)[0])
        if apart > DRIFT:
            raise ChangedAnswer(
                f"other log-probs to a fixed text than at the start (mean {apart:.2f} nats apart): its weights were changed, or lost in "
                "a sleep; load them again"
            )

    def _question(self, read: Any, temperature: float = 1.0) -> Question[Any]:
        return Question(request=self.dialect.request(self.model, self.rows, self.k, temperature), read=read)

    def _read(self, answer: Answer) -> list[RowScores]:
        positions = self.dialect.read(answer, self.rows, self.k)
        return [row_scores(row, said, self.k, self.vocabulary) for row, said in zip(self.rows, positions, strict=True)]

    def _scored(self, temperature: float) -> dict[Address, tuple[list[RowScores], dict[int, str]]]:
        question = self._question(lambda answer: (self._read(answer), self.dialect.texts(answer)), temperature)
        try:
            return self.pool.ask_each(question, deadline=self._patience)
        except RefusedError as error:
            advice = self.dialect.advice(self.k)
            if error.status in (404, 405, 501):
                raise ServerError(f"{error} {CHAT_CANNOT_SCORE}") from None
            if "logprob" in error.words.lower() or "max allowed" in error.words:
                lower = " Or set a lower objective.top_k." if self.k else ""
                raise ServerError(f"{error} {self.k} log-probs are asked for at each token. {advice}{lower}") from None
            raise

    def _check_causal(self, server: Address, scores: Sequence[RowScores]) -> None:
        """The rows differ in their last token, which nothing before it can know of, and which alone sees the difference."""
        own = torch.stack([one.sampled_logp for one in scores])
        spread = float((scores[0].logp[:, 0] - scores[0].logp[:, -1]).max()) if self.k > 1 else 1.0
        if min(spread, float(own.std())) < 1e-4:
            raise ServerError(
                f"{self.pool.section}.url: {server} gives every token the same log-prob ({float(own.mean()):.4f}): its model has no weights, or "
                "lost them. Load them again."
            )
        before, last = (own[1:, :-1] - own[0, :-1]).abs(), (own[1:, -1] - own[0, -1]).abs()
        if float(before.max()) > EARLIER or float(last.max()) < 1e-6:
            raise ServerError(
                f"{self.pool.section}.url: {server} has the log-probs of one token at the place of another: a change of the last token alone "
                "shows at another place. They are shifted by one, or its model sees what comes later; it cannot be a teacher."
            )

    def _check_texts(self, server: Address, texts: Mapping[int, str]) -> None:
        """The ids mean the same text to the server and to the teacher's tokenizer."""
        differing = []
        compared = 0
        for token, said in texts.items():
            own = self.tokenizer.decode([token])
            if "\ufffd" in f"{said}{own}" or said.startswith("token_id:"):
                continue
            compared += 1
            if "".join(said.split()) != "".join(str(own).split()):
                differing.append(f"{token} is {own!r} here and {said!r} there")
        if compared and len(differing) > MAX_DIFFERING * compared:
            raise VocabularyError(
                f"{self.pool.section}.url: {server} reads other tokens than the student writes: {len(differing)} of {compared} ids differ. The "
                f"first: {'; '.join(differing[:3])}. Use a student and a teacher of one model family, with one tokenizer."
            )

    def _detokenized(self) -> None:
        """The same for ids from all over the vocabulary, where the server has /detokenize."""
        plain = plain_ids(self.tokenizer, self.vocabulary)
        ids = plain[:: max(1, len(plain) // 64)]
        request = Request(path="/detokenize", json={"model": self.model, "tokens": ids})
        try:
            said = self.pool.ask_each(Question(request=request, read=_prompt), deadline=self._patience)
        except RefusedError:
            return  # not every server has it
        own = "".join(str(self.tokenizer.decode(ids)).split())
        for server, text in said.items():
            if text is not None and "".join(text.split()) != own:
                raise VocabularyError(
                    f"{self.pool.section}.url: {server} reads other tokens than the student writes: the ids {ids[:8]}, … are {own[:60]!r} here "
                    f"and {text[:60]!r} there. Use a student and a teacher of one model family, with one tokenizer."
                )


def drift(one: RowScores, other: RowScores) -> float:
    """Mean distance (nats) of two answers about the same tokens."""
    return float((one.sampled_logp - other.sampled_logp).abs().mean())


def same_fingerprint(one: str, other: str) -> bool:
    """True where two fingerprints are those of one model, as far as rounding lets us see."""
    a, b = ([float(value) for value in text.split()] for text in (one, other))
    return len(a) == len(b) and sum(abs(x - y) for x, y in zip(a, b, strict=True)) <= DRIFT * len(a)


def plain_ids(tokenizer: PreTrainedTokenizerBase, vocabulary: VocabularyMatch) -> list[int]:
    """The ids that are text: a special one may stand for an image."""
    left_out = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids, *vocabulary.invalid_ids}
    return [token for token in range(vocabulary.size) if token not in left_out] or list(range(vocabulary.size))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    try:
        ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
    except Exception:  # the Rust tokenizers raise nothing more specific, where a vocabulary cannot spell the text
        return []
    return [token for token in ids if token != tokenizer.unk_token_id]


def _served(answer: Answer) -> ServedModel:
    said = answer.json()
    listed = said.get("data") if isinstance(said, Mapping) else None
    if not isinstance(listed, list):
        raise BadAnswer("no list of models")
    lengths = [one["max_model_len"] for one in listed if isinstance(one.get("max_model_len"), int)]
    return ServedModel(names=tuple(str(one.get("id")) for one in listed), context=min(lengths, default=None))


def _prompt(answer: Answer) -> str | None:
    said = answer.json()
    text = said.get("prompt") if isinstance(said, Mapping) else None
    return text if isinstance(text, str) else None
