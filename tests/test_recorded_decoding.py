"""Decoding against what version 0.1 wrote on random settings, before its core was rebuilt.

`fixtures/decoding_0.1.json` has 420 settings (canvas, lengths, blocks, steps, rules, rankings, guidance, blanks,
ragged batches, caches, sampling of one row with a generator, the end-of-thinking boost, `defer_eos`, `revise`) with
the tokens, passes and commit steps that commit 028fc68 gave in fp64.
"""

import json
from functools import cache

import pytest
import torch
from conftest import FIXTURES
from tiny_models import PAD, pad_left, random_model

RECORDS = [json.loads(line.rstrip(",\n")) for line in (FIXTURES / "decoding_0.1.json").open() if len(line) > 3]


@cache
def _model(seed: int, num_layers: int):
    return random_model(seed, num_layers=num_layers)


@pytest.mark.parametrize(
    "index", range(len(RECORDS)), ids=[f"{i}-{record['kind']}" for i, record in enumerate(RECORDS)]
)
def test_decoding_is_what_it_was(index):
    record = RECORDS[index]
    model, inputs = _model(record["model_seed"], record["num_layers"]), pad_left(record["prompts"])
    if record["kind"] == "revise":
        output = model.revise(**inputs, **record["arguments"])
        assert output.sequences.tolist() == record["sequences"]
        assert output.changed.int().tolist() == record["changed"]
        assert output.num_rounds == record["num_rounds"]
        return
    generator = torch.Generator().manual_seed(record["generator_seed"]) if "generator_seed" in record else None
    output = model.generate(
        **inputs,
        **record["arguments"],
        generator=generator,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_trace=True,
    )
    assert output.sequences.tolist() == record["sequences"]
    assert output.num_forward_passes.tolist() == record["num_forward_passes"]
    assert output.commit_steps.tolist() == record["commit_steps"]
