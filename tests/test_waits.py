"""A pass waits for the device once, whatever the settings: when all that was decided in it comes to the host."""

import pytest
import torch
from device_waits import DeviceWaits
from tiny_models import MASK, PAD, pad_left, random_model

from illada.commit_rules import T2M, WINO, CommitRule, Decision

PROMPTS = [[7, 8, 9, 10, 11], [12, MASK, 13], [14]]


class MaskAgain(CommitRule):
    may_remask = True

    def __call__(self, step):
        return Decision(step.best_ranked(step.quota), remask=step.confidence < 0.1)


@pytest.mark.parametrize("block_cache", [None, "prefix"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"confidence_threshold": 0.3},
        {"confidence_factor": 1.0},
        {"entropy_bound": 1.0},
        {"frechet_margin": 0.1},
        {"commit_rule": MaskAgain()},
        {"commit_rule": T2M(threshold=0.1, bound=0.1)},
        {"commit_rule": WINO(draft=0.1, verify=0.2)},
        {"commit_rule": "klass"},
        {"commit_rule": "local_leap"},
        {"commit_rule": "credit_decoding"},
        {"remasking": "margin", "defer_eos": True, "canvas": "fixed"},
        {"remasking": "random", "seed": 0},
        {"do_sample": True, "temperature": 2.0, "top_p": 0.9, "top_k": 20, "seed": 0},
        {"guidance_scale": 1.5, "cache_refresh_interval": 2},
        {"cache_refresh_entropy": 1.0},
        {"end_think_token_ids": [20, 21], "end_think_boost": 20.0},
        {"num_drafts": 4},
        {"num_drafts": 4, "confidence_threshold": 0.3, "guidance_scale": 1.5, "defer_eos": True},
        {"min_new_tokens": 5, "suppress_tokens": [22], "repetition_penalty": 1.2},
        {"on_step": lambda step: step.tokens.tolist()},
    ],
    ids=lambda settings: "-".join(settings) or "defaults",
)
def test_a_pass_waits_once(settings, block_cache):
    if block_cache is None:
        settings = {name: value for name, value in settings.items() if "cache" not in name}
    model = random_model(0)
    arguments = {**pad_left(PROMPTS), "max_new_tokens": 6, "block_length": 4, "pad_token_id": PAD, **settings}
    with DeviceWaits(model) as waits:
        output = model.generate(**arguments, block_cache=block_cache, return_dict_in_generate=True)
    # The last row to finish takes part in every pass of the engine.
    assert waits.count == output.num_forward_passes.max()


def test_waits_are_seen():
    """Guards the test above: each way to read a number counts."""
    model = random_model(0)
    weight = model.lm_head.weight
    reads = [
        lambda: weight[0, 0].item(),
        lambda: bool(weight.sum() > 0),
        lambda: (2 * weight).tolist(),
        lambda: weight.exp().cpu(),
        lambda: weight.relu().to("cpu", copy=True),
        lambda: (weight > 0).nonzero(),
        lambda: weight[weight > 0],
    ]
    for read in reads:
        with torch.no_grad(), DeviceWaits(model) as waits:
            read()
        assert waits.count == 1
    with torch.no_grad(), DeviceWaits(model) as waits:
        torch.ones(3).tolist(), weight.softmax(-1), weight.to("cpu", copy=True).tolist()
    assert waits.count == 1
