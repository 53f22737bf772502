"""What a pass of the model says of the blocks that are being decoded: all that a ranking or a commit rule may read.

A step has one line for each of R rows of text with the same settings. A line has W columns, one for each position of
the row's active block, in rising order; where a block has fewer positions than the widest, the rest is empty. Tensors
are of shape (R, W) unless they say otherwise, and on the model's device: reading one on the host costs a wait.
"""

from collections.abc import Callable
from functools import cached_property

import torch

from .logits import log_probability

__all__ = ["Prediction", "Step"]


class Prediction:
    """The distributions at M positions; what follows from their logits is computed when asked for, and once.

    Args:
        logits (`torch.FloatTensor` of shape `(M, V)`): at least fp32.
        tokens (`torch.LongTensor` of shape `(M,)`): the proposed tokens.
    """

    def __init__(self, logits: torch.Tensor, tokens: torch.LongTensor):
        self.logits, self.tokens = logits, tokens

    @cached_property
    def probability(self) -> torch.Tensor:
        """Probability of the proposed token, `softmax(logits)[token]`, of shape (M,) and in [0, 1]."""
        return log_probability(self.logits, self.tokens).exp()

    @cached_property
    def margin(self) -> torch.Tensor:
        """Probability of the likeliest token minus that of the second, of shape (M,)."""
        best_two = (self.logits.topk(2, dim=-1).values - self.logits.logsumexp(-1, keepdim=True)).exp()
        return best_two[:, 0] - best_two[:, 1]

    @cached_property
    def entropy(self) -> torch.Tensor:
        """Entropy in nats, `-sum_v p_v log p_v`, of shape (M,); a logit of -inf adds nothing."""
        return torch.special.entr(self.logits.softmax(-1)).sum(-1)


class Step:
    """One pass, as rankings and commit rules see it.

    Attributes:
        positions (`torch.LongTensor`): where in its text each position of the block is; 0 in empty columns.
        masked (`torch.BoolTensor`): positions that are still to be decided.
        predicted (`torch.BoolTensor`): positions with a prediction: the masked ones; for a rule that may mask again,
            the committed ones of the block too, by shadow columns if the rule has them.
        prediction ([`Prediction`]): of the M predicted positions, row by row.
        quota (`torch.LongTensor` of shape `(R,)`): how many positions the schedule commits in this pass.
        deferred (`torch.BoolTensor` or `None`): proposals that wait for all others of their block (`defer_eos`).
        scores (`torch.FloatTensor`): the ranking's; the highest is committed first. -inf where not masked.
    """

    scores: torch.Tensor

    def __init__(
        self,
        prediction: Prediction,
        positions: torch.LongTensor,
        masked: torch.BoolTensor,
        predicted: torch.BoolTensor,
        quota: torch.LongTensor,
        noise: Callable[[], torch.Tensor] | None = None,
        deferred_token_ids: torch.LongTensor | None = None,
        read_canvas: Callable[[], torch.LongTensor] | None = None,
    ):
        self.prediction, self.positions, self.masked, self.predicted = prediction, positions, masked, predicted
        self.quota, self._noise, self._read_canvas = quota, noise, read_canvas
        self.deferred = None
        if deferred_token_ids is not None:
            self.deferred = self.spread(torch.isin(prediction.tokens, deferred_token_ids), False) & masked

    def spread(self, values: torch.Tensor, fill: float) -> torch.Tensor:
        """Values (M,) of the predicted positions as (R, W), `fill` elsewhere."""
        dense = torch.full(self.predicted.shape, fill, dtype=values.dtype, device=values.device)
        return dense.masked_scatter(self.predicted, values)

    @cached_property
    def tokens(self) -> torch.LongTensor:
        """The proposed tokens; at committed positions of a rule that may mask again, those that stand there."""
        return self.spread(self.prediction.tokens, 0)

    @cached_property
    def probability(self) -> torch.Tensor:
        """Probability of each of `tokens`, 0 where there is no prediction."""
        return self.spread(self.prediction.probability, 0.0)

    @cached_property
    def confidence(self) -> torch.Tensor:
        """`probability`, but 0 for deferred proposals: what a commit rule goes by."""
        return self.probability if self.deferred is None else self.probability.masked_fill(self.deferred, 0.0)

    @cached_property
    def margin(self) -> torch.Tensor:
        """Probability of the likeliest token minus that of the second, 0 where there is no prediction."""
        return self.spread(self.prediction.margin, 0.0)

    @cached_property
    def entropy(self) -> torch.Tensor:
        """Entropy in nats; infinite for deferred proposals and where there is no prediction."""
        entropy = self.spread(self.prediction.entropy, torch.inf)
        return entropy if self.deferred is None else entropy.masked_fill(self.deferred, torch.inf)

    @cached_property
    def canvas(self) -> torch.LongTensor:
        """The texts (R, S), [MASK] where nothing is decided and after a row's end."""
        return self._read_canvas()

    def uniform_noise(self) -> torch.Tensor:
        """Uniform numbers in [0, 1), each row's from its own source of noise."""
        return self.spread(self._noise(), 0.0)

    def rank(self, ranking: Callable[["Step"], torch.Tensor]):
        """Sets `scores` from a ranking; a deferred proposal comes after all others."""
        scores = ranking(self)
        if self.deferred is not None:
            scores = scores.masked_fill(self.deferred, torch.finfo(scores.dtype).min)
        self.scores = scores.masked_fill(~self.masked, -torch.inf)

    def best_ranked(self, counts: torch.LongTensor) -> torch.BoolTensor:
        """Marks the `counts` (R,) masked positions of each row with the highest scores; ties go to the lower."""
        return take_first(self._order, counts) & self.masked

    @cached_property
    def ranks(self) -> torch.LongTensor:
        """The place of each position in the order of the scores, 0 for the highest."""
        return self._order.argsort(-1)

    @cached_property
    def _order(self) -> torch.LongTensor:
        return self.scores.argsort(dim=-1, descending=True, stable=True)


def take_first(order: torch.LongTensor, counts: torch.LongTensor) -> torch.BoolTensor:
    """Marks the first `counts` (R,) columns of each row's `order` (R, W)."""
    taken = torch.arange(order.shape[-1], device=order.device) < counts.unsqueeze(-1)
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, taken)
