"""Logits of masked positions: from the whole canvas, or from a block of it over cached keys and values."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers.generation.configuration_utils import CompileConfig

from .block_cache import BlockCache, StaticBlockCache
from .canvas import Block, Canvas
from .generation_config import MaskedDiffusionGenerationConfig
from .logits import guide, promote

BUCKET = 128
"""In columns. The canvas of a compiled block forward is a multiple of this, so that calls of similar length share a
shape; and rows whose padding is the same number of buckets share a full forward."""


class Predictor:
    """Runs the model on a canvas, in full or over a [`BlockCache`].

    Without a cache every pass is full. With one, the first pass of a block is, and every `cache_refresh_interval`-th;
    the others recompute of each row the block alone (`"dual"`), or the block and all behind it (`"prefix"`).

    Args:
        model: called as `model(input_ids, attention_mask, position_ids, logits_to_keep)`, with a cache also with
            `past_key_values`. With `config.compile` block forwards go to its decoder and its output embeddings.
        canvas ([`Canvas`]): read.
        config ([`MaskedDiffusionGenerationConfig`]): with every field set.
        max_length (`int`): columns of the longest canvas to come.
    """

    def __init__(self, model, canvas: Canvas, config: MaskedDiffusionGenerationConfig, max_length: int):
        self.model, self.canvas, self.config, self.max_length = model, canvas, config, max_length
        self.num_branches = 2 if config.guidance_scale not in (None, 1) else 1
        self.first_columns = canvas.attention_mask.int().argmax(-1).tolist()
        self.cache = self.compiled_decoder = self.static_width = None
        if config.compile:
            self.compiled_decoder = self._compiled_decoder()
            self.cache, self.static_width = self._static_cache(), self._static_width()
        elif config.block_cache is not None:
            num_layers = model.config.num_hidden_layers
            self.cache = BlockCache(num_layers, len(canvas.tokens), max_length + 1, self.num_branches)

    def begin(self, block: Block):
        """Opens a block: its next pass will be full."""
        self.num_passes = 0
        if self.cache is not None:
            self._lay_out(block)

    def seat(self, rows: torch.LongTensor) -> torch.LongTensor:
        """Chooses the rows of the next pass; `rows` (R,), on the host, must be in it. Returns them in its order."""
        interval = self.config.cache_refresh_interval
        is_refresh = self.num_passes == 0 if interval is None else self.num_passes % interval == 0
        self.is_full = self.cache is None or is_refresh
        self.num_passes += 1
        if self.cache is None:
            self.rows = rows
        else:
            self.cache.seat(rows) if self.is_full else self.cache.retain(rows)
            self.rows = self.cache.rows
        is_asked = torch.isin(self.rows, rows)
        self.asked = is_asked.nonzero().squeeze(-1)
        return self.rows[is_asked]

    def __call__(self, row_index: torch.LongTensor, columns: torch.LongTensor) -> torch.Tensor:
        """Logits (M, V), at least fp32, of the positions with these columns (M,) in these of the rows of `seat`.

        Both are on the host, so that nothing has to be read from the device. Without a cache, rows that are much
        longer than others have a forward pass of their own, and no pass has columns that are padding in all its rows.
        """
        if self.cache is not None:
            return self._logits(self.rows, self.asked[row_index], columns)
        groups: dict[int, list[int]] = {}
        for place, row in enumerate(self.rows.tolist()):
            groups.setdefault(self.first_columns[row] // BUCKET, []).append(place)
        if len(groups) == 1:
            return self._logits(self.rows, row_index, columns)

        picked, logits = [], []
        for places in map(torch.tensor, groups.values()):
            picked.append(torch.isin(row_index, places).nonzero().squeeze(-1))
            row_in_group = torch.searchsorted(places, row_index[picked[-1]])
            logits.append(self._logits(self.rows[places], row_in_group, columns[picked[-1]]))
        return torch.cat(logits)[torch.cat(picked).argsort().to(logits[0].device)]

    def _logits(self, rows: torch.LongTensor, row_index: torch.LongTensor, columns: torch.LongTensor) -> torch.Tensor:
        """Logits (M, V), at least fp32, of the positions with these columns (M,) in these of `rows` (R,), one pass."""
        canvas = self.canvas
        first_columns = [self.first_columns[row] for row in rows.tolist()]
        first = min(first_columns) if self.cache is None else 0
        rows, row_index, columns = (tensor.to(canvas.tokens.device) for tensor in (rows, row_index, columns))
        if self.is_full:
            computed = torch.arange(first, canvas.length, device=rows.device).expand(len(rows), -1)
            index, num_visible = columns - first, canvas.length
        else:
            computed, index = self.columns[rows], self.index[rows[row_index], columns]
            num_visible = self.cache.num_visible(canvas.length)
        if self.cache is not None:
            self.cache.look_at(computed, None if self.is_full else num_visible)

        read = (rows.unsqueeze(-1), computed.clamp(max=canvas.length - 1))  # in the scratch column stands any token
        num_unused = num_visible - canvas.length
        attention_mask = F.pad(canvas.attention_mask[rows, first:], (0, num_unused), value=False)
        inputs = {
            "input_ids": canvas.tokens[read],
            "attention_mask": attention_mask if max(first_columns) > first or num_unused else None,
            "position_ids": canvas.position_ids[read],
        }
        if self.num_branches == 2:
            inputs = {name: x if x is None else x.repeat_interleave(2, dim=0) for name, x in inputs.items()}
            inputs["input_ids"][1::2].masked_fill_(canvas.given[read], canvas.mask_token_id)
            row_index, index = torch.cat([2 * row_index, 2 * row_index + 1]), torch.cat([index, index])
        logits = promote(self._forward((row_index, index), inputs))
        if self.num_branches == 2:
            conditional, unconditional = logits.chunk(2)
            logits = guide(conditional, unconditional, self.config.guidance_scale)
        return logits

    def _forward(self, positions: tuple[torch.LongTensor, torch.LongTensor], inputs: dict) -> torch.Tensor:
        """Logits (M, V) of these rows and columns (M,) of the inputs."""
        if self.cache is not None:
            inputs["past_key_values"] = self.cache
        if self.is_full or self.compiled_decoder is None:
            return self.model(**inputs, logits_to_keep=positions).logits
        torch.compiler.cudagraph_mark_step_begin()
        hidden_states = self.compiled_decoder(**inputs).last_hidden_state
        return self.model.get_output_embeddings()(hidden_states[positions])

    def _lay_out(self, block: Block):
        """Sets the columns (B, W) that block forwards compute, and the place (B, S) of each column among them."""
        canvas, scratch = self.canvas, self.cache.num_columns - 1
        is_computed = torch.zeros_like(canvas.attention_mask)
        is_computed[:, block.start : block.end] = block.active
        if self.config.block_cache == "prefix":
            is_computed = is_computed.cumsum(-1) > 0
        columns = torch.arange(canvas.length, device=is_computed.device)
        columns = torch.where(is_computed, columns, scratch).sort(dim=-1).values
        width = self.static_width or int(is_computed.sum(-1).max())
        self.columns = F.pad(columns, (0, max(width - columns.shape[1], 0)), value=scratch)[:, :width]
        self.index = is_computed.cumsum(-1) - 1

    def _compiled_decoder(self) -> Callable:
        """The decoder's compiled call, which it keeps for later calls; a copy of the model has to make its own."""
        compile_config, decoder = self.config.compile_config or CompileConfig(dynamic=False), self.model.get_decoder()
        key = (id(decoder), compile_config)
        if getattr(decoder, "_compiled_block_pass", (None,))[0] != key:
            decoder._compiled_block_pass = key, torch.compile(decoder.__call__, **compile_config.to_dict())
        return decoder._compiled_block_pass[1]

    def _static_cache(self) -> StaticBlockCache:
        """The cache of compiled passes. The decoder keeps it for later calls, since CUDA graphs know its address."""
        num_columns = -(-(self.max_length + 1) // BUCKET) * BUCKET
        shape = (self.model.config.num_hidden_layers, len(self.canvas.tokens), num_columns, self.num_branches)
        key = (shape, self.model.dtype, self.model.device)
        decoder = self.model.get_decoder()
        if getattr(decoder, "_static_block_cache", (None,))[0] != key:
            decoder._static_block_cache = key, StaticBlockCache(*shape)
        return decoder._static_block_cache[1]

    def _static_width(self) -> int:
        """Columns of every compiled pass: those of the widest block, in whole blocks."""
        canvas, config = self.canvas, self.config
        if config.block_cache == "dual":
            return config.block_length
        is_blank = canvas.masked[:, : canvas.prompt_length].any(0)
        first = int(is_blank.int().argmax()) if is_blank.any() else canvas.prompt_length
        end = self.max_length if config.canvas == "fixed" else canvas.prompt_length
        return max(1, -(-(end - first) // config.block_length)) * config.block_length
