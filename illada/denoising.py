"""One denoising step: predict the masks of a block, propose tokens, commit some of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.generation import LogitsProcessorList

from .canvas import Block, Canvas
from .generation_config import MaskedDiffusionGenerationConfig
from .logits import forbid_mask
from .prediction import Predictor
from .remasking import (
    RANKINGS,
    Prediction,
    commit_by_entropy_bound,
    commit_by_factor,
    commit_by_quota,
    commit_by_threshold,
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
"""Changes logits (M, V) knowing where they stand: (tokens (B, S), rows (M,), columns (M,), logits) -> logits."""


class Denoiser:
    """Runs denoising steps on a canvas.

    Args:
        predictor ([`Predictor`]): gives the logits of masked positions of the canvas.
        canvas ([`Canvas`]): read and written.
        config ([`MaskedDiffusionGenerationConfig`]): with every field set.
        processors (`LogitsProcessorList`): applied to logits before confidence is taken.
        warpers (`LogitsProcessorList`): applied to what is sampled from, after confidence is taken.
        position_processors (`list` of [`PositionProcessor`]): applied after `processors`.
        generator (`torch.Generator`, *optional*): source of the noise.
        listeners (`list` of `Callable`): each is called with the [`DenoisingStep`] after a step.
    """

    def __init__(
        self,
        predictor: Predictor,
        canvas: Canvas,
        config: MaskedDiffusionGenerationConfig,
        processors: LogitsProcessorList,
        warpers: LogitsProcessorList,
        position_processors: list[PositionProcessor],
        generator: torch.Generator | None,
        listeners: list[Callable[[DenoisingStep], None]],
    ):
        self.predictor, self.canvas, self.config = predictor, canvas, config
        self.processors, self.warpers, self.position_processors = processors, warpers, position_processors
        self.generator, self.listeners = generator, listeners
        self.eos_token_ids = torch.tensor(config.eos_token_ids, dtype=torch.long, device=canvas.tokens.device)

    def __call__(self, block: Block, quota: torch.LongTensor) -> bool:
        """Predicts the block's masks with one forward pass and commits at least `quota` (B,) of each row.

        Returns whether there was a mask in a live row.
        """
        undecided = self.canvas.undecided(block).cpu()  # the one time that a step waits for the device
        rows = undecided.any(-1).nonzero().squeeze(-1)
        if len(rows) == 0:
            return False
        rows = self.predictor.seat(rows)
        masked = undecided[rows]
        row_index, column = masked.nonzero(as_tuple=True)
        logits = self.predictor(row_index, block.start + column)

        rows, masked, row_index, column = (tensor.to(quota.device) for tensor in (rows, masked, row_index, column))
        positions = (rows[row_index], block.start + column)
        logits = self._process(positions, logits)
        prediction = Prediction(logits, self._propose(positions, logits))
        committed = self._select(prediction, masked, quota[rows])
        self.canvas.commit(rows, positions, prediction.tokens, prediction.probability, committed[row_index, column])
        if self.listeners:
            self._tell(block, rows, masked, prediction, committed)
        return True

    def _process(self, positions: tuple[torch.LongTensor, torch.LongTensor], logits: torch.Tensor) -> torch.Tensor:
        """The logits that confidence is taken from; [MASK] itself is never a prediction."""
        if self.processors:
            logits = self.processors(self._canvas_per_mask(positions), logits)
        for process in self.position_processors:
            logits = process(self.canvas.tokens, *positions, logits)
        return forbid_mask(logits, self.canvas.mask_token_id)

    def _propose(self, positions: tuple[torch.LongTensor, torch.LongTensor], logits: torch.Tensor) -> torch.LongTensor:
        """A token (M,) for every masked position: the likeliest, or a sample."""
        if not self.config.do_sample:
            return logits.argmax(-1)
        if self.warpers:
            logits = self.warpers(self._canvas_per_mask(positions), logits)
        return torch.multinomial(logits.softmax(-1), 1, generator=self.generator).squeeze(-1)

    def _canvas_per_mask(self, positions: tuple[torch.LongTensor, torch.LongTensor]) -> torch.LongTensor:
        """(M, S): for each masked position the canvas of its row, in which padding reads as [MASK]."""
        canvas = self.canvas
        return canvas.tokens.masked_fill(~canvas.attention_mask, canvas.mask_token_id)[positions[0]]

    def _select(self, prediction: Prediction, masked: torch.BoolTensor, quota: torch.LongTensor) -> torch.BoolTensor:
        """The positions (R, W) to commit: the quota of the best ranked, and what the parallel rule adds."""
        config = self.config
        scores, probability = RANKINGS[config.remasking](prediction, self.generator), prediction.probability
        if config.defer_eos:
            is_eos = torch.isin(prediction.tokens, self.eos_token_ids)
            scores = scores.masked_fill(is_eos, torch.finfo(scores.dtype).min)
            probability = probability.masked_fill(is_eos, 0)
        committed = commit_by_quota(_scatter(scores, masked, -torch.inf), masked, quota)
        if config.confidence_threshold is not None:
            committed |= commit_by_threshold(_scatter(probability, masked, 0), masked, config.confidence_threshold)
        if config.confidence_factor is not None:
            committed |= commit_by_factor(_scatter(probability, masked, 0), masked, config.confidence_factor)
        if config.entropy_bound is not None:
            entropies = prediction.entropy
            if config.defer_eos:
                entropies = entropies.masked_fill(is_eos, torch.inf)
            committed |= commit_by_entropy_bound(_scatter(entropies, masked, torch.inf), masked, config.entropy_bound)
        return committed

    def _tell(self, block, rows, masked, prediction: Prediction, committed: torch.BoolTensor):
        """Calls the listeners, with the rows in the order of the batch."""
        order = rows.argsort()
        rows, masked, committed, tokens, confidence = (
            tensor[order]
            for tensor in (
                rows,
                masked,
                committed,
                _scatter(prediction.tokens, masked, 0),
                _scatter(prediction.probability, masked, torch.nan),
            )
        )
        canvas_tokens = self.canvas.tokens[rows]
        proposals = torch.where(masked, tokens, canvas_tokens[:, block.start : block.end])
        step = DenoisingStep(rows, block.start, block.end, canvas_tokens, proposals, committed, confidence)
        for listener in self.listeners:
            listener(step)


def _scatter(values: torch.Tensor, masked: torch.BoolTensor, fill: float) -> torch.Tensor:
    """Spreads values (M,) over the True positions of `masked` (R, W), `fill` elsewhere."""
    return torch.full(masked.shape, fill, dtype=values.dtype, device=values.device).masked_scatter(masked, values)
