"""What `opd serve-teacher` says about its model, the same at every server of a pool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from opd.errors import ServerChangedError, ServerError
from opd.remote.address import Address
from opd.remote.pool import ServerPool
from opd.remote.questions import Answer, BadAnswer, Question, Request
from opd.teachers.hidden_wire import FORMAT, read_answer


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What one request may hold; the least of the pool."""

    row_tokens: int
    rows: int
    tokens: int
    batch_tokens: int
    """Of one forward pass."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A frozen model behind HTTP."""

    name: str
    dtype: str
    hidden_size: int
    rows: int
    """Ids that it can read."""
    head_rows: int
    """Rows of its output layer, padding included."""
    context: int | None
    hidden_reason: str | None
    """Why hidden states are not enough to know its logits; None: they are."""
    identity: str
    """A hash of all that decides an answer."""
    weights_fingerprint: str
    tokenizer_fingerprint: str
    head_fingerprint: str | None
    eos_ids: tuple[int, ...]
    limits: RequestLimits

    def check_identity(self, identity: str, server: Address, section: str) -> None:
        """Raise ServerChangedError for an answer of another model than that of the start."""
        if identity == self.identity:
            return
        raise ServerChangedError(
            f"{section}.url: {server} serves another model than at the start of the run (or in another dtype, or with another tokenizer), "
            f"so its targets would be another teacher's. Serve {self.name} ({self.dtype}) there again, and go on with --resume."
        )


def ask_model(pool: ServerPool) -> ServedModel:
    """Ask every server what it serves. Raises ServerError where one is no `opd serve-teacher`, or they serve different models."""
    found = pool.ask_each(Question(request=Request(path="/v1/model", method="GET"), read=_read))
    first = next(iter(found))
    for server, about in found.items():
        if about["identity"] != found[first]["identity"]:
            raise ServerError(
                f"{pool.section}.url: {first} serves {_shown(found[first])} and {server} serves {_shown(about)}, and the servers of a pool "
                "hold the same weights, dtype and tokenizer. Serve one model at all of them, or name the other ones as teachers of their "
                "own (teachers.NAME.url)."
            )
    about, prints = found[first], found[first]["fingerprints"]
    limits = {name: min(one["limits"][name] for one in found.values()) for name in RequestLimits.__annotations__}
    return ServedModel(
        **{name: about[name] for name in ("name", "dtype", "hidden_size", "rows", "head_rows", "context")},
        hidden_reason=about["hidden_reason"],
        identity=about["identity"],
        weights_fingerprint=prints["weights"],
        tokenizer_fingerprint=prints["tokenizer"],
        head_fingerprint=prints["head"],
        eos_ids=tuple(about["eos_ids"]),
        limits=RequestLimits(**limits),
    )


def ask_tokenizer_files(pool: ServerPool, served: ServedModel) -> dict[str, bytes]:
    """The files of the server's tokenizer, by relative path. Raises ServerError."""

    def read(answer: Answer) -> dict[str, bytes]:
        try:
            tensors, _, identity = read_answer(answer.content)
        except ValueError as error:
            raise BadAnswer(str(error)) from None
        served.check_identity(identity, answer.server, pool.section)
        return {name: tensor.numpy().tobytes() for name, tensor in tensors.items() if _is_harmless(name)}

    return pool.ask(Question(request=Request(path="/v1/tokenizer", method="GET"), read=read))


def _is_harmless(name: str) -> bool:
    """A file below the folder it is written to, and no code."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name and path.suffix != ".py"


def _read(answer: Answer) -> Mapping[str, Any]:
    about = answer.json()
    if not isinstance(about, dict) or "identity" not in about:
        raise ServerError(
            f"{answer.server} answers /v1/model, and not as opd serve-teacher does; choose teacher.api by the kind of server."
        )
    if about.get("format") != FORMAT:
        raise ServerError(
            f"{answer.server} speaks format {about.get('format')} of opd serve-teacher (opd {about.get('opd')}), and this opd speaks "
            f"{FORMAT}; install the same version at both sides."
        )
    return about


def _shown(about: Mapping[str, Any]) -> str:
    return f"{about['name']} ({about['dtype']}, identity {about['identity'][:8]})"
