"""Tree mode: a row's drafts as further columns of its own sequence, over cached columns that all of them see.

A pass over a cache computes the columns of a row's block. With drafts it computes them once for each candidate, the
row itself first. A candidate sees the cached columns and its own, and nothing of another; the positions repeat.

               cached   block  2nd  3rd
        block     x       x     .    .
        2nd       x       .     x    .
        3rd       x       .     .    x

Keys and values of the drafts go to columns after the text, and are overwritten by the next pass.
"""

import torch
import torch.nn.functional as F

from .canvas import Row


class Tree:
    """The columns of a pass: W of each of R rows, for each of K candidates.

    Args:
        rows (`list[Row]`): R rows, in the order of their sequences.
        lines (`list[Row]`): those of them that are asked for, and their drafts.
        computed (`torch.LongTensor` of shape `(R, W)`): columns of each row, filled up with one after all text.
        num_text (`int`): columns that texts may have.
        num_candidates (`int`): K; a row with fewer drafts is computed again.

    Attributes:
        num_further (`int`): columns after the text, `(K - 1) W`.
        columns (`torch.LongTensor` of shape `(R, K W)`): where in its text each column is.
        texts (`torch.LongTensor` of shape `(R, K W)`): in which row of the canvas it is.
        written (`torch.LongTensor` of shape `(R, K W)`): the column of the cache that takes its keys and values.
    """

    def __init__(
        self, rows: list[Row], lines: list[Row], computed: torch.LongTensor, num_text: int, num_candidates: int
    ):
        self.rows, self.computed = rows, computed
        self.num_text, self.num_candidates, width = num_text, num_candidates, computed.shape[1]
        self.num_further = (num_candidates - 1) * width
        self.columns = computed.repeat(1, num_candidates)
        further = torch.arange(num_text, num_text + self.num_further)
        self.written = torch.cat([computed, further.expand(len(rows), -1)], dim=-1)
        row_of = {row: place for place, row in enumerate(rows)}
        self.row = torch.tensor([row_of[line.owner] for line in lines])
        self.candidate = torch.tensor([[line.owner, *line.owner.drafts].index(line) for line in lines])
        texts = torch.tensor([[row.index] for row in rows]).repeat(1, num_candidates)
        texts[self.row, self.candidate] = torch.tensor([line.index for line in lines])
        self.texts = texts.repeat_interleave(width, dim=-1)

    def index(self, lines: torch.LongTensor, columns: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Row and place among the columns of the pass (M,), of M positions at `columns` of these lines."""
        row = self.row[lines]
        place = (self.computed[row] < columns.unsqueeze(-1)).sum(-1)
        return row, self.candidate[lines] * self.computed.shape[1] + place

    def mask(self, num_visible: int, device: torch.device) -> torch.BoolTensor:
        """What each column sees, (R, 1, K W, num_visible) on `device`; what is after the drafts is seen by none."""
        computed = self.computed.to(device, non_blocking=True)
        lengths = torch.tensor([[row.length] for row in self.rows]).to(device, non_blocking=True)
        text = torch.arange(self.num_text, device=device) < lengths
        in_block = F.pad(torch.zeros_like(text), (0, 1)).scatter(1, computed.clamp(max=self.num_text), True)
        outside = (text & ~in_block[:, :-1]).unsqueeze(1).expand(-1, self.num_candidates - 1, -1)
        is_own = torch.eye(self.num_candidates, dtype=torch.bool, device=device)[:, 1:, None]
        further = (is_own & (computed < lengths)[:, None, None]).flatten(2)
        mask = torch.cat([torch.cat([text.unsqueeze(1), outside], dim=1), further], dim=-1)
        mask = F.pad(mask, (0, num_visible - mask.shape[-1]))
        return mask.repeat_interleave(computed.shape[1], dim=1).unsqueeze(1)
