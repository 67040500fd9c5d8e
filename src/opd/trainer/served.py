"""Recipe → a teacher behind a server, its tokenizer, and the checks of prompts that such a teacher reads."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from opd.config import Config, TeacherConfig
from opd.doctor.renderers import make_renderer
from opd.errors import ModelError
from opd.models import resolve_device, vocabulary_rows
from opd.remote.keys import read_key
from opd.remote.pool import ServerPool
from opd.teachers.exact_server import ExactServerTeacher
from opd.teachers.served_model import ServedModel, ask_model, ask_tokenizer_files
from opd.teachers.server import RemoteTeacher
from opd.teachers.vocabulary import VocabularyMatch, check_vocabularies
from opd.tokenizer import load_tokenizer, write_own_files
from opd.trainer.fingerprints import OF_A_TEXT, tokenizer_fingerprint
from opd.trainer.load_models import LoadedModel
from opd.types import Prompt

MAX_ANSWER_BYTES = 1 << 35  # the output layer of the largest models is a few GiB
ServedTeacher = RemoteTeacher | ExactServerTeacher


def serve(section: TeacherConfig, role: str, student: LoadedModel, config: Config) -> ServedTeacher:
    """The teacher that `teacher.url` names; nothing is sent yet, but to opd serve-teacher. Its tokenizer is that of `teacher.model`, or the
    student's own (opd serve-teacher sends its own). Raises ConfigError, ModelError, VocabularyError or ServerError."""
    if section.api == "opd":
        return _serve_exact(section, role, student, config)
    name = section.served_model or section.model or section.url[0]
    tokenizer = _named_tokenizer(section, role) if section.model else student.tokenizer
    pool = _pool(section, role)
    return RemoteTeacher(
        pool,
        make_renderer(section, tokenizer, f"{role} '{name}'", config.prompts, rewrites=True),
        api=section.api,
        vocabulary=_vocabulary(config, student, tokenizer, name),
        name=name,
        served_model=section.served_model,
        supply=None if section.supply == "auto" else section.supply,
        tokens_per_request=section.tokens_per_batch,
        canary_every=section.canary_every,
    )


def served_fingerprints(teacher: ServedTeacher, whose: str) -> dict[str, str]:
    """What a resumed run compares, by what it is called in messages."""
    if isinstance(teacher, ExactServerTeacher):
        return {
            f"{whose}'s own weights": teacher.served.weights_fingerprint,
            f"{whose}'s tokenizer and chat template": teacher.served.tokenizer_fingerprint,
        }
    assert teacher.probe is not None
    return {f"{whose}'s {OF_A_TEXT}": teacher.probe.fingerprint}


def check_context(teacher: ServedTeacher, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
    """Every prompt is rendered once now. Raises DataError for one that leaves no room at the server for a whole response."""
    for prompt in prompts:
        ids = teacher.renderer.prompt_ids(prompt)
        if teacher.context_length is not None:
            # An inference server writes one token of its own.
            own = 1 if isinstance(teacher, RemoteTeacher) else 0
            teacher.renderer.check_length(prompt, ids, max_new_tokens, teacher.context_length - own)


def _vocabulary(config: Config, student: LoadedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> VocabularyMatch:
    """The tokens of both, as far as files tell; the server is asked later. How many rows its model has, it does not say."""
    own = vocabulary_rows(student.model)
    return check_vocabularies(
        student.tokenizer,
        tokenizer,
        own,
        own if tokenizer is student.tokenizer else max(tokenizer.get_vocab().values()) + 1,
        student_name=config.student.model,
        teacher_name=name,
    )


def _pool(section: TeacherConfig, role: str, **options: Any) -> ServerPool:
    return ServerPool(
        section.url,
        section=role,
        api_key=read_key(section.api_key_env, f"{role}.api_key_env"),
        concurrency=section.concurrency,
        timeout=section.timeout,
        deadline=section.deadline,
        **options,
    )


def _named_tokenizer(section: TeacherConfig, role: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(
        section.model, revision=section.revision, trust_remote_code=section.trust_remote_code, role=role
    )


# --- opd serve-teacher ------------------------------------------------------------------------------------------------


def _serve_exact(section: TeacherConfig, role: str, student: LoadedModel, config: Config) -> ExactServerTeacher:
    """The teacher that `teacher.url` names with api: opd. Raises ServerError, ConfigError, ModelError or VocabularyError."""
    pool = _pool(section, role, max_answer_bytes=MAX_ANSWER_BYTES)
    served = ask_model(pool)
    tokenizer = _tokenizer(section, role, pool, served)
    vocabulary = check_vocabularies(
        student.tokenizer,
        tokenizer,
        vocabulary_rows(student.model),
        served.head_rows,
        student_name=config.student.model,
        teacher_name=served.name,
        student_eos=student.eos,
        teacher_eos=served.eos_ids,
    )
    device = config.student.device if section.device == "auto" else section.device
    return ExactServerTeacher(
        pool,
        served,
        make_renderer(section, tokenizer, f"{role} '{served.name}'", config.prompts, rewrites=True),
        vocabulary=vocabulary,
        device=resolve_device(device),
        wire="float32" if section.dtype == "float32" else "bfloat16",
        name=served.name,
        supply=None if section.supply == "auto" else section.supply,
    )


def _tokenizer(section: TeacherConfig, role: str, pool: ServerPool, served: ServedModel) -> PreTrainedTokenizerBase:
    """That of `teacher.model`, or the server's own files; either has the fingerprint that the server names."""
    place = section.model or str(pool.addresses[0])
    if section.model:
        tokenizer = _named_tokenizer(section, role)
    else:
        tokenizer = _sent_tokenizer(role, pool, served)
    if tokenizer_fingerprint(tokenizer, served.eos_ids) != served.tokenizer_fingerprint:
        raise ModelError(
            f"The tokenizer of {place} is not the one that {served.name} is served with (vocabulary, rules, chat template or stop tokens "
            f"differ), so the teacher would read other prompts. "
            + (
                f"Drop {role}.model: the server sends its own."
                if section.model
                else f"Set {role}.model to a folder with the served model's tokenizer."
            )
        )
    return tokenizer


def _sent_tokenizer(role: str, pool: ServerPool, served: ServedModel) -> PreTrainedTokenizerBase:
    files = ask_tokenizer_files(pool, served)
    with tempfile.TemporaryDirectory() as folder:
        write_own_files(files, Path(folder))
        try:
            return load_tokenizer(folder, role=role)
        except ModelError as error:
            raise ModelError(
                f"The tokenizer files that {pool.addresses[0]} sends cannot be loaded ({str(error)[:300]}). Set {role}.model to a folder "
                "with the served model's tokenizer."
            ) from None
