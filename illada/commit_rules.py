"""Commit rules: which proposals of a pass are committed, and which committed tokens are masked again.

A rule is an object. At the start of each block `begin` is called, and after each pass the rule itself, with a
[`Step`]. It answers with a [`Decision`]; what it leaves out stays masked and is predicted again with more context.
The loop adds what no rule may break: only masked positions are committed, every pass commits at least one position of
each row, and a position that was masked again [`MAX_REMASKS`] times stays as it is.

A rule of your own is handed to `generate(commit_rule=...)`, or registered in [`COMMIT_RULES`] under a name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F

from .step import Step, take_first

if TYPE_CHECKING:
    from .generation_config import MaskedDiffusionGenerationConfig

__all__ = [
    "COMMIT_RULES",
    "CommitRule",
    "ConfidenceFactor",
    "ConfidenceThreshold",
    "Decision",
    "EntropyBound",
    "FrechetMargin",
    "MAX_REMASKS",
    "Quota",
]

MAX_REMASKS = 3
"""How often a position of a block may be masked again: with it every block comes to an end."""


@dataclass(frozen=True)
class Decision:
    """What a rule decides in one pass.

    Attributes:
        commit (`torch.BoolTensor` of shape `(R, W)`): the proposals to commit.
        remask (`torch.BoolTensor` of shape `(R, W)`, *optional*): committed positions of the block to mask again.
    """

    commit: torch.BoolTensor
    remask: torch.BoolTensor | None = None


class CommitRule:
    """Base class of all rules.

    Attributes:
        has_memory (`bool`): each row gets a copy of the rule to itself, so that what it remembers is the row's, and R
            is always 1. Without, one rule decides for all rows with its settings, and must be a pure function.
        may_remask (`bool`): the rule may mask again. Its steps have predictions at the block's committed positions
            too, and its rows end at the end of a block.
    """

    has_memory: ClassVar[bool] = False
    may_remask: ClassVar[bool] = False

    def begin(self, num_positions: int):
        """A block of `num_positions` masks opens. Only called on rules with a memory."""

    def __call__(self, step: Step) -> Decision:
        raise NotImplementedError


@dataclass(frozen=True)
class Quota(CommitRule):
    """The published rule (arXiv 2502.09992): each pass commits the quota of the highest-ranked positions."""

    def __call__(self, step: Step) -> Decision:
        return Decision(step.best_ranked(step.quota))


@dataclass(frozen=True)
class ConfidenceThreshold(CommitRule):
    """The quota, and every position whose confidence is at least `threshold` (Fast-dLLM, arXiv 2505.22618)."""

    threshold: float

    def __call__(self, step: Step) -> Decision:
        return Decision(step.best_ranked(step.quota) | (step.confidence >= self.threshold))


@dataclass(frozen=True)
class ConfidenceFactor(CommitRule):
    """The quota, and the most confident positions that Fast-dLLM's bound calls safe to decode together.

    With `c_(n)` the n-th highest confidence, the largest n with `(n + 1) (1 - c_(n)) < factor` (arXiv 2505.22618).
    """

    factor: float

    def __call__(self, step: Step) -> Decision:
        confidence = step.confidence.masked_fill(~step.masked, -torch.inf)
        descending, order = confidence.sort(dim=-1, descending=True, stable=True)
        n = torch.arange(1, order.shape[-1] + 1, device=order.device)
        is_safe = ((n + 1) * (1 - descending) < self.factor) & descending.isfinite()
        return Decision(step.best_ranked(step.quota) | take_first(order, (is_safe * n).amax(-1)))


@dataclass(frozen=True)
class EntropyBound(CommitRule):
    """The quota, and positions in ascending entropy while the entropies before each add up to at most `bound` nats.

    The sum without the largest bounds the mutual information between the committed tokens, that is, what sampling them
    independently can lose (EB-Sampler, arXiv 2505.24857).
    """

    bound: float

    def __call__(self, step: Step) -> Decision:
        ascending, order = step.entropy.masked_fill(~step.masked, torch.inf).sort(dim=-1, stable=True)
        ascending = ascending.masked_fill(~step.masked.gather(-1, order), 0)
        before = F.pad(ascending.cumsum(-1)[:, :-1], (1, 0))
        within = (before <= self.bound).sum(-1)
        return Decision(step.best_ranked(step.quota) | take_first(order, within))


@dataclass(frozen=True)
class FrechetMargin(CommitRule):
    """The quota, and the most confident positions whose tokens are together likelier than any others, by a margin.

    With `c_(j)` the j-th highest confidence, the largest n with
    `c_(1) + ... + c_(n) - (n - 1) - (1 - c_(n)) > margin` (Fast-dLLM++, arXiv 2606.02955). The first two terms are
    Fréchet's lower bound on the probability that all n proposals are right, whatever their dependence; the last bounds
    that of every other choice: if the left side is positive, the proposals are the arg-max of the joint distribution.
    Of n equal confidences this is [`ConfidenceFactor`] with `factor = 1 - margin`.
    """

    margin: float

    def __call__(self, step: Step) -> Decision:
        confidence = step.confidence.masked_fill(~step.masked, -torch.inf)
        descending, order = confidence.sort(dim=-1, descending=True, stable=True)
        # The left side is 1 minus the doubts 1 - c_(j), the last of them counted twice, and falls with n.
        doubts = 1 - descending
        is_within = 1 - doubts.cumsum(-1) - doubts > self.margin
        return Decision(step.best_ranked(step.quota) | take_first(order, is_within.sum(-1)))


COMMIT_RULES: dict[str, Callable[..., CommitRule]] = {
    "quota": Quota,
    "confidence_threshold": ConfidenceThreshold,
    "confidence_factor": ConfidenceFactor,
    "entropy_bound": EntropyBound,
    "frechet_margin": FrechetMargin,
}
"""Rules by name. One that is also a setting takes the setting's value; `commit_rule="name"` takes none."""

PARALLEL_RULES = ("confidence_threshold", "confidence_factor", "entropy_bound", "frechet_margin")
"""Settings that name a rule by its parameter. At most one of these and `commit_rule` is set."""


def rule_of(config: "MaskedDiffusionGenerationConfig") -> CommitRule:
    """The rule that the settings ask for."""
    for name in PARALLEL_RULES:
        if getattr(config, name) is not None:
            return COMMIT_RULES[name](getattr(config, name))
    if isinstance(config.commit_rule, CommitRule):
        return config.commit_rule
    return COMMIT_RULES[config.commit_rule or "quota"]()


def quota_of(num_masked: int, num_steps: int, step: int) -> int:
    """Positions that step 0, 1, 2 ... of a block commits: `N // S`, and one more in each of the first `N mod S` steps.

    Beyond the S steps, which only a rule that masks again needs, it is one.
    """
    if step >= num_steps:
        return 1
    return num_masked // num_steps + (step < num_masked % num_steps)
