"""Keys and values kept between the passes of a block, so that a pass computes a few columns instead of whole texts.

The attention is inherited and unmodified: it hands its keys and values to `Cache.update` and attends to what comes
back. A *full* pass, of whole texts, leaves them here; a *block* pass runs on the columns that are to be recomputed,
writes theirs in place and sees everything.

This is an approximation: under attention in both directions the keys of a prefix depend on the block after it, and
here they stay as they were in the last full pass (Fast-dLLM, arXiv 2505.22618: prefix cache and dual cache), or as
they were before the block was there (`"frozen"`, see `frozen.py`).
"""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .canvas import Row


@dataclass
class Window:
    """What the next pass writes and sees.

    Attributes:
        index (`torch.LongTensor` of shape `(R * W,)`): where each token goes, as `slot * num_columns + column`.
        slots (`slice` or `torch.LongTensor` of shape `(R,)`): what is read; by a slice, the buffers as they are.
        num_visible (`int`, *optional*): columns that are seen; only the pass's own if absent, in a full pass.
    """

    index: torch.LongTensor
    slots: slice | torch.LongTensor | None = None
    num_visible: int | None = None


class BlockCacheLayer(CacheLayerMixin):
    """One layer's keys and values: two buffers of shape (slots, columns, heads, head size).

    A slot is one sequence of the pass. A column's keys are one piece of memory, so that a block is written in one
    copy, whatever columns its rows have.
    """

    is_sliding = False

    def __init__(self, window: Window):
        super().__init__()
        self.num_slots = self.num_columns = 0
        self.window = window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor):
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            self._buffer(states.shape[1], states.shape[3]) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def _buffer(self, num_heads: int, head_size: int) -> torch.Tensor:
        with torch.inference_mode(False):  # a later call may write into it outside inference mode
            shape = self.num_slots, self.num_columns, num_heads, head_size
            return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def grow(self, num_slots: int, num_columns: int):
        """Makes room, and keeps what is there."""
        self.num_slots, self.num_columns = num_slots, num_columns
        if not self.is_initialized:
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = self._buffer(*old.shape[2:])
            new[: old.shape[0], : old.shape[1]] = old
            setattr(self, name, new)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes keys and values (R, heads, W, size) and returns all that are visible, (R, heads, visible, size)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        index = self.window.index.to(self.device)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            buffer.flatten(0, 1).index_copy_(0, index, states.transpose(1, 2).flatten(0, 1))
        if self.window.num_visible is None:
            return key_states, value_states
        visible = self.window.slots, slice(self.window.num_visible)
        return self.keys[visible].transpose(1, 2), self.values[visible].transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys the queries see, and the column of the first."""
        return self.window.num_visible or query_length, 0

    def get_seq_length(self) -> int:
        return self.window.num_visible or 0

    def get_max_length(self) -> int:
        return self.num_columns


class StaticBlockCacheLayer(BlockCacheLayer):
    """A [`BlockCacheLayer`] that compiled code, and a CUDA graph, may write into."""

    is_compileable = True

    def _buffer(self, num_heads: int, head_size: int) -> torch.Tensor:
        buffer = super()._buffer(num_heads, head_size)
        torch._dynamo.mark_static_address(buffer)
        return buffer


class BlockCache(Cache):
    """Keys and values of rows that come and go, for the models of this package.

    A row has a place of `num_branches` neighbouring slots (two with guidance: conditional and unconditional). The rows
    of a pass have neighbouring places, so that it reads the buffers as they are. The last column is *scratch*: what is
    written there is never seen. It takes the tokens with which a row is filled up to the width of others.

    Args:
        num_layers (`int`), num_branches (`int`).
    """

    layer_class = BlockCacheLayer

    def __init__(self, num_layers: int, num_branches: int = 1):
        self.num_branches = num_branches
        self.num_rows = self.num_columns = 0
        self.places: dict[Row, int] = {}
        self.window = Window(torch.arange(0))
        super().__init__(layers=[self.layer_class(self.window) for _ in range(num_layers)])

    def reserve(self, num_rows: int, num_columns: int):
        """Makes room for so many rows and columns (the longest text, and one more)."""
        if num_rows <= self.num_rows and num_columns <= self.num_columns:
            return
        self.num_rows = max(num_rows, self.num_rows)
        self.num_columns = max(num_columns, self.num_columns)
        for layer in self.layers:
            layer.grow(self.num_rows * self.num_branches, self.num_columns)

    def seat(self, groups: list[list[Row]]) -> list[list[Row]]:
        """Gives the rows of each group neighbouring places, those of the first group the first, and so on.

        A row whose place is among its group's stays there; what is kept of the others moves, and nothing else is
        copied. Returns the groups in the order of their places.
        """
        old, seated, first = self.places, [], 0
        self.places = {}
        for group in groups:
            own = range(first, first + len(group))
            staying = {old[row]: row for row in group if old.get(row) in own}
            others = iter([row for row in group if old.get(row) not in own])
            seated.append([staying[place] if place in staying else next(others) for place in own])
            self.places |= dict(zip(seated[-1], own))
            first = own.stop
        moving = [row for row, place in self.places.items() if old.get(row, place) != place]
        self._move([old[row] for row in moving], [self.places[row] for row in moving])
        return seated

    def _move(self, old: list[int], new: list[int]):
        if not old:
            return
        for layer in self.layers:
            for buffer in (layer.keys, layer.values):
                places = buffer.unflatten(0, (-1, self.num_branches))
                places[torch.tensor(new, device=buffer.device)] = places[torch.tensor(old, device=buffer.device)]

    def copy(self, row: Row, num_columns: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The row's first keys and values, for each layer two tensors of shape (branches, columns, heads, size)."""
        where = self._slots([row]), slice(num_columns)
        return [(layer.keys[where], layer.values[where]) for layer in self.layers]

    def load(self, row: Row, states: list[tuple[torch.Tensor, torch.Tensor]], num_columns: int):
        """Writes the first columns of what [`copy`] returned for another row."""
        where = self._slots([row]), slice(num_columns)
        for layer, (keys, values) in zip(self.layers, states):
            if not layer.is_initialized:
                layer.lazy_initialization(keys.transpose(1, 2), values.transpose(1, 2))
            layer.keys[where], layer.values[where] = keys[:, :num_columns], values[:, :num_columns]

    def release(self, row: Row):
        """Gives up the row's place."""
        self.places.pop(row, None)

    def place(self, row: Row) -> int:
        """Where the row's slots are."""
        return self.places[row]

    def look_at(self, rows: list[Row], columns: torch.LongTensor, num_visible: int | None = None):
        """Sets what the next pass writes, `columns` (R, W) of `rows`, and how many columns it sees."""
        slots = self._slots(rows)
        columns = columns.repeat_interleave(self.num_branches, dim=0)
        self.window.index = (slots.unsqueeze(-1) * self.num_columns + columns).flatten()
        self.window.num_visible = num_visible
        first, count = int(slots[0]), len(slots)
        are_neighbours = torch.equal(slots, torch.arange(first, first + count))
        self.window.slots = slice(first, first + count) if are_neighbours else slots

    def _slots(self, rows: list[Row]) -> torch.LongTensor:
        places = torch.tensor([self.place(row) for row in rows])
        return (places.unsqueeze(-1) * self.num_branches + torch.arange(self.num_branches)).flatten()


class StaticBlockCache(BlockCache):
    """A [`BlockCache`] for passes of one shape: every row keeps its own place, and all places take part in these."""

    layer_class = StaticBlockCacheLayer

    def seat(self, groups: list[list[Row]]) -> list[list[Row]]:
        return groups

    def place(self, row: Row) -> int:
        return row.index
