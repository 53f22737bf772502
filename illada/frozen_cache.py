"""Keys and values of the beginnings of finished texts, kept from one call to later ones."""

import threading
import weakref
from dataclasses import dataclass

import torch
from torch import nn

KeysAndValues = list[tuple[torch.Tensor, torch.Tensor]]
"""For each layer, two tensors of shape (branches, columns, heads, head size)."""


@dataclass(eq=False)
class KeptText:
    """The beginning of a text, up to the end of a segment.

    Attributes:
        model (`tuple`): the weights that computed it, see [`state_of`].
        tokens (`torch.LongTensor` of shape `(branches, S)`): what the model saw, on the host.
        ends (`list[int]`): where its segments end, the last of them at S.
        states: keys and values.
    """

    model: tuple
    tokens: torch.LongTensor
    ends: list[int]
    states: KeysAndValues

    def shared_length(self, model: tuple, tokens: torch.LongTensor, ends: list[int]) -> int:
        """Columns of a text for which these keys and values are what the model would compute: whole segments whose
        tokens, and those of all segments before them, are the same."""
        if model != self.model or len(tokens) != len(self.tokens):
            return 0
        width = min(tokens.shape[1], self.tokens.shape[1])
        differs = (tokens[:, :width] != self.tokens[:, :width]).any(0).nonzero()
        num_equal, shared = int(differs[0]) if len(differs) else width, 0
        for end, own in zip(ends, self.ends):
            if end != own or end > num_equal:
                break
            shared = end
        return shared


class FrozenCache:
    """Keys and values for `generate(block_cache="frozen", cache=...)`, which finds a prompt's beginning here and
    leaves its texts for later calls.

    What is found is what would be computed, so that a text does not depend on it. It belongs to one model with its
    weights and adapters as they are; after a training step, and for another model, nothing is found. Any number of
    threads may use it.

    Args:
        max_tokens (`int`, defaults to 16,384): tokens of all texts together; those that were not used for the longest
            time are dropped first.
    """

    def __init__(self, max_tokens: int = 16384):
        if not isinstance(max_tokens, int) or max_tokens < 1:
            raise ValueError(f"`max_tokens` must be an integer of at least 1, got {max_tokens!r}.")
        self.max_tokens = max_tokens
        self._texts: list[KeptText] = []
        self._lock = threading.Lock()

    @property
    def num_tokens(self) -> int:
        """Tokens that are kept."""
        return sum(text.ends[-1] for text in self._texts)

    def clear(self):
        """Drops everything."""
        with self._lock:
            self._texts = []

    def find(self, model: tuple, tokens: torch.LongTensor, ends: list[int]) -> tuple[int, KeysAndValues] | None:
        """The longest beginning of a text that is kept: its columns, and keys and values of at least so many."""
        with self._lock:
            lengths = {text: text.shared_length(model, tokens, ends) for text in self._texts}
            best = max(self._texts, key=lengths.get, default=None)
            if best is None or not lengths[best]:
                return None
            self._texts.remove(best)
            self._texts.append(best)
            return lengths[best], best.states

    def keep(self, text: KeptText):
        """Adds a text, in place of those that it begins with."""
        length = text.ends[-1]
        if length > self.max_tokens:
            return
        with self._lock:
            others = [old for old in self._texts if text.shared_length(old.model, old.tokens, old.ends) < old.ends[-1]]
            self._texts = [*others, text]
            while self.num_tokens > self.max_tokens:
                del self._texts[0]


def check_cache(cache: FrozenCache | None, block_cache: str | None):
    """Raises a `ValueError` if this is no cache, or nothing would read it."""
    if not isinstance(cache, FrozenCache | None):
        raise ValueError(f"`cache` must be a FrozenCache, got {cache!r}.")
    if cache is not None and block_cache != "frozen":
        raise ValueError(f"`cache` must come with `block_cache='frozen'`, got {block_cache!r}.")


def state_of(model: nn.Module, dtype: torch.dtype) -> tuple:
    """What keys and values depend on beside the tokens: equal for a model whose weights have not been changed in
    place, whose adapters are switched as they were, and which computes in the same dtype."""
    weights = sum(0 if weight.is_inference() else weight._version for weight in model.parameters())
    adapters = [
        (tuple(module.active_adapters), module.disable_adapters, tuple(module.merged_adapters))
        for module in model.modules()
        if hasattr(module, "merged_adapters")
    ]
    return weakref.ref(model), dtype, weights, adapters
