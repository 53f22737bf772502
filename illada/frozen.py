"""The frozen cache: keys and values of what is finished are computed once, from its final tokens, and never again.

A text is cut into *segments*: the pieces of its prompt, and the blocks of its response. A segment sees itself and what
is before it, so that what is written later does not change its keys and values. The text is that of the same weights
under a block-causal mask: FreeCache (arXiv 2505.21467) calls it an approximation, since the model was trained to see
both ways.

Each pass computes what is not frozen yet, up to the end of the segment in which the block ends. In the first pass of a
block these are the segments before it that have become final and the block itself, in the others only the block.
"""

from contextlib import suppress

import torch

from .canvas import Row, without_drafts
from .frozen_cache import KeptText, KeysAndValues, state_of
from .prediction import CachedPredictor, groups_of_like_length

WITH_DENSE_MASKS = ("eager", "sdpa")
"""Kinds of attention that take any mask. Others compute a segment at a time."""


class FrozenPredictor(CachedPredictor):
    """Block passes over keys and values that are final.

    Attributes:
        ends (`dict[Row, torch.LongTensor]`): where each row's segments end.
        frozen (`dict[Row, int]`): the columns of each row, from its first, whose keys and values are final.
        found (`dict[Row, KeysAndValues]`): what a [`FrozenCache`] has for rows that have had no pass yet.
    """

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.ends: dict[Row, torch.LongTensor] = {}
        self.frozen: dict[Row, int] = {}
        self.found: dict[Row, KeysAndValues] = {}

    @staticmethod
    def _columns_of(row: Row) -> torch.LongTensor:
        return row.block

    def begin(self, row: Row):
        super().begin(row)
        if row in self.ends:
            return
        self.ends[row], self.frozen[row] = torch.tensor(self._ends(row, row.end)), 0
        if row.cache is not None:
            tokens, ends = self._seen(row, row.prompt_length), self._ends(row, row.prompt_length)
            if (found := row.cache.find(self._state(), tokens, ends)) is not None:
                self.frozen[row], self.found[row] = found

    def may_be_drafted(self, row: Row) -> bool:
        return not self._is_opening(row.owner)

    def end(self, row: Row):
        length, found = self.frozen.pop(row, 0), self.found.pop(row, None)
        if row.cache is not None and length and found is None:
            tokens, ends = self._seen(row, length), self._ends(row, length)
            with suppress(torch.OutOfMemoryError):  # what there is no room for is not kept
                row.cache.keep(KeptText(self._state(), tokens, ends, self.cache.copy(row, length)))
        self.ends.pop(row, None)
        super().end(row)

    def logits(self, rows: list[Row], places: torch.LongTensor, columns: torch.LongTensor) -> torch.Tensor:
        opening = [row for row in without_drafts(rows) if self._is_opening(row)]
        others = groups_of_like_length(opening, lambda row: len(self._not_frozen(row)))
        part = [row for row in without_drafts(rows) if row not in set(opening)]
        logits = self._in_seats(rows, part, others, places, columns, self._open)
        for row in opening:
            self.frozen[row] = self._final_length(row)
        return logits

    @staticmethod
    def _ends(row: Row, length: int) -> list[int]:
        return segment_ends(row.segments, row.prompt_length, row.settings.block_length, length)

    def _is_opening(self, row: Row) -> bool:
        """Whether a pass computes more than the row's block."""
        return row in self.found or not row.is_in_response or self.frozen[row] < int(row.block[0])

    def _not_frozen(self, row: Row) -> torch.LongTensor:
        """The columns to compute: to the end of the segment that the block ends in."""
        return torch.arange(self.frozen[row], int(self._segment_end(row, row.block[-1])))

    def _final_length(self, row: Row) -> int:
        """Columns up to the last segment before the row's first mask: the pass under way makes them final."""
        ends = self.ends[row]
        final = ends[ends <= self.canvas.settled_length(row)]
        return int(final[-1]) if len(final) else 0

    def _segment_end(self, row: Row, columns: torch.LongTensor) -> torch.LongTensor:
        """Where the segments of these columns end, which is as far as these columns see."""
        ends = self.ends[row]
        return ends[torch.bucketize(columns, ends, right=True).clamp(max=len(ends) - 1)]

    def _open(self, rows: list[Row], places: torch.LongTensor, columns: torch.LongTensor) -> torch.Tensor:
        """A pass over all columns that are not frozen, of rows in neighbouring places."""
        for row in rows:
            if row in self.found:
                self.cache.load(row, self.found.pop(row), self.frozen[row])
        own = [self._not_frozen(row) for row in rows]
        if self.model.config._attn_implementation in WITH_DENSE_MASKS:
            return self._compute(rows, own, places, columns)
        return self._segment_by_segment(rows, own, places, columns)

    def _compute(self, rows: list[Row], own: list[torch.LongTensor], places, columns) -> torch.Tensor:
        """A pass over the columns `own` of each row."""
        computed = self._lay_out(own)
        index = (computed[places] < columns.unsqueeze(-1)).sum(-1)
        num_visible = max(int(each[-1]) + 1 for each in own)
        last = torch.stack([each[-1] for each in own]).unsqueeze(-1)
        sees = torch.stack([self._segment_end(row, each) for row, each in zip(rows, computed.minimum(last))])
        self.cache.look_at(rows, computed, num_visible)
        attention_mask = torch.arange(num_visible) < sees.unsqueeze(-1)
        if (sees == sees[:, :1]).all():  # a segment of each row: what is not its text is padding
            attention_mask = None if attention_mask.all() else attention_mask[:, 0]
        else:
            attention_mask = attention_mask.unsqueeze(1)
        return self._pass(rows, computed, attention_mask, (places, index), self._call_model)

    def _segment_by_segment(self, rows: list[Row], own: list[torch.LongTensor], places, columns) -> torch.Tensor:
        """The same in as many calls of the model as there are segments, none of which needs a dense mask."""
        pieces = []
        for row, each in zip(rows, own):
            lengths = self._segment_end(row, each).unique_consecutive(return_counts=True)[1]
            pieces.append(each.split(lengths.tolist()))
        step_of = [sum(bool(piece[-1] < column) for piece in pieces[place]) for place, column in zip(places, columns)]
        step_of = torch.tensor(step_of, dtype=torch.long)
        picked, logits = [], []
        for step in range(max(map(len, pieces))):
            here = [place for place, piece in enumerate(pieces) if step < len(piece)]
            place_here = torch.zeros(len(rows), dtype=torch.long)
            place_here[here] = torch.arange(len(here))
            parts = [rows[place] for place in here], [pieces[place][step] for place in here]
            picked.append((step_of == step).nonzero().squeeze(-1))
            logits.append(self._compute(*parts, place_here[places[picked[-1]]], columns[picked[-1]]))
        return torch.cat(logits)[torch.cat(picked).argsort().to(logits[0].device)]

    def _seen(self, row: Row, length: int) -> torch.LongTensor:
        """What the model sees of a row's first columns, (branches, length)."""
        tokens = self.canvas.tokens[row.index, :length]
        if self.num_branches == 1:
            return tokens[None].clone()
        given = self.canvas.given[row.index, :length]
        return torch.stack([tokens, tokens.masked_fill(given, self.canvas.mask_token_id)])

    def _state(self) -> tuple:
        return state_of(self.model, self.dtype)


def segment_ends(prompt_segments: tuple[int, ...], prompt_length: int, block_length: int, length: int) -> list[int]:
    """Where the segments of a text of `length` columns end: those of its prompt, then the blocks of its response."""
    ends = {*prompt_segments, *range(prompt_length, length, block_length), length}
    return sorted(end for end in ends if end <= length)
