"""Generation of a batch with transformers' `generate`, in which equal prompts are read once and rows that have ended leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from opd.samplers.drawing import Draw
from opd.samplers.key_values import grouped_attention, selectable_cache

CALL_COST = 5e8  # floating-point operations in the time that one more call of `generate` takes on a CPU, about 5 ms
LEAVING_SHARE = {"cpu": 1 / 8}
OTHER_LEAVING_SHARE = 1 / 2  # a GPU's step hardly becomes shorter with fewer rows

Row = tuple[list[int], list[float], list[float]]
"""Token ids, their log-probs, and the entropies where they are recorded."""


@dataclass(frozen=True, kw_only=True)
class Generator:
    """A model with the settings of its `generate`."""

    model: PreTrainedModel
    max_new_tokens: int
    eos_ids: Sequence[int]
    pad_id: int
    processors: Callable[[Draw], LogitsProcessorList]
    """What turns logits into the distribution that is drawn from, and the draw."""
    stopped: Callable[[torch.Tensor, int], list[bool]] | None
    """Says of [rows, tokens] ids and the width of their prompts which rows end with a stop string; None where there is none."""
    show: Callable[[Sequence[Sequence[int]]], object] | None
    """Called with the responses so far after every token. Then no row leaves."""
    entropy: bool

    @torch.no_grad()
    def rows(self, prompt_ids: Sequence[tuple[int, ...]], uniforms: torch.Tensor | None) -> list[Row]:
        """One row per prompt, padding behind its end included. `uniforms` are [rows, max_new_tokens]; None takes the likeliest
        tokens. Raises UndrawableError where nothing can be drawn."""
        batch = _Batch(self, prompt_ids, uniforms)
        with grouped_attention(self.model):
            if batch.cache is not None and len(batch.unique) < len(prompt_ids):
                batch.read_prompts_once()
            while batch.goes_on:
                batch.generate()
        return batch.found

    def config(self, max_new_tokens: int) -> GenerationConfig:
        """The processors do all of it, and the last one draws: what is left to `generate` is to take the largest score."""
        return GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(self.eos_ids),
            pad_token_id=self.pad_id,
            return_dict_in_generate=True,
        )


class _Batch:
    """The rows that have not ended, with their cache, and what was found of all rows."""

    def __init__(
        self, generator: Generator, prompt_ids: Sequence[tuple[int, ...]], uniforms: torch.Tensor | None
    ) -> None:
        self.generator = generator
        self.prompt_ids = prompt_ids
        self.unique = list(dict.fromkeys(prompt_ids))
        self.device = generator.model.device
        self.uniforms = None if uniforms is None else uniforms.to(self.device)
        self.width = max(map(len, prompt_ids))
        most = self.width + generator.max_new_tokens
        self.cache = None if generator.show else selectable_cache(generator.model, most)
        self.found: list[Row] = [([], [], []) for _ in prompt_ids]
        self.active = list(range(len(prompt_ids)))
        self.steps = 0
        self.token_cost = 2 * sum(p.numel() for p in generator.model.parameters())
        self.ids, self.mask = self._padded(prompt_ids)

    @property
    def goes_on(self) -> bool:
        """Whether a row is left that has not ended."""
        return bool(self.active) and self.steps < self.generator.max_new_tokens

    def read_prompts_once(self) -> None:
        """The first token of every row: equal prompts pass through the model once, and their cache is copied."""
        ids, mask = self._padded(self.unique)
        config = self.generator.config(max_new_tokens=1)
        config.output_logits = True
        output = self._call(ids, mask, config)
        number = {prompt: i for i, prompt in enumerate(self.unique)}
        place = torch.tensor([number[prompt] for prompt in self.prompt_ids], device=self.device)
        assert self.cache is not None
        self.cache.batch_select_indices(place)
        draw = self._draw()
        ids: Any = self.ids
        self.generator.processors(draw)(ids, output.logits[0].float()[place])
        self.ids = torch.cat([self.ids, draw.tokens[0][:, None]], 1)
        self._take(draw, self._ended().look(self.ids))

    def generate(self) -> None:
        """Tokens of the rows, until all have ended or enough to go on without them."""
        draw, ended = self._draw(), self._ended()
        criteria: list[StoppingCriteria] = [ended]
        if self.generator.show is not None:
            criteria.append(_Shown(self.generator.show, self.width))
        config = self.generator.config(self.generator.max_new_tokens - self.steps)
        output = self._call(self.ids, self.mask, config, draw, criteria)
        self.ids = output.sequences
        self._take(draw, ended.rows)

    def _call(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        config: GenerationConfig,
        draw: Draw | None = None,
        criteria: Sequence[StoppingCriteria] = (),
    ):
        given = {} if self.cache is None else {"past_key_values": self.cache}
        return self.generator.model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=None if draw is None else self.generator.processors(draw),
            stopping_criteria=StoppingCriteriaList(criteria),
            synced_gpus=False,  # ranks go along with each other by themselves, also at other lengths
            **given,
        )

    def _take(self, draw: Draw, ended: torch.Tensor) -> None:
        """Keep what was drawn, and go on with the rows that have not ended."""
        for row, *parts in zip(self.active, *draw.columns(), strict=True):
            for kept, part in zip(self.found[row], parts, strict=True):
                kept += part
        self.steps += len(draw.tokens)
        stay = (~ended).nonzero()[:, 0]
        self.active = [self.active[i] for i in stay.tolist()]
        if not self.goes_on:
            return
        self.ids = self.ids[stay]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), len(draw.tokens))], 1)[stay]
        if self.cache is not None and len(stay) < len(ended):
            self.cache.batch_select_indices(stay)

    def _draw(self) -> Draw:
        uniforms = None if self.uniforms is None else self.uniforms[self.active, self.steps :]
        return Draw(uniforms, entropy=self.generator.entropy)

    def _ended(self) -> _Ended:
        return _Ended(self.generator, self.width, self._pays if self.cache is not None else None)

    def _pays(self, ended: int, length: int) -> bool:
        """Whether going on without the rows that have ended saves more than another call of `generate` costs."""
        share = LEAVING_SHARE.get(self.device.type, OTHER_LEAVING_SHARE)
        left = self.width + self.generator.max_new_tokens - length
        return ended >= share * len(self.active) and ended * left * self.token_cost >= CALL_COST

    def _padded(self, prompt_ids: Sequence[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, width] token ids and attention mask, padded on the left."""
        rows = [[self.generator.pad_id] * (self.width - len(p)) + list(p) for p in prompt_ids]
        mask = [[0] * (self.width - len(p)) + [1] * len(p) for p in prompt_ids]
        return torch.tensor(rows, device=self.device), torch.tensor(mask, device=self.device)


