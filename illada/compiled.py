"""Compiled block passes: one shape, one compilation, for all blocks, rows and later calls of like length."""

import threading
import weakref
from dataclasses import replace

import torch
from transformers.generation.configuration_utils import CompileConfig

from .block_cache import StaticBlockCache
from .canvas import Row, without_drafts
from .frozen import FrozenPredictor
from .prediction import BUCKET, CachedPredictor
from .tree import Tree


class CompiledPasses:
    """What is kept for later compiled calls of a model: compiled functions, and caches that no call is using.

    CUDA graphs know a cache by its address, and a compiled function is made for its shape, so a later call borrows the
    cache of an earlier one. Two calls at a time have a cache each. All of it is kept beside the model, which can be
    copied and pickled as before, and goes with it.
    """

    MAX_FREE_CACHES = 4

    def __init__(self):
        self.lock, self.functions = threading.Lock(), {}
        self.free: list[tuple[tuple, StaticBlockCache]] = []

    def function(self, decoder, compile_config: CompileConfig):
        """The compiled call of the decoder."""
        with self.lock:
            key = (id(decoder), str(compile_config))
            if key not in self.functions:
                self.functions[key] = torch.compile(decoder.__call__, **compile_config.to_dict())
            return self.functions[key]

    def borrow(self, key: tuple) -> StaticBlockCache | None:
        """A free cache that was given back with this key."""
        with self.lock:
            for index, (free_key, cache) in enumerate(self.free):
                if free_key == key:
                    del self.free[index]
                    return cache

    def give_back(self, key: tuple, cache: StaticBlockCache):
        with self.lock:
            self.free = [*self.free, (key, cache)][-self.MAX_FREE_CACHES :]


_PASSES: "weakref.WeakKeyDictionary[torch.nn.Module, CompiledPasses]" = weakref.WeakKeyDictionary()


class CompiledPredictor(CachedPredictor):
    """A [`CachedPredictor`] whose block passes go to the compiled decoder, in one shape.

    Rows keep the place of their row in the canvas, and all places take part in every block pass.
    """

    def __init__(self, model, canvas, device, num_branches: int, compile_config: CompileConfig):
        super().__init__(model, canvas, device, num_branches)
        self.cache, self.num_columns, self.width, self.num_candidates = None, 0, 0, 1
        self.passes = _PASSES.setdefault(model, CompiledPasses())
        self.decoder = self.passes.function(model.get_decoder(), compile_config)

    def _reserve(self, row: Row):
        self.num_columns = max(self.num_columns, -(-(row.end + 1) // BUCKET) * BUCKET)
        block_length = row.settings.block_length
        self.width = max(self.width, -(-len(self.computed[row]) // block_length) * block_length)
        self.num_candidates = row.settings.num_candidates

    @property
    def num_further(self) -> int:
        """Columns of drafts, after those of the longest text."""
        return (self.num_candidates - 1) * self.width

    def close(self):
        """Leaves the cache to later calls."""
        if self.cache is not None:
            self.passes.give_back(self._key(self.cache.num_columns), self.cache)
            self.cache = None

    def logits(self, rows: list[Row], places: torch.LongTensor, columns: torch.LongTensor) -> torch.Tensor:
        num_layers, num_columns = self.model.config.num_hidden_layers, self.num_columns + self.num_further
        if self.cache is None:
            self.cache = self.passes.borrow(self._key(num_columns))
            self.cache = StaticBlockCache(num_layers, self.num_branches) if self.cache is None else self.cache
        self.cache.reserve(self.canvas.num_rows, num_columns)
        return super().logits(rows, places, columns)

    def _key(self, num_columns: int) -> tuple:
        """What a cache is made for: its shape, and the dtype of keys and values."""
        return self.canvas.num_rows, num_columns, self.num_branches, self.dtype, self.device

    def _blocks(self, rows: list[Row], places: torch.LongTensor, columns: torch.LongTensor) -> torch.Tensor:
        own = without_drafts(rows)
        row_at = {row.index: row for row in own}
        # A place without a row computes the scratch column, and sees one column.
        everyone = [row_at.get(i) or replace(own[0], index=i, length=1) for i in range(self.canvas.num_rows)]
        num_visible = self.cache.num_columns
        computed = torch.full((len(everyone), self.width), num_visible - 1)
        computed[list(row_at)] = self._lay_out([self.computed[row] for row in own], self.width)
        tree = Tree(everyone, rows, computed, num_visible - 1 - self.num_further, self.num_candidates)
        return self._over_cache(everyone, tree, num_visible, places, columns, self._call_compiled)

    def _call_compiled(self, inputs: dict, positions: tuple[torch.LongTensor, torch.LongTensor]) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        hidden_states = self.decoder(**inputs, past_key_values=self.cache).last_hidden_state
        return self.model.get_output_embeddings()(hidden_states[positions])


class CompiledFrozenPredictor(CompiledPredictor, FrozenPredictor):
    """A [`FrozenPredictor`] whose passes of a block by itself go to the compiled decoder, in one shape."""
