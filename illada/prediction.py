"""Predictors: the logits of masked positions, from whole texts or from a block of each over cached keys and values.

A predictor serves the rows of one engine that were admitted with the same kind of settings:

    begin(row)                      a block of the row opens
    logits(rows, places, columns)   (M, V): of M positions, at `columns` of the rows at `places` in `rows`
    may_be_drafted(row)             whether the row's next step may be decided in the pass of an earlier text, of which
                                    it was a draft; if not, that pass is of another kind
    end(row)                        the row leaves
    close()                         nothing more will be asked

Rows come and go between passes, and what a row gets does not depend on the rows beside it. Its drafts are among them.
Positions arrive on the host, so that nothing has to be read from the device.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F

from .block_cache import BlockCache
from .canvas import Canvas, Row, without_drafts
from .commit_rules import rule_of
from .generation_config import MaskedDiffusionGenerationConfig
from .logits import guide, promote
from .tree import Tree

BUCKET = 128
"""In columns. Rows whose texts differ by less share a full pass; the cache of compiled passes grows in such steps."""


class Predictor(Protocol):
    """What the loop asks of any engine that runs the model; see the module's docstring."""

    def begin(self, row: Row): ...

    def logits(self, rows: list[Row], places: torch.LongTensor, columns: torch.LongTensor) -> torch.Tensor: ...

    def may_be_drafted(self, row: Row) -> bool: ...

    def end(self, row: Row): ...

    def close(self): ...


def predictor_key(config: MaskedDiffusionGenerationConfig) -> tuple:
    """Rows of equal keys share a predictor."""
    compiled = str(config.compile_config) if config.compile else None
    num_candidates = config.num_candidates if config.block_cache else None
    return config.block_cache, is_guided(config), compiled, rule_of(config).has_shadows, num_candidates


def is_guided(config: MaskedDiffusionGenerationConfig) -> bool:
    return config.guidance_scale not in (None, 1)


def groups_of_like_length(rows: list[Row], length: Callable[[Row], int] = lambda row: row.length) -> list[list[Row]]:
    """Rows that share a pass: none is a bucket or more shorter than the longest of its group."""
    order = {row: place for place, row in enumerate(rows)}
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -length(row)):
        if groups and length(groups[-1][0]) - length(row) < BUCKET:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [sorted(group, key=order.__getitem__) for group in groups]


def texts_only(rows: list[Row], num_visible: int) -> torch.BoolTensor | None:
    """The mask (R, num_visible) under which each row sees its own text; none where that is all there is to see."""
    lengths = torch.tensor([row.length for row in rows])
    return None if int(lengths.min()) >= num_visible else torch.arange(num_visible) < lengths.unsqueeze(-1)