class _Ended(StoppingCriteria):
    """Ends rows with an EOS or a stop string, and the call of `generate` once enough rows have ended to go on without them."""

    def __init__(self, generator: Generator, width: int, leave: Callable[[int, int], bool] | None) -> None:
        """`leave` is asked with the number of rows that have ended, and the length that all have."""
        self.eos = torch.tensor(list(generator.eos_ids), device=generator.model.device)
        self.stopped = generator.stopped
        self.width = width
        self.leave = leave
        self.rows = torch.zeros(0, dtype=torch.bool)

    def __call__(self, input_ids: torch.Tensor, scores: object = None, **_: object) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ended = self.look(input_ids)
        if self.leave is not None and self.leave(int(ended.sum()), input_ids.shape[1]):
            return torch.ones_like(ended)
        return ended

    def look(self, ids: torch.Tensor) -> torch.Tensor:
        """[rows] the rows that have ended by now."""
        ended = torch.isin(ids[:, -1], self.eos)
        if self.stopped is not None:
            ended |= torch.tensor(self.stopped(ids, self.width), device=ended.device)
        self.rows = ended | self.rows if len(self.rows) else ended
        return self.rows


class _Shown(StoppingCriteria):
    """Shows the responses so far to somebody, and stops none."""

    def __init__(self, show: Callable[[Sequence[Sequence[int]]], object], width: int) -> None:
        self.show = show
        self.width = width

    def __call__(self, input_ids: torch.Tensor, scores: object = None, **_: object) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.show(input_ids[:, self.width :].tolist())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
