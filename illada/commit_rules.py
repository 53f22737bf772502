"""Commit rules: which proposals of a pass are committed, and which committed tokens are masked again.

A rule is an object. At the start of each block `begin` is called, and after each pass the rule itself, with a
[`Step`]. It answers with a [`Decision`]; what it leaves out stays masked and is predicted again with more context.
The loop adds what no rule may break: only masked positions are committed, every pass commits at least one position of
each row, and a position that was masked again `max_remasks` times stays as it is.

A rule of your own is handed to `generate(commit_rule=...)`, or registered in [`COMMIT_RULES`] under a name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F

from .field_checks import check_integer, check_number
from .step import Step, take_first

if TYPE_CHECKING:
    from .generation_config import MaskedDiffusionGenerationConfig

__all__ = [
    "COMMIT_RULES",
    "CommitRule",
    "ConfidenceFactor",
    "ConfidenceThreshold",
    "CreditDecoding",
    "Decision",
    "EntropyBound",
    "FrechetMargin",
    "KLASS",
    "LocalLeap",
    "MAX_REMASKS",
    "Quota",
    "T2M",
    "WINO",
]

MAX_REMASKS = 3
"""How often a position of a block may be masked again, unless a rule says otherwise."""


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
            too, and its rows end at an EOS once a pass has left all up to it as it is.
        has_shadows (`bool`): those predictions are of *shadow columns*: each is a [MASK] at the committed position,
            which sees all of the text but that position, and which nothing else sees. Without, they are of the
            committed token's own column, which has the token in view.
        max_remasks (`int`): how often a position may be masked again. A block of N masks thus takes at most
            `N (1 + max_remasks)` passes.
    """

    has_memory: ClassVar[bool] = False
    may_remask: ClassVar[bool] = False
    has_shadows: ClassVar[bool] = False
    max_remasks: ClassVar[int] = MAX_REMASKS

    def begin(self, num_positions: int):
        """A block of `num_positions` masks opens. Only called on rules with a memory."""

    def adjust(self, logits: torch.Tensor, columns: torch.LongTensor) -> torch.Tensor:
        """Logits (M, V) to propose from and to take confidence from, instead of those of a pass; here, the same.

        `columns` (M,) are those of the block in which the positions are.
        """
        return logits

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


@dataclass
class KLASS(CommitRule):
    """What is confident and has not moved: `c >= confidence` and `KL(p_t || p_(t-1)) < divergence` in the last passes.

    If that holds for no position, the quota (arXiv 2511.05664). A position without so many passes before has moved.

    Args:
        confidence (`float`), divergence (`float`, in nats): the bounds.
        history (`int`): how many passes in a row must stay below `divergence`.
    """

    has_memory: ClassVar[bool] = True
    confidence: float = 0.9
    divergence: float = 0.01
    history: int = 2

    def __post_init__(self):
        _check_share(self, "confidence")
        check_number("KLASS.divergence", self.divergence, "of at least 0", lambda value: value >= 0)
        check_integer("KLASS.history", self.history, minimum=1)

    def begin(self, num_positions: int):
        self._previous, self._num_still = None, 0

    def __call__(self, step: Step) -> Decision:
        probabilities = step.prediction.logits.softmax(-1)
        now = probabilities.new_zeros(*step.predicted.shape, probabilities.shape[-1])
        now = now.masked_scatter(step.predicted.unsqueeze(-1), probabilities)
        is_still = torch.zeros_like(step.masked)
        if self._previous is not None:
            is_still = (torch.xlogy(now, now) - torch.xlogy(now, self._previous)).sum(-1) < self.divergence
        self._previous, self._num_still = now, (self._num_still + 1) * is_still
        is_ready = step.masked & (step.confidence >= self.confidence) & (self._num_still >= self.history)
        return Decision(is_ready | step.best_ranked(step.quota.masked_fill(is_ready.any(-1), 0)))


@dataclass(frozen=True)
class LocalLeap(CommitRule):
    """The quota, anchors with `c >= anchor`, and what is within `radius` of an anchor with `c >= nearby`.

    The context of a confident token makes its neighbours reliable sooner (arXiv 2510.07081, whose bounds these are).
    `radius` counts positions of the text.
    """

    anchor: float = 0.9
    nearby: float = 0.75
    radius: int = 4

    def __post_init__(self):
        _check_share(self, "anchor", "nearby")
        check_integer("LocalLeap.radius", self.radius, minimum=0)

    def __call__(self, step: Step) -> Decision:
        anchors = step.masked & (step.confidence >= self.anchor)
        is_near = (step.positions.unsqueeze(-1) - step.positions.unsqueeze(-2)).abs() <= self.radius
        has_anchor = (is_near & anchors.unsqueeze(-2)).any(-1)
        return Decision(step.best_ranked(step.quota) | anchors | has_anchor & (step.confidence >= self.nearby))


