"""Run in a process of its own: a cached block on a Transformers that knows `past_key_values` under one name only.

Transformers 5.24 calls a cache `cache` and renames the old keyword on the way, until 5.40. Here that shim is taken
away before its modules are imported, so that the old keyword falls into `**kwargs`, and a warning is an error.
Prints tokens of cached generation, and the largest difference between the logits of a cached block and a full pass.
"""

import json
import warnings

from transformers.utils import deprecation, generic


def without_shim(old_name, *args, shim=deprecation.deprecate_kwarg, **kwargs):
    return (lambda function: function) if old_name == "past_key_values" else shim(old_name, *args, **kwargs)


def refuse_old_name(kwargs):
    if "past_key_values" in kwargs:
        raise TypeError("unexpected keyword argument 'past_key_values'")


if hasattr(generic, "_rename_kwargs_for_bc"):
    deprecation.deprecate_kwarg = without_shim
    generic._rename_kwargs_for_bc = refuse_old_name
warnings.simplefilter("error", FutureWarning)

import torch  # noqa: E402
from tiny_models import pad_left, random_model  # noqa: E402

from illada.block_cache import BlockCache  # noqa: E402
from illada.canvas import Row  # noqa: E402

BATCH = pad_left([[7, 8, 9, 10, 11, 12, 13], [9, 8], [14, 15, 16, 17]])


def largest_difference() -> float:
    """Between the logits of a full pass and of a block pass right after it, which sees what the full one left."""
    model, tokens = random_model(0, num_layers=3), torch.arange(6, 18).view(2, 6)
    rows = [Row(index, None, prompt_length=6, end=6, length=6) for index in range(2)]
    cache = BlockCache(num_layers=3)
    cache.reserve(num_rows=2, num_columns=7)
    positions = torch.arange(6).expand(2, -1)
    differences = []
    with torch.no_grad():
        cache.seat([rows])
        for columns in (positions, positions[:, 2:4]):
            cache.look_at(rows, columns, None if columns is positions else 6)
            for name in ("past_key_values", "cache"):
                part = tokens.gather(1, columns)
                logits = model(part, position_ids=columns, **{name: cache}).logits
                differences.append((logits - model(tokens).logits[:, columns[0]]).abs().max().item())
    return max(differences)


def generated(block_cache: str) -> list:
    settings = {"max_new_tokens": 16, "block_length": 4, "eos_token_id": None}
    return random_model(1, num_layers=3).generate(**BATCH, **settings, block_cache=block_cache).tolist()


if __name__ == "__main__":
    print(json.dumps([largest_difference(), generated("prefix"), generated("dual")]))
