"""Remasking: which masked positions are committed in a denoising step.

A step proposes a token for every masked position of the active block. A *ranking* says how sure the model is of each
proposal; a *rule* says which of them are committed. What is not committed stays masked, and is predicted again in the
next step with more context. Everything here is a pure function of tensors.

Rankings see a [`Prediction`], which has one row per masked position. Rules see dense tensors (B, W) over
the columns of a block, where `masked` marks the positions that are still to be decided, and return a boolean (B, W),
a subset of `masked`. Of equal scores the lower position goes first.
"""

from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F


class Prediction:
    """What the model says of M masked positions; what follows from it is computed when asked for, and once.

    Args:
        logits (`torch.FloatTensor` of shape `(M, V)`): at least fp32.
        tokens (`torch.LongTensor` of shape `(M,)`): the proposals.
    """

    def __init__(self, logits: torch.Tensor, tokens: torch.LongTensor):
        self.logits, self.tokens = logits, tokens

    @cached_property
    def log_normalizer(self) -> torch.Tensor:
        """`log sum_v exp(logit_v)`, of shape (M,): probabilities follow from it without a softmax of all tokens."""
        return self.logits.logsumexp(-1)

    @cached_property
    def probability(self) -> torch.Tensor:
        """Probability of the proposed token, `softmax(logits)[token]`, of shape (M,) and in [0, 1]."""
        chosen = self.logits.gather(-1, self.tokens.unsqueeze(-1)).squeeze(-1)
        return (chosen - self.log_normalizer).exp()

    @cached_property
    def margin(self) -> torch.Tensor:
        """Probability of the likeliest token minus that of the second, of shape (M,)."""
        best_two = (self.logits.topk(2, dim=-1).values - self.log_normalizer.unsqueeze(-1)).exp()
        return best_two[:, 0] - best_two[:, 1]

    @cached_property
    def entropy(self) -> torch.Tensor:
        """Entropy in nats, of shape (M,)."""
        return entropy(self.logits)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of each prediction in nats, `-sum_v p_v log p_v`, of shape (M,); a logit of -inf counts nothing."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def rank_by_low_confidence(prediction: Prediction, generator: torch.Generator | None) -> torch.Tensor:
    """LLaDA's low-confidence remasking (arXiv 2502.09992): the least probable proposals stay masked."""
    return prediction.probability


def rank_at_random(prediction: Prediction, generator: torch.Generator | None) -> torch.Tensor:
    """LLaDA's random remasking, the literal reverse process: every masked position has the same chance."""
    return torch.rand(prediction.tokens.shape, generator=generator, device=prediction.tokens.device)


def rank_by_margin(prediction: Prediction, generator: torch.Generator | None) -> torch.Tensor:
    """Probability of the likeliest token minus that of the second (Dream, arXiv 2508.15487: `topk_margin`)."""
    return prediction.margin


def rank_by_entropy(prediction: Prediction, generator: torch.Generator | None) -> torch.Tensor:
    """Negative entropy of the prediction: the narrowest distribution goes first (Dream: `entropy`)."""
    return -prediction.entropy


RANKINGS: dict[str, Callable[[Prediction, torch.Generator | None], torch.Tensor]] = {
    "low_confidence": rank_by_low_confidence,
    "random": rank_at_random,
    "margin": rank_by_margin,
    "entropy": rank_by_entropy,
}
"""What `remasking` may name: functions of a prediction and the source of noise that return scores (M,)."""


def commit_quotas(num_masked: torch.LongTensor, num_steps: int) -> torch.LongTensor:
    """How many positions each step commits, the remainder first: `N // S + (i < N mod S)` for step i.

    Args:
        num_masked (`torch.LongTensor` of shape `(B,)`): masks of each row's block, `N`.
        num_steps (`int`): `S`.

    Returns:
        `torch.LongTensor` of shape `(B, S)`, whose rows add up to `num_masked`.
    """
    steps = torch.arange(num_steps, device=num_masked.device)
    num_masked = num_masked.unsqueeze(-1)
    return num_masked // num_steps + (steps < num_masked % num_steps)


def _order(scores: torch.Tensor, masked: torch.BoolTensor) -> torch.LongTensor:
    """Columns of each row by falling score; those that are not masked come last."""
    return scores.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)


def _take_first(order: torch.LongTensor, counts: torch.LongTensor, masked: torch.BoolTensor) -> torch.BoolTensor:
    """Marks the first `counts` (B, 1) columns of each row's `order`."""
    taken = torch.arange(order.shape[-1], device=order.device) < counts
    return torch.zeros_like(masked).scatter(-1, order, taken) & masked


def commit_by_quota(scores: torch.Tensor, masked: torch.BoolTensor, quota: torch.LongTensor) -> torch.BoolTensor:
    """Commits the `quota` (B,) best-ranked positions of each row: the published rule (arXiv 2502.09992)."""
    return _take_first(_order(scores, masked), quota.unsqueeze(-1), masked)


def commit_by_threshold(confidence: torch.Tensor, masked: torch.BoolTensor, threshold: float) -> torch.BoolTensor:
    """Commits every position whose confidence is at least `threshold` (Fast-dLLM, arXiv 2505.22618)."""
    return masked & (confidence >= threshold)


def commit_by_factor(confidence: torch.Tensor, masked: torch.BoolTensor, factor: float) -> torch.BoolTensor:
    """Commits the n surest positions, with the largest n that Fast-dLLM's bound calls safe to decode together.

    With `c_(n)` the n-th highest confidence, n is the largest with `(n + 1) (1 - c_(n)) < factor` (arXiv 2505.22618).
    """
    order = _order(confidence, masked)
    doubt = 1 - confidence.gather(-1, order)
    n = torch.arange(1, order.shape[-1] + 1, device=order.device)
    safe = ((n + 1) * doubt < factor) & masked.gather(-1, order)
    return _take_first(order, (safe * n).amax(-1, keepdim=True), masked)


def commit_by_entropy_bound(entropies: torch.Tensor, masked: torch.BoolTensor, bound: float) -> torch.BoolTensor:
    """Commits positions in ascending entropy while the entropies before each add up to at most `bound` nats.

    The sum without the largest bounds the mutual information between the committed tokens, that is, what sampling them
    independently can lose (EB-Sampler, arXiv 2505.24857).
    """
    order = _order(-entropies, masked)
    ascending = entropies.gather(-1, order).masked_fill(~masked.gather(-1, order), 0)
    before = F.pad(ascending.cumsum(-1)[:, :-1], (1, 0))
    within = before <= bound
    return _take_first(order, within.sum(-1, keepdim=True), masked)
