"""Shadow columns: how probable committed tokens are without themselves, asked for in the pass that is run anyway.

A shadow is a further column of a pass, with a [MASK] at the position of a committed token. It sees all of the text but
that position, and itself; nothing else sees it, so that the other columns are what they are without it
(WINO, arXiv 2507.18578).

      columns  A B C a c     a and c are the shadows of A and C; B is masked
            A  x x x . .
            B  x x x . .
            C  x x x . .
            a  . x x x .
            c  x x . . x
"""

import torch
import torch.nn.functional as F

from .canvas import Row
from .frozen import FrozenPredictor
from .prediction import CachedPredictor, FullPredictor


class FullPredictorWithShadows(FullPredictor):
    """A [`FullPredictor`] that may be asked for committed positions, too."""

    def _pass(self, rows, computed, attention_mask, positions, call, texts=None) -> torch.Tensor:
        """As in the base class. Where a position is committed, the logits are those of a shadow."""
        places, index = positions
        columns = computed[positions]
        where = torch.tensor([row.index for row in rows])[places], columns
        asked = torch.arange(len(rows)).unsqueeze(-1) == places  # (R, M)
        asked &= self.canvas.tokens[where] != self.canvas.mask_token_id
        is_shadow, num_shadows = asked.any(0), int(asked.sum(-1).max())
        if num_shadows == 0:
            return super()._pass(rows, computed, attention_mask, positions, call, texts)
        rank = (asked.cumsum(-1) - 1)[places, torch.arange(len(places))]
        shadows = torch.full((len(rows), num_shadows), -1)
        shadows[places[is_shadow], rank[is_shadow]] = columns[is_shadow]
        index = torch.where(is_shadow, computed.shape[1] + rank, index)
        mask = self._mask(attention_mask, computed, shadows)
        self._make_room(rows, computed, num_shadows)
        return super()._pass(rows, computed, mask, (places, index), call, texts, shadows.clamp(min=0))

    def _num_visible(self, computed: torch.LongTensor) -> int:
        """Columns of text that the pass sees."""
        visible = None if self.cache is None else self.cache.window.num_visible
        return computed.shape[1] if visible is None else visible

    def _mask(self, attention_mask: torch.BoolTensor | None, computed, shadows: torch.LongTensor) -> torch.BoolTensor:
        """The mask (R, 1, W + W', visible + W') of a pass of W columns and W' shadows; -1 is a shadow of nothing."""
        num_visible, (num_rows, num_shadows) = self._num_visible(computed), shadows.shape
        text = torch.ones(num_rows, num_visible, dtype=torch.bool) if attention_mask is None else attention_mask
        text = (text.unsqueeze(1) if text.ndim == 2 else text.squeeze(1)).expand(-1, computed.shape[1], -1)
        sees = text[torch.arange(num_rows).unsqueeze(-1), torch.searchsorted(computed.contiguous(), shadows)]
        itself = torch.eye(num_shadows, dtype=torch.bool).expand(num_rows, -1, -1)
        shadow = torch.cat([sees & (torch.arange(num_visible) != shadows.unsqueeze(-1)), itself], dim=-1)
        return torch.cat([F.pad(text, (0, num_shadows)), shadow], dim=1).unsqueeze(1)

    def _make_room(self, rows: list[Row], computed: torch.LongTensor, num_shadows: int):
        """Lets the cache take the shadows' keys after the columns of text that the pass sees."""
        if self.cache is None:
            return
        num_visible = self._num_visible(computed)
        own = torch.arange(num_visible, num_visible + num_shadows).expand(len(rows), -1)
        seen = None if self.cache.window.num_visible is None else num_visible + num_shadows
        self.cache.look_at(rows, torch.cat([computed, own], dim=-1), seen)


class CachedPredictorWithShadows(FullPredictorWithShadows, CachedPredictor):
    """The same over a cache, which has the shadows' keys after those of the longest text, for one pass."""

    def begin(self, row: Row):
        super().begin(row)
        num_shadows = max(each.settings.block_length for each in self.computed)
        self.cache.reserve(len(self.computed), max(each.end for each in self.computed) + num_shadows + 1)


class FrozenPredictorWithShadows(CachedPredictorWithShadows, FrozenPredictor):
    """The same over keys and values that are final."""
