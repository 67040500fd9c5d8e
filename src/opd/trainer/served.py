"""Recipe → a teacher behind a server, and the checks of prompts that such a teacher reads."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from opd.config import Config, TeacherConfig
from opd.models import vocabulary_rows
from opd.remote.keys import read_key
from opd.remote.pool import ServerPool
from opd.teachers.exact_server import ExactServerTeacher
from opd.teachers.server import RemoteTeacher
from opd.teachers.vocabulary import VocabularyMatch, check_vocabularies
from opd.tokenizer import load_tokenizer
from opd.trainer.exact_served import serve_exact
from opd.trainer.fingerprints import OF_A_TEXT
from opd.trainer.load_models import LoadedModel, make_renderer
from opd.types import Prompt

ServedTeacher = RemoteTeacher | ExactServerTeacher


def serve(section: TeacherConfig, role: str, student: LoadedModel, config: Config) -> ServedTeacher:
    """The teacher that `teacher.url` names; nothing is sent yet, but to opd serve-teacher. Its tokenizer is that of `teacher.model`, or the student's own. Raises
    ConfigError, ModelError or VocabularyError."""
    if section.api == "opd":
        return serve_exact(section, role, student, config)
    name = section.served_model or section.model or section.url[0]
    tokenizer = student.tokenizer
    if section.model:
        tokenizer = load_tokenizer(
            section.model, revision=section.revision, trust_remote_code=section.trust_remote_code, role=role
        )
    pool = ServerPool(
        section.url,
        section=role,
        api_key=read_key(section.api_key_env, f"{role}.api_key_env"),
        concurrency=section.concurrency,
        timeout=section.timeout,
        deadline=section.deadline,
    )
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
