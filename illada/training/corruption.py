"""The forward process: replace tokens by [MASK], each independently with the probability of its sequence.

All randomness is a function of a seed and of a sequence's number in the run, and of nothing else. The same sequence
thus meets the same noise whatever the batch size, the processes, the loader's workers and the device are, a run that
was interrupted goes on with the noise of an uninterrupted one, and no global random state is read or changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What a stream of random numbers is for; streams of different purposes are independent."""

    TIME = 0
    STRATA = 1
    MASKING = 2
    KEEP_PROMPT = 3
    SPLIT = 4


def random_stream(seed: int, purpose: Purpose, number: int) -> np.random.Generator:
    """The generator of one sequence (or one block of strata), by NumPy's documented hashing of several integers."""
    return np.random.default_rng((seed, purpose, number))


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


def sample_mask_probabilities(seed: int, rows: Sequence[int], strata: int = 1, eps: float = 1e-3) -> torch.Tensor:
    """Draws `p = (1 - eps) t + eps` with `t ~ U(0, 1]` for each sequence, in fp32 of shape (len(rows),).

    Args:
        seed: of all noise of the run, not negative.
        rows: number of each sequence in the run.
        strata: if above 1, the sequences of each block `k * strata ... (k + 1) * strata - 1` have their t in different
            intervals of length 1 / strata, in random order. Each t alone is still uniform, and the loss of the block
            varies less (the low-discrepancy sampler of arXiv 2107.00630). The block is meant to be one optimiser step.
        eps: the least probability.
    """
    times = []
    for row in rows:
        block, place = divmod(row, strata)
        stratum = random_stream(seed, Purpose.STRATA, block).permutation(strata)[place]
        times.append(1 - (stratum + random_stream(seed, Purpose.TIME, row).random()) / strata)
    return (1 - eps) * torch.tensor(times, dtype=torch.float32) + eps


def corrupt(
    input_ids: torch.LongTensor,
    maskable: torch.BoolTensor,
    probabilities: torch.Tensor,
    mask_token_id: int,
    seed: int,
    rows: Sequence[int],
) -> Corruption:
    """Masks each maskable token of row b with probability `probabilities[b]` (arXiv 2502.09992).

    Args:
        input_ids (`torch.LongTensor` of shape `(B, S)`): clean tokens. A row's noise does not depend on S: padding
            does not change it.
        maskable (`torch.BoolTensor` of shape `(B, S)`): False for padding, and for a prompt that stays visible.
        probabilities (`torch.FloatTensor` of shape `(B,)`): in (0, 1].
        mask_token_id (`int`): id of [MASK].
        seed (`int`): of all noise of the run.
        rows: number of each sequence in the run.
    """
    length = input_ids.shape[1]
    noise = np.stack([random_stream(seed, Purpose.MASKING, row).random(length, dtype=np.float32) for row in rows])
    probabilities = probabilities.to(input_ids.device).unsqueeze(1)
    masked = maskable & (torch.from_numpy(noise).to(input_ids.device) < probabilities)
    return Corruption(
        input_ids=input_ids.masked_fill(masked, mask_token_id),
        labels=input_ids.masked_fill(~maskable, -100),
        loss_weights=masked / probabilities,
    )