@dataclass
class CreditDecoding(CommitRule):
    """The quota, and every position whose confidence is at least `threshold`, with credit for earlier predictions.

    In each pass `C <- beta C`, then `C[v] += p(v) ** gamma` for the likeliest token v of each position; tokens and
    confidence are those of `logits + alpha log(1 + C)`. What was the likeliest token in many passes is committed
    sooner (arXiv 2510.06133, with its parameters). Credit begins with each block; `commit_confidences` include it.
    """

    has_memory: ClassVar[bool] = True
    threshold: float = 0.9
    alpha: float = 0.7
    beta: float = 0.8
    gamma: float = 0.2

    def __post_init__(self):
        _check_share(self, "threshold", "beta")
        for name in ("alpha", "gamma"):
            check_number(f"CreditDecoding.{name}", getattr(self, name), "of at least 0", lambda value: value >= 0)

    def begin(self, num_positions: int):
        self._num_positions, self._credit = num_positions, None

    def adjust(self, logits: torch.Tensor, columns: torch.LongTensor) -> torch.Tensor:
        if self._credit is None:
            self._credit = logits.new_zeros(self._num_positions, logits.shape[-1])
        best, token = logits.softmax(-1).max(-1)
        self._credit *= self.beta
        self._credit[columns, token] += best**self.gamma
        return logits + self.alpha * self._credit[columns].log1p()

    def __call__(self, step: Step) -> Decision:
        return Decision(step.best_ranked(step.quota) | (step.confidence >= self.threshold))


@dataclass(frozen=True)
class T2M(CommitRule):
    """The quota and `c >= threshold`; a committed token is masked again where all else makes it improbable.

    "Token to mask" (arXiv 2604.18738, 2605.26436): a token is masked again, and not replaced, where its probability is
    below `bound`, at most `max_remasks` times a position. The published probability is that of the token's own column,
    from a model that was trained to judge the tokens in view; here it is that of a shadow column, since iLLaDA and
    LLaDA were trained on masked positions only.
    """

    may_remask: ClassVar[bool] = True
    has_shadows: ClassVar[bool] = True
    threshold: float = 0.9
    bound: float = 0.1
    max_remasks: int = MAX_REMASKS

    def __post_init__(self):
        _check_share(self, "threshold", "bound")
        check_integer("T2M.max_remasks", self.max_remasks, minimum=0)

    def __call__(self, step: Step) -> Decision:
        commit = step.best_ranked(step.quota) | (step.confidence >= self.threshold)
        return Decision(commit, remask=step.probability < self.bound)


@dataclass
class WINO(CommitRule):
    """Wide in, narrow out: drafts the quota and `c > draft`, and masks again what is not verified by `p >= verify`.

    `p` is the probability of a committed token of the block in its shadow column (arXiv 2507.18578, with its bounds).
    A pass masks again at most one position fewer than the last pass committed, the least probable first, so that a
    block never takes more passes than one token at a time. Here a shadow column sees no other one, in the published
    code all of them.
    """

    has_memory: ClassVar[bool] = True
    may_remask: ClassVar[bool] = True
    has_shadows: ClassVar[bool] = True
    draft: float = 0.6
    verify: float = 0.9

    def __post_init__(self):
        _check_share(self, "draft", "verify")

    def begin(self, num_positions: int):
        self._num_committed = None

    def __call__(self, step: Step) -> Decision:
        commit = step.best_ranked(step.quota) | step.masked & (step.confidence > self.draft)
        is_doubtful = step.predicted & ~step.masked & (step.probability < self.verify)
        if self._num_committed is None:
            self._num_committed = torch.zeros_like(step.quota)
        least_probable = step.probability.masked_fill(~is_doubtful, torch.inf).argsort(dim=-1, stable=True)
        remask = is_doubtful & take_first(least_probable, self._num_committed - 1)
        self._num_committed = commit.sum(-1)
        return Decision(commit, remask)


def _check_share(rule: CommitRule, *names: str):
    for name in names:
        value = getattr(rule, name)
        check_number(f"{type(rule).__name__}.{name}", value, "in [0, 1]", lambda value: 0 <= value <= 1)


COMMIT_RULES: dict[str, Callable[..., CommitRule]] = {
    "quota": Quota,
    "confidence_threshold": ConfidenceThreshold,
    "confidence_factor": ConfidenceFactor,
    "entropy_bound": EntropyBound,
    "frechet_margin": FrechetMargin,
    "klass": KLASS,
    "local_leap": LocalLeap,
    "credit_decoding": CreditDecoding,
    "t2m": T2M,
    "wino": WINO,
}
"""Rules by name. One that is also a setting takes the setting's value; `commit_rule="name"` has the defaults."""

PARALLEL_RULES = ("confidence_threshold", "confidence_factor", "entropy_bound", "frechet_margin")
"""Settings that name a rule by its parameter. At most one of these and `commit_rule` is set."""


def rule_names() -> tuple[str, ...]:
    """What `commit_rule` may name."""
    return tuple(name for name in COMMIT_RULES if name not in PARALLEL_RULES)


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
