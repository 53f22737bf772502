"""The canvas: the texts being written, each in a row of its own, with the block of each that is being decoded.

It lives on the host. What a pass needs is uploaded, and what it decides comes back in one piece, so that everything
else (which masks are left, where a text ends, what a listener is told) costs no wait for the device.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from .commit_rules import quota_of
from .frozen_cache import FrozenCache
from .generation_config import MaskedDiffusionGenerationConfig


@dataclass(eq=False)
class Row:
    """A row of the canvas: one text, from its admission to its end. A token is in the column of its position.

    Attributes:
        index (`int`): of the row in the canvas.
        settings ([`MaskedDiffusionGenerationConfig`]): with every field set that the loop reads.
        prompt_length (`int`), end (`int`): columns of the prompt; of the prompt and all that may be written.
        length (`int`): columns that the model sees. A growing canvas adds a block at a time; what is to the right of
            them is not there.
        block (`torch.LongTensor` of shape `(N,)`): the columns that are being decoded together, in rising order.
        blocks (`Iterator`): the blocks after it.
        num_passes (`int`): passes in which the row took part.
        block_steps (`int`): steps since the block was opened: one for each pass, and one for each guess of
            `num_drafts` that was right.
        is_stale (`bool`): the last step committed a token of more entropy than `cache_refresh_entropy`.
        drafts (`list[Row]`): guesses of what the next steps make of the text, which the next pass predicts too.
        draft_indices (`list[int]`): where in the canvas its drafts may be.
        draft_of (`Row`, *optional*): the row that this is a guess of.
        segments (`tuple[int, ...]`): where the prompt's segments end, for a frozen cache; empty if it is one.
        cache ([`FrozenCache`], *optional*): where a frozen cache finds the text's beginning, and leaves it.
    """

    index: int
    settings: MaskedDiffusionGenerationConfig
    prompt_length: int
    end: int
    length: int
    block: torch.LongTensor | None = None
    blocks: Iterator[torch.LongTensor] = iter(())
    num_passes: int = 0
    block_steps: int = 0
    is_stale: bool = False
    drafts: "list[Row]" = field(default_factory=list)
    draft_indices: list[int] = field(default_factory=list)
    draft_of: "Row | None" = None
    segments: tuple[int, ...] = ()
    cache: FrozenCache | None = None

    @property
    def is_in_response(self) -> bool:
        """Whether the block is of the response, and not of the prompt's blanks, which are filled before it."""
        return int(self.block[0]) >= self.prompt_length

    @property
    def owner(self) -> "Row":
        """The row that this is a guess of, or itself."""
        return self if self.draft_of is None else self.draft_of

    def quota(self, steps_ahead: int = 0) -> int:
        """Positions that the schedule commits in the row's next step, or in one after it."""
        num_steps = self.settings.max_denoising_steps or self.settings.block_length
        return quota_of(len(self.block), num_steps, self.block_steps + steps_ahead)


def without_drafts(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.draft_of is None]


class Canvas:
    """The rows' texts: B rows of S columns, on the host. S grows with the longest text. D rows after them are drafts.

    Attributes:
        tokens (`torch.LongTensor` of shape `(B + D, S)`): [MASK] where nothing is decided yet.
        given (`torch.BoolTensor` of shape `(B + D, S)`): True for the tokens that the caller gave.
        commit_steps (`torch.LongTensor` of shape `(B, S)`): the row's pass that decided the position; 0 if none did.
        commit_confidences (`torch.FloatTensor` of shape `(B, S)`): probability of the token then; NaN if none did.
        num_remasks (`torch.LongTensor` of shape `(B, S)`): how often the position was masked again.
    """

    def __init__(self, num_rows: int, mask_token_id: int):
        self.num_rows, self.mask_token_id = num_rows, mask_token_id
        self.free_drafts: list[int] = []
        self.tokens = torch.full((num_rows, 0), mask_token_id)
        self.given = torch.zeros((num_rows, 0), dtype=torch.bool)
        self.commit_steps = torch.zeros((num_rows, 0), dtype=torch.long)
        self.commit_confidences = torch.full((num_rows, 0), torch.nan)
        self.num_remasks = torch.zeros((num_rows, 0), dtype=torch.long)

    def admit(
        self, index: int, prompt: torch.LongTensor, max_new_tokens: int, settings: MaskedDiffusionGenerationConfig
    ) -> Row:
        """Lays a prompt (S,) into row `index`, on a fixed canvas with all masks of the response after it."""
        end = len(prompt) + max_new_tokens
        if (count := end - self.tokens.shape[1]) > 0:
            self.tokens = F.pad(self.tokens, (0, count), value=self.mask_token_id)
            self.given = F.pad(self.given, (0, count), value=False)
            self.commit_steps = F.pad(self.commit_steps, (0, count), value=0)
            self.commit_confidences = F.pad(self.commit_confidences, (0, count), value=torch.nan)
            self.num_remasks = F.pad(self.num_remasks, (0, count), value=0)
        self.tokens[index] = self.mask_token_id
        self.tokens[index, : len(prompt)] = prompt
        self.given[index] = False
        self.given[index, : len(prompt)] = prompt != self.mask_token_id
        self.commit_steps[index] = 0
        self.commit_confidences[index] = torch.nan
        self.num_remasks[index] = 0
        length = end if settings.canvas == "fixed" else len(prompt)
        row = Row(index, settings, len(prompt), end, length)
        row.blocks = self._blocks(row, settings.block_length)
        row.draft_indices = self._take_drafts(settings.num_candidates - 1)
        return row

    def _take_drafts(self, count: int) -> list[int]:
        """Rows for `count` drafts."""
        if (missing := count - len(self.free_drafts)) > 0:
            first = len(self.tokens)
            self.tokens = F.pad(self.tokens, (0, 0, 0, missing), value=self.mask_token_id)
            self.given = F.pad(self.given, (0, 0, 0, missing), value=False)
            self.free_drafts += range(first, first + missing)
        taken, self.free_drafts = self.free_drafts[:count], self.free_drafts[count:]
        return taken

    def release(self, row: Row):
        """Gives up the places of a row's drafts."""
        self.free_drafts += row.draft_indices
        row.drafts, row.draft_indices = [], []

    def draft(self, row: Row, blocks: torch.LongTensor) -> list[Row]:
        """The row's text with each of these guesses (D, N) of its block, one step later each, as rows of their own."""
        indices = row.draft_indices[: len(blocks)]
        for text, index in zip(blocks, indices):
            self.tokens[index], self.given[index] = self.tokens[row.index], self.given[row.index]
            self.tokens[index, row.block] = text
        return [
            replace(row, index=index, drafts=[], draft_indices=[], draft_of=row, block_steps=row.block_steps + steps)
            for steps, index in enumerate(indices, start=1)
        ]

    def _blocks(self, row: Row, block_length: int) -> Iterator[torch.LongTensor]:
        """The columns of each block in the order of decoding: blanks of the prompt first, then the response.

        A growing row grows when the block after its last column is asked for.
        """
        blanks = (~self.given[row.index, : row.prompt_length]).nonzero().squeeze(-1)
        if len(blanks):
            yield from blanks.split(block_length)
        for start in range(row.prompt_length, row.end, block_length):
            end = min(start + block_length, row.end)
            row.length = max(row.length, end)
            yield torch.arange(start, end)

    def text(self, row: Row, end: int | None = None) -> torch.LongTensor:
        """The row's tokens up to column `end`, else all that the model sees."""
        return self.tokens[row.index, : row.length if end is None else end]

    def settled_length(self, row: Row) -> int:
        """Columns up to the row's first mask: what will not change any more."""
        masked = (self.text(row) == self.mask_token_id).nonzero()
        return int(masked[0]) if len(masked) else row.length


