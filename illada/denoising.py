"""One denoising step of rows with the same settings: propose a token for every mask, and decide which to commit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers.generation import LogitsProcessorList

from .canvas import ActiveBlocks
from .commit_rules import CommitRule, Decision
from .end_of_thinking import EndOfThinkingBoost
from .generation_config import MaskedDiffusionGenerationConfig
from .logits import forbid_mask
from .step import Prediction, Step


@dataclass
class DenoisingStep:
    """What a step did to one text, as `on_step` receives it; on the host. Columns count the text's own tokens.

    Each pass is a step. With `num_drafts` further steps follow from the same pass, where its guesses were right: they
    have the same `num_forward_passes`.

    Attributes:
        row (`int`): index of the text in the batch.
        columns (`torch.LongTensor` of shape `(N,)`): the positions of the active block.
        tokens (`torch.LongTensor` of shape `(S,)`): the text after the step, [MASK] where nothing is decided.
        proposals (`torch.LongTensor` of shape `(N,)`): the block, with this step's predictions where it was masked.
        committed (`torch.BoolTensor` of shape `(N,)`): the positions that the step committed.
        confidence (`torch.FloatTensor` of shape `(N,)`): probability of each prediction; NaN where there was none.
        num_forward_passes (`int`): passes in which the text has taken part, this one included.
        remasked (`torch.BoolTensor` of shape `(N,)`): the positions that the step masked again.
    """

    row: int
    columns: torch.LongTensor
    tokens: torch.LongTensor
    proposals: torch.LongTensor
    committed: torch.BoolTensor
    confidence: torch.FloatTensor
    num_forward_passes: int
    remasked: torch.BoolTensor


@dataclass(eq=False)
class Denoiser:
    """The settings of a request, with what the loop makes of them once.

    Args:
        config ([`MaskedDiffusionGenerationConfig`]): with every field set that the loop reads.
        rule ([`CommitRule`]), ranking (`Callable`): which proposals are committed.
        processors (`LogitsProcessorList`): applied before confidence is taken.
        warpers (`LogitsProcessorList`): applied to sample, and not seen by confidence.
        boost ([`EndOfThinkingBoost`], *optional*).
        device (`torch.device`), dtype (`torch.dtype`): the model's.
    """

    config: MaskedDiffusionGenerationConfig
    rule: CommitRule
    ranking: Callable[[Step], torch.Tensor]
    processors: LogitsProcessorList
    warpers: LogitsProcessorList
    boost: EndOfThinkingBoost | None
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def eos_token_ids(self) -> torch.LongTensor:
        return torch.tensor(self.config.eos_token_ids, dtype=torch.long)

    @property
    def is_random(self) -> bool:
        """Whether a source of noise is needed."""
        return bool(self.config.do_sample) or self.config.remasking == "random"

    @property
    def reads_texts(self) -> bool:
        """Whether there are processors, which must see a row's text as it is without its neighbours."""
        return bool(self.processors or self.warpers)

    def __call__(
        self,
        blocks: ActiveBlocks,
        predicted: torch.BoolTensor,
        logits: torch.Tensor,
        rule: CommitRule,
        requests: Sequence,
    ) -> torch.Tensor:
        """Decides for the rows of `blocks`, each with its request, from the logits of `predicted` (R, W) positions.

        Returns:
            `torch.IntTensor` of shape `(6, R, W)` on the model's device: tokens, the bits of their probabilities in
            fp32, which to commit, which to mask again, which of those committed have more entropy than
            `cache_refresh_entropy`, and with `num_drafts` the places in the order of the ranking.
        """
        counts = predicted.sum(-1).tolist()
        places, columns = predicted.nonzero(as_tuple=True)
        texts = self._texts(blocks, places) if self.reads_texts else None
        logits = self._process(blocks, predicted, texts, logits, requests)
        logits = rule.adjust(logits, columns.to(self.device, non_blocking=True))
        generators = [request.generator for request in requests]
        tokens = self._propose(texts, counts, logits, generators)
        masked = blocks.masked
        if rule.may_remask:
            standing = blocks.tokens[places, columns].to(self.device)
            tokens = torch.where(masked[places, columns].to(self.device), tokens, standing)

        def noise() -> torch.Tensor:
            if self.config.num_candidates > 1:
                drafts = self.config.num_drafts
                raise ValueError(f"`num_drafts` must be unset with a rule or ranking that draws noise, got {drafts}.")
            device = self.device
            return torch.cat([torch.rand(n, generator=g, device=device) for n, g in zip(counts, generators)])

        step = Step(
            Prediction(logits, tokens),
            *(tensor.to(self.device, non_blocking=True) for tensor in (blocks.columns, masked, predicted)),
            quota=torch.tensor([row.quota() for row in blocks.rows], device=self.device),
            noise=noise,
            deferred_token_ids=self.eos_token_ids.to(self.device) if self.config.defer_eos else None,
            read_canvas=lambda: blocks.texts.to(self.device),
        )
        step.rank(self.ranking)
        decision = _checked(rule(step), rule, step)
        commit = decision.commit & step.masked
        commit |= step.best_ranked((~commit.any(-1)).long())  # no pass without progress
        remask = torch.zeros_like(commit)
        if decision.remask is not None:
            remask = decision.remask & step.predicted & ~step.masked
            remask &= (blocks.num_remasks < rule.max_remasks).to(self.device)
        uncertain = torch.zeros_like(commit)
        if self.config.cache_refresh_entropy is not None:
            uncertain = commit & (step.spread(step.prediction.entropy, 0.0) > self.config.cache_refresh_entropy)
        ranks = step.ranks if self.config.num_candidates > 1 else uncertain
        probability = step.probability.float().view(torch.int32)
        return torch.stack([step.tokens.int(), probability, commit.int(), remask.int(), uncertain.int(), ranks.int()])

    def _texts(self, blocks: ActiveBlocks, places: torch.LongTensor) -> torch.LongTensor:
        """(M, S): for each predicted position the text that it stands in."""
        return blocks.texts[places].to(self.device)

    def _process(self, blocks, predicted, texts, logits, requests) -> torch.Tensor:
        """The logits that confidence is taken from; [MASK] itself is never a prediction."""
        if self.processors:
            logits = self.processors(texts, logits)
        if self.boost is not None or any(request.min_new_tokens for request in requests):
            self._adjust(blocks, predicted, logits, requests)
        return forbid_mask(logits, blocks.canvas.mask_token_id)

    def _adjust(self, blocks: ActiveBlocks, predicted: torch.BoolTensor, logits: torch.Tensor, requests: Sequence):
        """Applies in place what depends on where a position is: the least length, and the end-of-thinking boost."""
        early, boosted, start = [], [], 0
        for line, (row, request) in enumerate(zip(blocks.rows, requests)):
            columns = blocks.columns[line, predicted[line]].tolist()
            first_eos = row.prompt_length + request.min_new_tokens
            early += [start + i for i, column in enumerate(columns) if row.prompt_length <= column < first_eos]
            if self.boost is not None:
                first = int(blocks.columns[line, blocks.masked[line]][0])
                raised = self.boost(blocks.canvas.text(row), first, row.prompt_length, request.max_new_tokens)
                boosted += [] if raised is None else [(start + columns.index(first), *raised)]
            start += len(columns)
        if early:
            logits[
                torch.tensor(early, device=self.device).unsqueeze(-1), self.eos_token_ids.to(self.device)
            ] = -torch.inf
        if boosted:
            index, token_ids, amounts = (torch.tensor(values, device=self.device) for values in zip(*boosted))
            logits[index, token_ids] += amounts.to(logits.dtype)

    def _propose(self, texts, counts, logits, generators) -> torch.LongTensor:
        """A token (M,) for every predicted position: the likeliest, or a sample by each row's own noise."""
        if not self.config.do_sample:
            return logits.argmax(-1)
        if self.warpers:
            logits = self.warpers(texts, logits)
        # An exponential race: the token with the least E_v / p_v, E_v ~ Exp(1), has the probability p_v.
        probabilities = logits.softmax(-1)
        noise = torch.empty_like(probabilities)
        for part, generator in zip(noise.split(counts), generators):
            part.exponential_(generator=generator)
        return (probabilities / noise).argmax(-1)


def _checked(decision: Decision, rule: CommitRule, step: Step) -> Decision:
    """The decision of a rule, which may be a user's own.

    Raises:
        ValueError: names what the rule must return.
    """
    name = type(rule).__name__
    if not isinstance(decision, Decision):
        raise ValueError(f"`{name}` must return a `Decision`, got {decision!r:.100}.")
    for field, answer in (("commit", decision.commit), ("remask", decision.remask)):
        is_mask = isinstance(answer, torch.Tensor) and answer.dtype == torch.bool and answer.shape == step.masked.shape
        if not is_mask and not (field == "remask" and answer is None):
            kind = f"{answer.dtype} {tuple(answer.shape)}" if isinstance(answer, torch.Tensor) else repr(answer)
            raise ValueError(f"`{name}` must return a bool `{field}` of shape {tuple(step.masked.shape)}, got {kind}.")
    if decision.remask is not None and not rule.may_remask:
        raise ValueError(f"`{name}` must have `may_remask = True` to return a `remask`.")
    return decision
