"""Checks of prompts, tokens and models before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from opd.config.model import StudentConfig
from opd.config.rollout import RolloutConfig
from opd.config.run import RunSettings
from opd.data.reasoning_gym import COLUMN as TASK_COLUMN
from opd.data.rendering import Renderer
from opd.errors import ConfigError, DataError
from opd.losses.settings import ObjectiveSettings
from opd.teachers.vocabulary import VocabularyMatch
from opd.types import Prompt

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SMALL_NATURAL_LR = 0.01  # under it, lr was meant for another optimizer


def check_rows(config: RunSettings, prompts: list[Prompt], held_out: list[Prompt]) -> None:
    """Look in every row now for what a later step would need. Raises DataError naming the first that lacks it."""
    asked = [("eval.reward", config.eval.reward, held_out, config.prompts.eval_path)]
    if config.judges_rollouts:
        asked.append(("rl.reward", config.rl.reward or config.eval.reward, prompts, config.prompts.path))
    for key, reward, rows, path in asked:
        compares = reward in ("exact_match", "numeric_answer", "math_verify") or reward.startswith("regex:")
        missing = next((p for p in rows if p.answer is None), None) if compares else None
        if missing is not None:
            judged, without = ("", "") if config.rl.rewarded or key == "eval.reward" else _asked_by(config)
            raise DataError(
                f"Row {missing.index} of '{path}' has no answer, and {key}={reward}{judged} compares "
                f"with one. Add an '{config.prompts.answer_column}' column, or set {key} to a function of your own{without}."
            )
        missing = next((p for p in rows if TASK_COLUMN not in p.metadata), None) if reward == "reasoning_gym" else None
        if missing is not None:
            raise DataError(
                f"Row {missing.index} of '{path}' is no task of reasoning-gym, whose verifiers are {key}={reward}. Set prompts.path and "
                "prompts.eval_path to reasoning_gym:NAME, or take another reward."
            )
    teachers = {p.teacher for p in prompts if p.teacher is not None}
    if len(teachers) > 1 and len(config.all_teachers) == 1:
        raise DataError(
            f"The prompts name {len(teachers)} teachers ({', '.join(sorted(teachers)[:3])}, …), and a run has one. Give all of them "
            f"in the section teachers, or rename the column '{config.prompts.teacher_column}' if it means something else."
        )
    if config.rollout.lmbda < 1 and config.rollout.off_policy == "dataset":
        missing = next((p for p in prompts if p.response is None), None)
        if missing is not None:
            raise DataError(
                f"Row {missing.index} of '{config.prompts.path}' has no response, and rollout.lmbda={config.rollout.lmbda} takes "
                f"some from the data set. Add a '{config.prompts.response_column}' column, or set rollout.off_policy=teacher or "
                "rollout.lmbda=1."
            )


def _asked_by(config: RunSettings) -> tuple[str, str]:
    """What asks for a reward that no loss is trained on, and how it is not asked, both as parts of a sentence."""
    if "correct" in config.train.drop:
        return ", which train.drop=[correct] asks,", ", or leave correct out of train.drop"
    return ", which log.reward asks,", ", or set log.reward to false"


def check_tokens(
    objective: ObjectiveSettings, rollout: RolloutConfig, renderer: Renderer, vocabulary: VocabularyMatch
) -> None:
    """Raises ConfigError for token ids and stop strings that can never occur."""
    grouped = [i for group in objective.eos_groups for i in group]
    for key, ids in (("always_include", objective.always_include), ("eos_groups", grouped)):
        outside = [i for i in ids if i >= vocabulary.size]
        if outside:
            raise ConfigError(
                f"objective.{key} holds {outside[0]}, and the vocabulary ends at {vocabulary.size - 1}; give token ids of the "
                "student's tokenizer."
            )
    for stop in rollout.stop:
        try:
            renderer.response_ids(stop, finished=False)
        except DataError as error:
            raise ConfigError(
                f"rollout.stop={stop!r} can never occur in a response: {error} Use another string."
            ) from error


def check_lengths(prompts: list[Prompt], renderer: Renderer, model: PreTrainedModel, max_new_tokens: int) -> None:
    """Every prompt is rendered once now, so that the one that is too long is known before step 0 and not at step 900."""
    from opd.models import context_length  # torch comes with it, here and below

    limit = context_length(model)
    for prompt in prompts:
        ids = renderer.prompt_ids(prompt)
        if limit is not None:
            renderer.check_length(prompt, ids, max_new_tokens, limit)


def check_packing(model: PreTrainedModel, role: str, pad_id: int) -> None:
    """Raise ConfigError for a model that would mix packed sequences."""
    from opd.data.pack import layout_sequences
    from opd.models import response_logits
    from opd.teachers.packing import mixes_packed

    def read(sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        prompts = [sequence[:1] for sequence in sequences]
        responses = [[*sequence[1:], pad_id] for sequence in sequences]  # the last token is not fed
        arranged = layout_sequences(prompts, responses, layout="packed", pad_id=pad_id, device=model.device)
        return response_logits(model, arranged)

    if mixes_packed(read):
        raise ConfigError(
            f"train.layout=packed: {type(model).__name__}, the {role}, lets packed sequences see each other, so every loss would be "
            "wrong. Use train.layout=right_padded."
        )


def notices(config: RunSettings) -> list[str]:
    """Warnings about settings that are allowed and probably not meant."""
    found = []
    if config.eval.every and config.prompts.eval_path is None:
        found.append("prompts.eval_path is not set, so nothing is evaluated; eval.every=0 says so on purpose.")
    if config.student.dtype == "bfloat16" and config.student.lora is None:
        found.append(
            "student.dtype=bfloat16 rounds away updates smaller than 1/256 of a weight; at usual learning rates most weights never "
            "move. float32 with train.autocast=bfloat16 trains as fast."
        )
    if config.rollout.vllm.plain_text_abroad:
        found.append(
            f"rollout.vllm.url={config.rollout.vllm.url} is another machine, and http sends prompts, responses and the key there in plain "
            "text. Use https, or a tunnel to 127.0.0.1."
        )
    optimizer, steps = config.optimizer, config.train.steps
    if optimizer.warmup >= steps > 1:
        found.append(
            f"optimizer.warmup_steps={optimizer.warmup} does not end within train.steps={steps}, so the rate never passes "
            f"{steps / (optimizer.warmup + 1):.0%} of optimizer.lr. Lower it, or set it to null for a tenth of the run."
        )
    return [*found, *_reduction_notices(config), *_natural_gradient_notices(config)]


def _reduction_notices(config: RunSettings) -> list[str]:
    objective, sequences = config.objective, config.train.prompts_per_step * config.train.samples_per_prompt
    if not objective.looks_at_sample or objective.reduction != "token_mean" or not config.rl.distilled:
        return []
    said = "support=sampled" if objective.support == "sampled" else "tail=sampled"
    return [
        f"objective.{said} with objective.reduction=token_mean: a token's weight, 1 over the step's response tokens, depends on that token, "
        f"so the expected gradient is off by about 1/{sequences} of its size (1 over the responses of a step). objective.reduction=fixed "
        "with objective.fixed_count set to the response tokens of a usual step has no such error."
    ]


def served_notes(config: RunSettings) -> list[str]:
    """Notes on what a teacher behind a server makes different."""
    served = [name for name, section in config.all_teachers.items() if section.sends_log_probs]
    if not served:
        return []
    found = []
    if config.eval.every and config.prompts.eval_path is not None:
        found.append(
            "a teacher behind a server sends no whole distribution and draws no answers, so evaluations report the reward alone."
        )
    objective, rollout = config.objective, config.rollout
    on_policy = rollout.lmbda == 1 and rollout.top_p == 1 and rollout.top_k == 0
    if objective.tail == "bucket" and on_policy and rollout.temperature == objective.student_temperature:
        found.append(
            "objective.tail=bucket sees the probability outside the teacher's top-k as one token. objective.tail=sampled is unbiased at every "
            "top_k, and costs nothing here: the server sends the sampled token's log-prob anyway (arXiv 2609.34447)."
        )
    return found


def saved_notes(student: StudentConfig, model: PreTrainedModel, saved: str) -> list[str]:
    """Notes on how student/ will differ from the checkpoint that the student came from, its trained weights aside. `saved` is
    save.dtype."""
    from opd.models import SAVED_DTYPES, stored_dtype, stored_kind, switched_off

    name, revision = student.model, student.revision
    found = []
    kind = stored_kind(name, revision)
    if kind not in (None, model.config.model_type):
        found.append(
            f"'{name}' is a {kind} checkpoint, of which the text part alone is read: student/ will be a {type(model).__name__}, without "
            "the weights for images and sound."
        )
    switches = switched_off(name, revision)
    if switches:
        found.append(
            f"{', '.join(switches)} in the config.json of '{name}' is turned back, in student/ too: a model that only answers does "
            "without it."
        )
    trained, stored = str(model.dtype).removeprefix("torch."), stored_dtype(name, revision)
    came = stored if stored in SAVED_DTYPES else trained
    kept = came if saved == "auto" else saved
    if kept == trained and trained == came:
        return found
    key = "as it came" if kept == came else f"save.dtype={saved}"
    advice = ""
    if trained == "float32" and kept != "float32":
        advice = (
            " Rounding can undo small updates; save.dtype=float32 keeps them, and what serves the student can round."
        )
    found.append(f"'{name}' came in {came} and is trained in {trained}; student/ is saved in {kept} ({key}).{advice}")
    return found


def _natural_gradient_notices(config: RunSettings) -> list[str]:
    optimizer, objective, rl = config.optimizer, config.objective, config.rl
    if optimizer.name != "natural_gradient":
        return []
    found = []
    sampled = objective.support == "sampled" or objective.tail == "sampled" or objective.delivery == "advantage"
    if rl.rewarded or sampled:
        what = "a reward" if rl.rewarded else "the sampled token"
        found.append(
            f"optimizer.name=natural_gradient with {what}: the solver magnifies the noise of a sampled gradient in the directions where F "
            "is small, and stalled on both rewards and sampled-token losses. Use an exact divergence (objective.support=full), or muon "
            "or adamw."
        )
    if optimizer.peak_lr < SMALL_NATURAL_LR:
        found.append(
            f"optimizer.lr={optimizer.peak_lr:g} is a factor of every natural-gradient step, not AdamW's rate, and leaves little of it. "
            "Drop it, or set it to 1 and choose optimizer.natural_gradient.trust_region."
        )
    if config.train.token_fraction < 1:
        found.append(
            f"train.token_fraction={config.train.token_fraction}: natural_gradient's trust region counts the kept tokens alone, so the "
            "others may move further."
        )
    return found
