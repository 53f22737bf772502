"""Revision: the least likely tokens of a finished text are masked and rewritten."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput

from .logits import forbid_mask, log_probability, non_finite_logits, promote

RESPONSE_FIELDS = (
    "max_new_tokens",
    "max_length",
    "min_new_tokens",
    "min_length",
    "max_time",
    "stop_strings",
    "num_return_sequences",
    "return_dict_in_generate",
    "output_trace",
)
"""Fields about a response, which a revision does not have, or about the output, which is [`RevisionOutput`]."""

FILLING = {**dict.fromkeys(RESPONSE_FIELDS), "max_new_tokens": 0, "return_dict_in_generate": True}
"""The same fields as `generate` gets them to fill only the blanks."""


@dataclass
class RevisionOutput(ModelOutput):
    """What `revise` returns. B counts texts, S their tokens.

    Args:
        sequences (`torch.LongTensor` of shape `(B, S)`): the revised texts.
        changed (`torch.BoolTensor` of shape `(B, S)`): where they differ from the texts that were given.
        confidences (`torch.FloatTensor` of shape `(B, S)`):
            Probability of each given token in the context of all others, before the first round; NaN where it was not
            asked (padding, special and protected tokens).
        num_rounds (`int`): rounds that were run.
    """

    sequences: torch.LongTensor | None = None
    changed: torch.BoolTensor | None = None
    confidences: torch.FloatTensor | None = None
    num_rounds: int | None = None


def leave_one_out_confidences(
    model,
    tokens: torch.LongTensor,
    attention_mask: torch.BoolTensor,
    asked: torch.BoolTensor,
    mask_token_id: int,
    num_passes: int | None = None,
) -> torch.Tensor:
    """Probability of each token given the others, `p(x_i | x without i)`: the terms of the pseudo-likelihood.

    A masked model says nothing about a token that it sees, so each asked token is masked in one of `num_passes`
    forward passes. With a pass per token (the default) the figure is exact; with fewer, tokens that are `num_passes`
    apart are masked together.

    Args:
        tokens (`torch.LongTensor` of shape `(B, S)`), attention_mask (`torch.BoolTensor` of shape `(B, S)`).
        asked (`torch.BoolTensor` of shape `(B, S)`): the tokens whose probability is wanted.
        mask_token_id (`int`): id of [MASK].
        num_passes (`int`, *optional*): forward passes of the whole batch.

    Returns:
        `torch.FloatTensor` of shape `(B, S)`, NaN where not asked.

    Raises:
        ValueError: names the position, if the model gives NaN or infinite logits.
    """
    confidences = torch.full(tokens.shape, torch.nan, device=tokens.device)
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    rank = asked.cumsum(-1) - 1
    most = int(asked.sum(-1).max())
    num_passes = min(num_passes or most, most)
    for index in range(num_passes):
        masked = asked & (rank % num_passes == index)
        logits = model(
            input_ids=tokens.masked_fill(masked, mask_token_id),
            attention_mask=attention_mask,
            position_ids=position_ids,
            logits_to_keep=masked,
        ).logits
        logits = forbid_mask(promote(logits), mask_token_id)
        confidences[masked] = log_probability(logits, tokens[masked]).exp().to(confidences.dtype)
    broken = (confidences.isnan() & asked).nonzero()
    if len(broken):
        row, column = broken[0].tolist()
        raise non_finite_logits(f"column {column} of row {row}", model.dtype)
    return confidences


def least_likely(
    confidences: torch.Tensor, fraction: float | None = None, threshold: float | None = None
) -> torch.BoolTensor:
    """The positions (B, S) to rewrite: the lowest `fraction` of each row, rounded up, or all below `threshold`."""
    asked = ~confidences.isnan()
    if threshold is not None:
        return asked & (confidences < threshold)
    order = confidences.masked_fill(~asked, torch.inf).argsort(dim=-1, stable=True)
    ranks = order.argsort(dim=-1)
    # Division rounds correctly, so that 15 / 50 is 0.3; 0.3 * 50 is above 15. On the host: not every device has fp64.
    shares = ranks.cpu().double() / asked.sum(-1, keepdim=True).cpu()
    return asked & (shares < fraction).to(asked.device)


def check_revision(fraction: float | None, threshold: float | None, num_rounds: int, num_passes: int | None):
    """Raises a `ValueError` that names the argument, its value and what is allowed."""
    if (fraction is None) == (threshold is None):
        raise ValueError(f"Exactly one of `fraction` and `threshold` must be given, got {fraction} and {threshold}.")
    for name, value in (("fraction", fraction), ("threshold", threshold)):
        if value is not None and not (type(value) in (int, float) and 0 < value <= 1):
            raise ValueError(f"`{name}` must be a number in (0, 1], got {value!r}.")
    for name, value in (("num_rounds", num_rounds), ("num_scoring_passes", 1 if num_passes is None else num_passes)):
        if not (type(value) is int and value >= 1):
            raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")


def check_filling(settings: dict[str, Any]):
    """Raises a `ValueError` if `settings`, or a `generation_config` in them, has a field about a response."""
    config = settings.get("generation_config")
    for name in RESPONSE_FIELDS:
        for argument, value in (
            (name, settings.get(name)),
            (f"generation_config.{name}", getattr(config, name, None)),
        ):
            if value is not None:
                raise ValueError(f"`{argument}` must be unset, got {value!r}: a revision has no use for it.")
