"""A cache is called `past_key_values` until Transformers 5.23 and `cache` from 5.24 on: both mean the same here."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import cache_name
import pytest
import torch
from tiny_models import random_model
from transformers import DynamicCache


def test_a_cached_block_is_right_on_the_day_after_the_old_name():
    """In a process whose Transformers drops the old keyword into `**kwargs`: nothing is garbage, nothing warns."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, Path(cache_name.__file__)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    difference, prefix, dual = json.loads(result.stdout)
    assert difference < 1e-9
    assert prefix == cache_name.generated("prefix") and dual == cache_name.generated("dual")


def test_a_cached_block_warns_of_nothing_today():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache_name.largest_difference() < 1e-9


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_second_part_sees_the_first_by_either_name(name):
    """Of Transformers' own cache: as under a mask by which the first part does not see the second."""
    model, tokens = random_model(0, num_layers=3), torch.randint(6, 37, (2, 7))
    allowed = torch.ones(7, 7, dtype=torch.bool)
    allowed[:4, 4:] = False
    cache = DynamicCache()
    with torch.no_grad():
        expected = model(tokens, attention_mask=allowed.expand(2, 1, 7, 7)).logits
        parts = [model(part, **{name: cache}).logits for part in (tokens[:, :4], tokens[:, 4:])]
    torch.testing.assert_close(torch.cat(parts, 1), expected)


def test_both_names_at_once_are_refused():
    with pytest.raises(ValueError, match="`cache` and `past_key_values`"):
        random_model(0)(torch.tensor([[7, 8]]), past_key_values=DynamicCache(), cache=DynamicCache())
