"""The forward process: replace tokens by [MASK], each independently with the probability of its sequence."""

from dataclasses import dataclass

import torch


@dataclass
class Corruption:
    """A corrupted batch, in the form that [`ILLaDAForCausalLM.forward`] takes; every tensor is (B, S).

    Attributes:
        input_ids (`torch.LongTensor`): the tokens, [MASK] where masked.
        labels (`torch.LongTensor`): the clean tokens where masking was allowed, -100 elsewhere.
        loss_weights (`torch.FloatTensor`): 1/p where masked, 0 elsewhere.
    """

    input_ids: torch.LongTensor
    labels: torch.LongTensor
    loss_weights: torch.FloatTensor


def sample_mask_probabilities(
    batch_size: int, generator: torch.Generator, eps: float = 1e-3, stratified: bool = False
) -> torch.Tensor:
    """Draws `p = (1 - eps) t + eps` with `t ~ U[0, 1)` for each sequence, in fp32 of shape (batch_size,).

    With `stratified`, sequence b has t in its own interval of length 1 / batch_size, in random order: each t alone is
    still uniform, and the loss of a batch varies less (the low-discrepancy sampler of arXiv 2107.00630).
    """
    t = torch.rand(batch_size, generator=generator)
    if stratified:
        t = (torch.randperm(batch_size, generator=generator) + t) / batch_size
    return (1 - eps) * t + eps


def corrupt(
    input_ids: torch.LongTensor,
    maskable: torch.BoolTensor,
    probabilities: torch.Tensor,
    mask_token_id: int,
    generator: torch.Generator,
) -> Corruption:
    """Masks each maskable token of row b with probability `probabilities[b]` (arXiv 2502.09992).

    Args:
        input_ids (`torch.LongTensor` of shape `(B, S)`): clean tokens.
        maskable (`torch.BoolTensor` of shape `(B, S)`): False for padding, and for a prompt that stays visible.
        probabilities (`torch.FloatTensor` of shape `(B,)`): in (0, 1].
        mask_token_id (`int`): id of [MASK].
        generator (`torch.Generator`): the only source of randomness; the global state is untouched.
    """
    probabilities = probabilities.unsqueeze(1)
    masked = maskable & (torch.rand(input_ids.shape, generator=generator) < probabilities)
    return Corruption(
        input_ids=input_ids.masked_fill(masked, mask_token_id),
        labels=input_ids.masked_fill(~maskable, -100),
        loss_weights=masked / probabilities,
    )
