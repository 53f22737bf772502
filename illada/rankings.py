"""Rankings: which of a block's proposals are committed first.

A ranking is a function of a [`Step`] that returns a score for each position, (R, W); the highest goes first, and of
equal scores the lower position. Only masked positions count.
"""

from collections.abc import Callable

import torch

from .step import Step

__all__ = ["RANKINGS", "at_random", "by_entropy", "by_low_confidence", "by_margin"]


def by_low_confidence(step: Step) -> torch.Tensor:
    """LLaDA's low-confidence remasking (arXiv 2502.09992): the least probable proposals stay masked."""
    return step.probability


def at_random(step: Step) -> torch.Tensor:
    """LLaDA's random remasking, the literal reverse process: every masked position has the same chance."""
    return step.uniform_noise()


def by_margin(step: Step) -> torch.Tensor:
    """Probability of the likeliest token minus that of the second (Dream, arXiv 2508.15487: `topk_margin`)."""
    return step.margin


def by_entropy(step: Step) -> torch.Tensor:
    """Negative entropy of the prediction: the narrowest distribution goes first (Dream: `entropy`)."""
    return -step.entropy


RANKINGS: dict[str, Callable[[Step], torch.Tensor]] = {
    "low_confidence": by_low_confidence,
    "random": at_random,
    "margin": by_margin,
    "entropy": by_entropy,
}
"""What the setting `remasking` may name."""
