"""One denoising step: predict the masks of a block from the whole canvas, propose tokens, commit some of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.generation import LogitsProcessorList

from .canvas import Block, Canvas
from .generation_config import MaskedDiffusionGenerationConfig
from .remasking import (
    RANKINGS,
    commit_by_entropy_bound,
    commit_by_factor,
    commit_by_quota,
    commit_by_threshold,
    entropy,
    token_probability,
)


@dataclass
class DenoisingStep:
    """What a step did, as `on_step` receives it. R counts the rows that took part, W the columns of the block.

    Attributes:
        rows (`torch.LongTensor` of shape `(R,)`): their indices in the batch.
        start (`int`), end (`int`): the columns of the block.
        tokens (`torch.LongTensor` of shape `(R, S)`): the canvas after the step.
        proposals (`torch.LongTensor` of shape `(R, W)`): the block, with this step's predictions where it was masked.
        committed (`torch.BoolTensor` of shape `(R, W)`): the positions that the step committed.
        confidence (`torch.FloatTensor` of shape `(R, W)`): probability of each prediction; NaN where there was none.
    """

    rows: torch.LongTensor
    start: int
    end: int
    tokens: torch.LongTensor
    proposals: torch.LongTensor
    committed: torch.BoolTensor
    confidence: torch.FloatTensor


PositionProcessor = Callable[[torch.LongTensor, torch.LongTensor, torch.LongTensor, torch.Tensor], torch.Tensor]
"""Changes logits (M, V) knowing where they stand: (tokens (R, S), rows (M,), columns (M,), logits) -> logits."""


class Denoiser:
    """Runs denoising steps on a canvas.

    Args:
        model: called as `model(input_ids, attention_mask, position_ids, logits_to_keep)`.
        canvas ([`Canvas`]): read and written.
        config ([`MaskedDiffusionGenerationConfig`]): with every field set.
        processors (`LogitsProcessorList`): applied to logits before confidence is taken.
        warpers (`LogitsProcessorList`): applied to what is sampled from, after confidence is taken.
        position_processors (`list` of [`PositionProcessor`]): applied after `processors`.
        generator (`torch.Generator`, *optional*): source of the noise.
    """

    def __init__(
        self,
        model,
        canvas: Canvas,
        config: MaskedDiffusionGenerationConfig,
        processors: LogitsProcessorList,
        warpers: LogitsProcessorList,
        position_processors: list[PositionProcessor],
        generator: torch.Generator | None,
    ):
        self.model, self.canvas, self.config = model, canvas, config
        self.processors, self.warpers, self.position_processors = processors, warpers, position_processors
        self.generator = generator
        self.is_guided = config.guidance_scale not in (None, 1)
        self.eos_token_ids = torch.tensor(config.eos_token_ids, dtype=torch.long, device=canvas.tokens.device)
        self.is_padded = not bool(canvas.attention_mask.all())

    def __call__(self, block: Block, rows: torch.LongTensor, quota: torch.LongTensor) -> DenoisingStep:
        """Predicts the block's masks in `rows` (R,) with one forward pass and commits at least `quota` (R,)."""
        canvas, columns = self.canvas, slice(block.start, block.end)
        masked = canvas.masked[rows, columns] & block.active[rows]
        logits = self._process(rows, block.start, masked, self._predict(rows, block, masked))
        tokens = self._propose(rows, masked, logits)

        probability = token_probability(logits, tokens)
        confidence = _scatter(probability, masked, torch.nan)
        committed = self._select(logits, tokens, probability, masked, quota)
        proposals = canvas.tokens[rows, columns].masked_scatter(masked, tokens)
        canvas.commit(rows, block, proposals, committed, confidence)
        return DenoisingStep(rows, block.start, block.end, canvas.tokens[rows], proposals, committed, confidence)

    def _predict(self, rows: torch.LongTensor, block: Block, masked: torch.BoolTensor) -> torch.Tensor:
        """Logits (M, V) of the masked positions, in row-major order and at least fp32."""
        tokens, attention_mask = self.canvas.tokens[rows], self.canvas.attention_mask[rows]
        read = torch.zeros_like(attention_mask)
        read[:, block.start : block.end] = masked
        if self.is_guided:
            unconditional = tokens.masked_fill(self.canvas.given[rows], self.canvas.mask_token_id)
            tokens, read = torch.cat([tokens, unconditional]), torch.cat([read, read])
            attention_mask = torch.cat([attention_mask, attention_mask])
        logits = self.model(
            input_ids=tokens,
            attention_mask=attention_mask.long() if self.is_padded else None,
            position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
            logits_to_keep=read,
        ).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.is_guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + self.config.guidance_scale * (conditional - unconditional)
        return logits

    def _process(
        self, rows: torch.LongTensor, start: int, masked: torch.BoolTensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """The logits that confidence is taken from; [MASK] itself is never a prediction."""
        if self.processors:
            logits = self.processors(self._canvas_per_mask(rows, masked), logits)
        if self.position_processors:
            row_index, column = masked.nonzero(as_tuple=True)
            for process in self.position_processors:
                logits = process(self.canvas.tokens[rows], row_index, start + column, logits)
        logits[:, self.canvas.mask_token_id] = -torch.inf
        return logits

    def _propose(self, rows: torch.LongTensor, masked: torch.BoolTensor, logits: torch.Tensor) -> torch.LongTensor:
        """A token (M,) for every masked position: the likeliest, or a sample."""
        if not self.config.do_sample:
            return logits.argmax(-1)
        if self.warpers:
            logits = self.warpers(self._canvas_per_mask(rows, masked), logits)
        return torch.multinomial(logits.softmax(-1), 1, generator=self.generator).squeeze(-1)

    def _canvas_per_mask(self, rows: torch.LongTensor, masked: torch.BoolTensor) -> torch.LongTensor:
        """(M, S): for each masked position the canvas of its row, in which padding reads as [MASK]."""
        tokens = self.canvas.tokens[rows].masked_fill(~self.canvas.attention_mask[rows], self.canvas.mask_token_id)
        return tokens.repeat_interleave(masked.sum(-1), dim=0)

    def _select(self, logits, tokens, probability, masked, quota) -> torch.BoolTensor:
        """The positions (R, W) to commit: the quota of the best ranked, and what the parallel rule adds."""
        config = self.config
        scores = RANKINGS[config.remasking](logits, probability, self.generator)
        if config.defer_eos:
            is_eos = torch.isin(tokens, self.eos_token_ids)
            scores = scores.masked_fill(is_eos, torch.finfo(scores.dtype).min)
            probability = probability.masked_fill(is_eos, 0)
        committed = commit_by_quota(_scatter(scores, masked, -torch.inf), masked, quota)
        confidence = _scatter(probability, masked, 0)
        if config.confidence_threshold is not None:
            committed |= commit_by_threshold(confidence, masked, config.confidence_threshold)
        if config.confidence_factor is not None:
            committed |= commit_by_factor(confidence, masked, config.confidence_factor)
        if config.entropy_bound is not None:
            entropies = entropy(logits)
            if config.defer_eos:
                entropies = entropies.masked_fill(is_eos, torch.inf)
            committed |= commit_by_entropy_bound(_scatter(entropies, masked, torch.inf), masked, config.entropy_bound)
        return committed


def _scatter(values: torch.Tensor, masked: torch.BoolTensor, fill: float) -> torch.Tensor:
    """Spreads values (M,) over the True positions of `masked` (R, W), `fill` elsewhere."""
    return torch.full(masked.shape, fill, dtype=values.dtype, device=values.device).masked_scatter(masked, values)