class ActiveBlocks:
    """The active blocks of R rows of a canvas, side by side in W columns.

    Attributes:
        rows (`list[Row]`).
        index (`torch.LongTensor` of shape `(R, 1)`): the rows' places in the canvas.
        columns (`torch.LongTensor` of shape `(R, W)`): the blocks' columns in the canvas, 0 where a block is shorter.
        exists (`torch.BoolTensor` of shape `(R, W)`): False where a block is shorter than the widest.
        tokens (`torch.LongTensor` of shape `(R, W)`): what is there now.
        masked (`torch.BoolTensor` of shape `(R, W)`): what is still to be decided.
    """

    def __init__(self, canvas: Canvas, rows: list[Row]):
        self.canvas, self.rows = canvas, rows
        sizes = [len(row.block) for row in rows]
        width = max(sizes)
        self.index = torch.tensor([[row.index] for row in rows])
        self.columns = torch.stack([F.pad(row.block, (0, width - size)) for row, size in zip(rows, sizes)])
        self.exists = torch.arange(width) < torch.tensor(sizes).unsqueeze(-1)
        self._read()

    @property
    def texts(self) -> torch.LongTensor:
        """(R, S): the rows' texts, [MASK] after a row's end."""
        return self.canvas.tokens[self.index.squeeze(-1), : max(row.length for row in self.rows)]

    @property
    def num_remasks(self) -> torch.LongTensor:
        """(R, W): how often each position was masked again."""
        return self.canvas.num_remasks[self.index, self.columns]

    def _read(self):
        self.tokens = self.canvas.tokens[self.index, self.columns]
        self.masked = self.exists & (self.tokens == self.canvas.mask_token_id)

    def commit(
        self,
        tokens: torch.LongTensor,
        confidences: torch.Tensor,
        committed: torch.BoolTensor,
        remasked: torch.BoolTensor | None,
    ):
        """Counts a step of the rows; writes tokens where `committed`, [MASK] where `remasked`; all (R, W)."""
        canvas = self.canvas
        for row in self.rows:
            row.block_steps += 1
        place, column = committed.nonzero(as_tuple=True)
        where = self.index[place, 0], self.columns[place, column]
        canvas.tokens[where] = tokens[place, column]
        canvas.commit_steps[where] = torch.tensor([row.num_passes for row in self.rows])[place]
        canvas.commit_confidences[where] = confidences[place, column]
        if remasked is not None:
            place, column = remasked.nonzero(as_tuple=True)
            where = self.index[place, 0], self.columns[place, column]
            canvas.tokens[where] = canvas.mask_token_id
            canvas.commit_steps[where] = 0
            canvas.commit_confidences[where] = torch.nan
            canvas.num_remasks[where] += 1
        self._read()

    def first_eos(self, eos_token_ids: torch.LongTensor) -> list[int | None]:
        """For each row the column of its block's first EOS, if nothing before it is masked: there its text ends."""
        is_end = self.exists & torch.isin(self.tokens, eos_token_ids) & (self.masked.cumsum(-1) == 0)
        first = self.columns.gather(-1, is_end.int().argmax(-1, keepdim=True)).squeeze(-1)
        return [column if found else None for column, found in zip(first.tolist(), is_end.any(-1).tolist())]
