"""The canvas: the texts being written, what is known of each row, and the order in which its masks are decoded."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class Block:
    """Positions that are decoded together: those in columns `start:end` that `active` (B, end - start) marks."""

    start: int
    end: int
    active: torch.BoolTensor


class Canvas:
    """A batch of B texts in S columns: padding on the left, prompt, then response. S grows with the canvas.

    Attributes:
        tokens (`torch.LongTensor` of shape `(B, S)`): [MASK] where nothing is decided yet.
        attention_mask (`torch.BoolTensor` of shape `(B, S)`): False for padding.
        position_ids (`torch.LongTensor` of shape `(B, S)`): counts the tokens of a row, padding left out.
        given (`torch.BoolTensor` of shape `(B, S)`): True for the tokens that the caller gave.
        live (`torch.BoolTensor` of shape `(B,)`): True for rows that are not finished.
        ends (`torch.LongTensor` of shape `(B,)`): the column after the last token of a finished row.
        num_forward_passes (`torch.LongTensor` of shape `(B,)`): passes in which the row took part.
        commit_steps (`torch.LongTensor` of shape `(B, S)`): the row's pass that decided the position; 0 if none did.
        commit_confidences (`torch.FloatTensor` of shape `(B, S)`): probability of the token then; NaN if none did.
    """

    def __init__(self, input_ids: torch.LongTensor, attention_mask: torch.BoolTensor, mask_token_id: int):
        batch_size, self.prompt_length = input_ids.shape
        self.mask_token_id = mask_token_id
        self.tokens = input_ids.clone()
        self.attention_mask = attention_mask
        self.position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        self.given = attention_mask & (input_ids != mask_token_id)
        self.live = torch.ones(batch_size, dtype=torch.bool, device=input_ids.device)
        self.ends = torch.zeros(batch_size, dtype=torch.long, device=input_ids.device)
        self.num_forward_passes = torch.zeros_like(self.ends)
        self.commit_steps = torch.zeros_like(input_ids)
        self.commit_confidences = torch.full(input_ids.shape, torch.nan, device=input_ids.device)

    @property
    def length(self) -> int:
        """S, in tokens."""
        return self.tokens.shape[1]

    @property
    def masked(self) -> torch.BoolTensor:
        """(B, S): what is still to be decided."""
        return self.attention_mask & (self.tokens == self.mask_token_id)

    def append_masks(self, count: int):
        """Adds `count` masked columns on the right."""
        self.tokens = F.pad(self.tokens, (0, count), value=self.mask_token_id)
        self.attention_mask = F.pad(self.attention_mask, (0, count), value=True)
        last, steps = self.position_ids[:, -1:], torch.arange(1, count + 1, device=self.tokens.device)
        self.position_ids = torch.cat([self.position_ids, last + steps], dim=-1)
        self.given = F.pad(self.given, (0, count), value=False)
        self.commit_steps = F.pad(self.commit_steps, (0, count), value=0)
        self.commit_confidences = F.pad(self.commit_confidences, (0, count), value=torch.nan)

    def blanks(self, block_length: int) -> Iterator[Block]:
        """The masks inside the prompt, `block_length` of each row at a time, from left to right."""
        masked = self.masked[:, : self.prompt_length]
        group = (masked.cumsum(-1) - 1) // block_length
        for index in range(int(group.max()) + 1):
            yield Block(0, self.prompt_length, masked & (group == index))

    def block(self, start: int, end: int) -> Block:
        """All masks in columns `start:end` behind the prompt."""
        return Block(start, end, self.masked[:, start:end])

    def undecided(self, block: Block) -> torch.BoolTensor:
        """(B, W): the masks of the block that are still to be decided, in rows that are not finished."""
        is_mask = self.tokens[:, block.start : block.end] == self.mask_token_id
        return block.active & is_mask & self.live.unsqueeze(-1)

    def commit(
        self,
        rows: torch.LongTensor,
        positions: tuple[torch.LongTensor, torch.LongTensor],
        tokens: torch.LongTensor,
        confidences: torch.Tensor,
        committed: torch.BoolTensor,
    ):
        """Counts a pass of `rows` (R,), and writes its tokens (M,) where `committed` (M,), with step and confidence.

        `positions` are the rows and columns (M,) of the masks that were predicted.
        """
        self.num_forward_passes[rows] += 1
        self.tokens[positions] = torch.where(committed, tokens, self.mask_token_id)
        self.commit_steps[positions] = torch.where(committed, self.num_forward_passes[positions[0]], 0)
        confidences = confidences.to(self.commit_confidences.dtype)
        self.commit_confidences[positions] = torch.where(committed, confidences, torch.nan)

    def finish(self, finished: torch.BoolTensor, ends: torch.LongTensor):
        """Finishes the rows of `finished` (B,), whose texts end before the columns `ends` (B,). The least counts."""
        self.ends = torch.where(finished & (self.live | (ends < self.ends)), ends, self.ends)
        self.live = self.live & ~finished

    def finish_at_eos(self, eos_token_ids: torch.LongTensor):
        """Finishes the rows in which everything before the first EOS of the response is decided."""
        if self.length == self.prompt_length:
            return
        response = self.tokens[:, self.prompt_length :]  # the prompt's blanks are decided before it
        is_eos = torch.isin(response, eos_token_ids)
        is_after_mask = (response == self.mask_token_id).cumsum(-1) > 0
        first_eos = is_eos.int().argmax(-1, keepdim=True)
        is_settled = is_eos.any(-1) & ~is_after_mask.gather(-1, first_eos).squeeze(-1)
        self.finish(is_settled, self.prompt_length + first_eos.squeeze(-1) + 1)

    def settled_length(self, row: int) -> int:
        """Columns of a row that will not change: up to its end, its first mask, or the whole canvas."""
        if not self.live[row]:
            return int(self.ends[row])
        masked = self.masked[row]
        return int(masked.int().argmax()) if masked.any() else self.length
