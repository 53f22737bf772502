"""Keys and values kept between the steps of a block, so that a step recomputes a few columns instead of the canvas.

The attention is inherited and unmodified: it hands its keys and values to `Cache.update` and attends to what comes
back. A *full* forward pass, of the whole canvas, leaves them here; a *block* forward pass runs on the columns that are
to be recomputed, writes theirs in place and sees everything. The buffers are allocated once.

This is an approximation: under attention in both directions the keys of a prefix depend on the block behind it, and
here they stay as they were in the last full pass (Fast-dLLM, arXiv 2505.22618: prefix cache and dual cache).
"""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class Window:
    """What the next forward pass writes and sees.

    Attributes:
        index (`torch.LongTensor` of shape `(R * W,)`): where each token goes, as `slot * num_columns + column`.
        num_visible (`int`, *optional*): columns that are seen; only the pass's own if absent, in a full forward.
    """

    index: torch.LongTensor
    num_visible: int | None = None


class BlockCacheLayer(CacheLayerMixin):
    """One layer's keys and values: two buffers of shape (slots, columns, heads, head size).

    A slot is one sequence of the forward pass. A column's keys are one piece of memory, so that a block is written in
    one copy, whatever columns its rows have.
    """

    is_sliding = False

    def __init__(self, num_slots: int, num_columns: int, window: Window):
        super().__init__()
        self.num_slots, self.num_columns, self.window = num_slots, num_columns, window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor):
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_zeros(self.num_slots, self.num_columns, states.shape[1], states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

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
        visible = slice(len(key_states)), slice(self.window.num_visible)
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

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor):
        super().lazy_initialization(key_states, value_states)
        for buffer in (self.keys, self.values):
            torch._dynamo.mark_static_address(buffer)


class BlockCache(Cache):
    """Keys and values of a canvas, for the models of this package.

    Rows of the canvas sit in places of `num_branches` neighbouring slots (two with guidance: conditional and
    unconditional). The last column is *scratch*: what is written there is never seen. It takes the tokens with which
    a row is filled up to the width of others.

    Args:
        num_layers (`int`), num_rows (`int`), num_branches (`int`).
        num_columns (`int`): the longest canvas, and one more.
    """

    layer_class = BlockCacheLayer

    def __init__(self, num_layers: int, num_rows: int, num_columns: int, num_branches: int = 1):
        self.num_rows, self.num_columns, self.num_branches = num_rows, num_columns, num_branches
        self.rows = self.places = torch.arange(0)
        self.window = Window(self.rows)
        num_slots = num_rows * num_branches
        super().__init__(layers=[self.layer_class(num_slots, num_columns, self.window) for _ in range(num_layers)])

    def seat(self, rows: torch.LongTensor):
        """Gives `rows` (R,), indices of the canvas on the host, the first R places; a full forward must follow."""
        self.rows, self.places = rows, torch.arange(len(rows))

    def retain(self, rows: torch.LongTensor):
        """Gives up all rows but these. `self.rows` is then their order in the first places.

        Only rows behind the first R places move, to places that became free: nothing is copied but them.
        """
        stays = torch.isin(self.rows, rows)
        count = len(rows)
        free = (~stays[:count]).nonzero().squeeze(-1)
        moving = count + stays[count:].nonzero().squeeze(-1)
        order = self.rows[:count].clone()
        order[free] = self.rows[moving]
        self.rows, self.places = order, torch.arange(count)
        if len(moving) == 0:
            return
        for layer in self.layers:
            for buffer in (layer.keys, layer.values):
                places = buffer.unflatten(0, (-1, self.num_branches))
                places[free.to(buffer.device)] = places[moving.to(buffer.device)]

    def num_visible(self, length: int) -> int:
        """How many columns a block forward sees when the canvas has `length`."""
        return length

    def look_at(self, columns: torch.LongTensor, num_visible: int | None = None):
        """Sets what the next forward pass writes, `columns` (R, W) of the rows here, and how many columns it sees."""
        branches = torch.arange(self.num_branches)
        slots = (self.places.unsqueeze(-1) * self.num_branches + branches).flatten().to(columns.device)
        columns = columns.repeat_interleave(self.num_branches, dim=0)
        self.window.index = (slots.unsqueeze(-1) * self.num_columns + columns).flatten()
        self.window.num_visible = num_visible


class StaticBlockCache(BlockCache):
    """A [`BlockCache`] whose block forwards have one shape: every row keeps its own place, and takes part always."""

    layer_class = StaticBlockCacheLayer

    def seat(self, rows: torch.LongTensor):
        self.rows = self.places = rows

    def retain(self, rows: torch.LongTensor):
        self.rows = self.places = torch.arange(self.num_rows)

    def num_visible(self, length: int) -> int:
        return self.num_columns