class FullPredictor:
    """Every pass computes whole texts: exact.

    Args:
        model: called as `model(input_ids, attention_mask, position_ids, logits_to_keep)`, with a cache also with
            `past_key_values`.
        canvas ([`Canvas`]): read.
        device (`torch.device`): where the model's inputs go.
        num_branches (`int`):
            2 for guided rows: each takes two sequences of a pass, of which the second does not see what the caller
            gave, and the row's `guidance_scale` weighs them. 1 for others.
    """

    cache: BlockCache | None = None

    def __init__(self, model, canvas: Canvas, device: torch.device, num_branches: int = 1):
        self.model, self.canvas, self.device, self.num_branches = model, canvas, device, num_branches

    def begin(self, row: Row):
        pass

    def may_be_drafted(self, row: Row) -> bool:
        return True

    def end(self, row: Row):
        pass

    def close(self):
        pass

    def logits(self, rows: list[Row], places: torch.LongTensor, columns: torch.LongTensor) -> torch.Tensor:
        place_of = {row: place for place, row in enumerate(rows)}
        groups = [[place_of[row] for row in group] for group in groups_of_like_length(rows)]
        return self._in_groups(rows, groups, places, columns, self._whole_texts)

    def _in_groups(self, rows, groups: list[list[int]], places, columns, run: Callable) -> torch.Tensor:
        """Logits (M, V) of `run(rows of the group, places, columns)` for each group, in the order of the positions."""
        if len(groups) == 1 and len(groups[0]) == len(rows) and groups[0] == sorted(groups[0]):
            return run(rows, places, columns)
        picked, logits = [], []
        for group in groups:
            place_in_group = torch.full((len(rows),), -1)
            place_in_group[group] = torch.arange(len(group))
            mine = (place_in_group[places] >= 0).nonzero().squeeze(-1)
            picked.append(mine)
            logits.append(run([rows[place] for place in group], place_in_group[places[mine]], columns[mine]))
        return torch.cat(logits)[torch.cat(picked).argsort().to(logits[0].device)]

    def _whole_texts(self, rows: list[Row], places: torch.LongTensor, columns: torch.LongTensor) -> torch.Tensor:
        width = max(row.length for row in rows)
        computed = torch.arange(width).expand(len(rows), -1)
        if self.cache is not None:
            self.cache.look_at(rows, computed)
        return self._pass(rows, computed, texts_only(rows, width), (places, columns), self._call_model)

    def _pass(
        self,
        rows: list[Row],
        computed: torch.LongTensor,
        attention_mask: torch.BoolTensor | None,
        positions: tuple[torch.LongTensor, torch.LongTensor],
        call: Callable,
        texts: torch.LongTensor | None = None,
        shadows: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """Logits (M, V) of a pass that computes these columns (R, W), and sees what `attention_mask` lets it see.

        `positions` are rows and columns (M,) of the pass. `texts` (R, W) says in which row of the canvas each column
        is, if not in its own. `shadows` (R, W') are further columns, each with a [MASK] in the place of one of the
        text.
        """
        canvas, num_columns = self.canvas, self.canvas.tokens.shape[1]
        texts = torch.tensor([[row.index] for row in rows]) if texts is None else texts
        read = texts, computed.clamp(max=num_columns - 1)  # the scratch column may contain any token
        tokens, given, position_ids = canvas.tokens[read], canvas.given[read], read[1]
        if shadows is not None:
            tokens = F.pad(tokens, (0, shadows.shape[1]), value=canvas.mask_token_id)
            given = F.pad(given, (0, shadows.shape[1]), value=False)
            position_ids = torch.cat([position_ids, shadows], dim=-1)
        inputs = {"input_ids": tokens, "attention_mask": attention_mask, "position_ids": position_ids}
        if self.num_branches == 2:
            inputs = {name: x if x is None else x.repeat_interleave(2, dim=0) for name, x in inputs.items()}
            inputs["input_ids"][1::2].masked_fill_(given, canvas.mask_token_id)
            scales = torch.tensor([row.settings.guidance_scale for row in rows])[positions[0]].unsqueeze(-1)
            positions = tuple(
                torch.cat(pair) for pair in ((2 * positions[0], 2 * positions[0] + 1), (positions[1], positions[1]))
            )
        inputs = {name: x if x is None else x.to(self.device, non_blocking=True) for name, x in inputs.items()}
        logits = promote(call(inputs, tuple(index.to(self.device, non_blocking=True) for index in positions)))
        if self.num_branches == 2:
            logits = guide(*logits.chunk(2), scales.to(logits))
        return logits

    def _call_model(self, inputs: dict, positions: tuple[torch.LongTensor, torch.LongTensor]) -> torch.Tensor:
        if self.cache is not None:
            inputs["past_key_values"] = self.cache
        return self.model(**inputs, logits_to_keep=positions).logits


class CachedPredictor(FullPredictor):
    """The first pass of a block, every `cache_refresh_interval`-th, and those after a commit of more entropy than
    `cache_refresh_entropy` compute the row's whole text; the others the block (`"dual"`), or the block and what
    follows it (`"prefix"`), over the keys and values of the last full pass.

    `computed` are the columns of each row's block passes.
    """

    def __init__(self, model, canvas: Canvas, device: torch.device, num_branches: int = 1):
        super().__init__(model, canvas, device, num_branches)
        self.cache = BlockCache(model.config.num_hidden_layers, self.num_branches)
        self.computed: dict[Row, torch.LongTensor] = {}

    def begin(self, row: Row):
        self.computed[row] = self._columns_of(row)
        self._reserve(row)

    def may_be_drafted(self, row: Row) -> bool:
        return not _is_refreshed(row)

    def end(self, row: Row):
        self.computed.pop(row, None)
        if self.cache is not None:
            self.cache.release(row)

    @property
    def dtype(self) -> torch.dtype:
        """That of keys and values, which autocast changes."""
        device = self.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.model.dtype

    def _reserve(self, row: Row):
        width = (row.settings.num_candidates - 1) * max(map(len, self.computed.values()))
        self.cache.reserve(len(self.computed), max(each.end for each in self.computed) + width + 1)

    @staticmethod
    def _columns_of(row: Row) -> torch.LongTensor:
        return row.block if row.settings.block_cache == "dual" else torch.arange(int(row.block[0]), row.length)

    def logits(self, rows: list[Row], places: torch.LongTensor, columns: torch.LongTensor) -> torch.Tensor:
        full = [row for row in without_drafts(rows) if _is_refreshed(row)]
        for row in full:
            self.cache.release(row)  # all of it is computed again
        part = [row for row in without_drafts(rows) if row not in set(full)]
        return self._in_seats(rows, part, groups_of_like_length(full), places, columns, self._whole_texts)

    def _in_seats(
        self, rows: list[Row], part: list[Row], others: list[list[Row]], places, columns, run: Callable
    ) -> torch.Tensor:
        """Logits (M, V) of a block pass for the rows of `part` and their drafts, and of `run` for each group of the
        others."""
        part, *others = self.cache.seat([part, *others])
        part = [*part, *(draft for row in part for draft in row.drafts)]
        place_of = {row: place for place, row in enumerate(rows)}
        runs = [(run, group) for group in others] + ([(self._blocks, part)] if part else [])
        groups = [[place_of[row] for row in group] for _, group in runs]
        run = iter([run for run, _ in runs])
        return self._in_groups(rows, groups, places, columns, lambda *arguments: next(run)(*arguments))

    def _blocks(self, rows: list[Row], places: torch.LongTensor, columns: torch.LongTensor) -> torch.Tensor:
        """A pass over the blocks of rows in the first places of the cache, in that order, and of their drafts."""
        own = without_drafts(rows)
        computed, num_text = self._lay_out([self.computed[row] for row in own]), max(row.length for row in own)
        tree = Tree(own, rows, computed, num_text, 1 + max(len(row.drafts) for row in own))
        num_visible = num_text + tree.num_further
        return self._over_cache(own, tree, num_visible, places, columns, self._call_model)

    def _over_cache(self, rows, tree: Tree, num_visible: int, places, columns, call: Callable) -> torch.Tensor:
        """A pass over the columns of a tree."""
        self.cache.look_at(rows, tree.written, num_visible)
        mask = texts_only(rows, num_visible)
        if tree.num_candidates > 1:
            mask = tree.mask(num_visible, self.device)
        return self._pass(rows, tree.columns, mask, tree.index(places, columns), call, tree.texts)

    def _lay_out(self, computed: list[torch.LongTensor], width: int = 0) -> torch.LongTensor:
        """The columns (R, W) to compute, filled up with the scratch column."""
        width, scratch = max(width, *(len(each) for each in computed)), self.cache.num_columns - 1
        return torch.stack([F.pad(each, (0, width - len(each)), value=scratch) for each in computed])


def _is_refreshed(row: Row) -> bool:
    interval = row.settings.cache_refresh_interval
    is_due = row.block_steps == 0 if interval is None else row.block_steps % interval == 0
    return is_due or row.is_stale
