"""Packed sequences: several segments in one row, none of which sees another.

A segment is told by its position ids, which begin anew at its first token: the convention of Transformers.
"""

from collections.abc import Sequence

import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from .corruption import Purpose, random_stream


def split_segments(
    position_ids: torch.LongTensor, probability: float, seed: int, rows: Sequence[int]
) -> torch.LongTensor:
    """Cuts each row with `probability` at a uniformly random point, as iLLaDA's training does (arXiv 2606.25331).

    Args:
        position_ids (`torch.LongTensor` of shape `(B, S)`): from 0 in each segment, 0 in padding, which changes
            nothing.
        probability: share of the rows that are cut, 0.3 as published.
        seed: of all noise of the run.
        rows: number of each sequence in the run.

    Returns:
        Position ids `(B, S)` that begin at 0 again at the cut; a row that is packed already has one segment more. A
        row whose segments are single tokens stays as it is.
    """
    if probability == 0:
        return position_ids
    draws = []
    for row in rows:
        stream = random_stream(seed, Purpose.SPLIT, row)
        is_split, place = stream.random() < probability, stream.random()
        draws.append(place if is_split else -1.0)
    place = torch.tensor(draws, device=position_ids.device).unsqueeze(1)
    # A cut falls where a segment goes on: not at its first token, nor in padding, whose positions are all 0.
    goes_on = position_ids > 0
    count = goes_on.sum(1, keepdim=True)
    number = (place * count).floor().long().clamp(max=count - 1)  # of the chosen column among those
    is_point = goes_on & (goes_on.cumsum(1) - 1 == number)
    is_split = (place >= 0) & (count > 0)
    point = is_point.long().argmax(1, keepdim=True)
    start = torch.arange(position_ids.shape[1], device=position_ids.device) - position_ids
    after_point = is_split & (start == start.gather(1, point)) & (position_ids >= position_ids.gather(1, point))
    return torch.where(after_point, position_ids - position_ids.gather(1, point), position_ids)


def isolate_segments(batch: dict[str, torch.Tensor], attention: str) -> dict[str, torch.Tensor]:
    """Adds to a batch what keeps attention inside its segments, in the form that the attention in use reads.

    | attention | form |
    | --- | --- |
    | `flash_attention_*` | all rows as one row without padding, and `cu_seq_lens_*`: the varlen kernel |
    | `flex_attention` | a `BlockMask`: blocks of no common segment are skipped |
    | `sdpa`, `eager` | a dense boolean mask (B, 1, S, S) |

    Args:
        batch: tensors of shape (B, S), among them `position_ids`. Where every row is one segment it is returned as is.
        attention: the model's `config._attn_implementation`.
    """
    segments = find_packed_sequence_indices(batch["position_ids"])
    if segments is None:
        return batch
    if "flash" in attention:
        batch = {name: tensor.reshape(1, -1) for name, tensor in batch.items()}
        (cu_q, cu_k), (max_q, max_k) = prepare_fa_kwargs_from_position_ids(batch["position_ids"])
        return {**batch, "cu_seq_lens_q": cu_q, "cu_seq_lens_k": cu_k, "max_length_q": max_q, "max_length_k": max_k}
    if attention == "flex_attention":
        batch_size, length = segments.shape

        def same_segment(row, head, query, key):
            return segments[row, query] == segments[row, key]

        mask = create_block_mask(same_segment, batch_size, None, length, length, device=segments.device)
    else:
        mask = (segments.unsqueeze(1) == segments.unsqueeze(2)).unsqueeze(1)
    return {**batch, "attention_mask": mask}
