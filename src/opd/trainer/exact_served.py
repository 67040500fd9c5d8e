"""Recipe → a teacher behind `opd serve-teacher`, its tokenizer checked against the server's."""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from opd.config import Config, TeacherConfig
from opd.errors import ModelError
from opd.models import resolve_device, vocabulary_rows
from opd.remote.keys import read_key
from opd.remote.pool import ServerPool
from opd.teachers.exact_server import ExactServerTeacher
from opd.teachers.served_model import ServedModel, ask_model, ask_tokenizer_files
from opd.teachers.vocabulary import check_vocabularies
from opd.tokenizer import load_tokenizer, write_own_files
from opd.trainer.fingerprints import tokenizer_fingerprint
from opd.trainer.load_models import LoadedModel, make_renderer

MAX_ANSWER_BYTES = 1 << 35  # the output layer of the largest models is a few GiB


def serve_exact(section: TeacherConfig, role: str, student: LoadedModel, config: Config) -> ExactServerTeacher:
    """The teacher that `teacher.url` names with api: opd. Raises ServerError, ConfigError, ModelError or VocabularyError."""
    pool = ServerPool(
        section.url,
        section=role,
        api_key=read_key(section.api_key_env, f"{role}.api_key_env"),
        concurrency=section.concurrency,
        timeout=section.timeout,
        deadline=section.deadline,
        max_answer_bytes=MAX_ANSWER_BYTES,
    )
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
        tokenizer = load_tokenizer(
            section.model, revision=section.revision, trust_remote_code=section.trust_remote_code, role=role
        )
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
