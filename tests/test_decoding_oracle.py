"""`generate` against a second implementation of the published samplers, token for token, over random settings."""

import random
from functools import cache

import pytest
import torch
from oracle import oracle_generate
from tiny_models import EOS, MASK, PAD, pad_left, random_model

NUM_SETTINGS = 200


@cache
def _model(seed: int):
    return random_model(seed)


def _setting(seed: int) -> tuple[int, list[list[int]], dict]:
    """A model's seed, the prompts of a batch, and arguments that oracle and package both understand."""
    rng = random.Random(seed)
    words = [token for token in range(37) if token not in (PAD, EOS, MASK)]
    has_blanks = rng.random() < 0.4
    prompts = []
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3, 4])):
        prompt = [rng.choice(words) for _ in range(rng.randint(1, 8))]
        prompts.append([MASK if has_blanks and rng.random() < 0.4 else token for token in prompt])
    max_new_tokens = rng.randint(1, 10)
    if has_blanks and MASK in sum(prompts, []) and rng.random() < 0.3:
        max_new_tokens = 0
    block_length = rng.randint(1, 8)
    arguments = {
        "canvas": rng.choice(["growing", "fixed"]),
        "max_new_tokens": max_new_tokens,
        "block_length": block_length,
        "steps": rng.choice([1, 2, 3, block_length, block_length, block_length + 2]),
        # Not 0: a canvas of masks alone has the same logits everywhere, and rounding would break the ties.
        "guidance_scale": rng.choice([None, None, None, 0.5, 2.0]),
        "eos_ids": rng.choice([[EOS], [EOS, 9, 11]]),
    }
    return rng.randrange(5), prompts, arguments


@cache
def _answer(seed: int) -> list[tuple[list[int], int]]:
    """The oracle's (tokens, forward passes) for every row."""
    model_seed, prompts, arguments = _setting(seed)
    return [oracle_generate(_model(model_seed), prompt, mask_id=MASK, **arguments) for prompt in prompts]


@pytest.mark.parametrize("seed", range(NUM_SETTINGS))
def test_generate_agrees_with_the_oracle(seed):
    model_seed, prompts, arguments = _setting(seed)
    output = _model(model_seed).generate(
        **pad_left(prompts),
        canvas=arguments["canvas"],
        max_new_tokens=arguments["max_new_tokens"],
        block_length=arguments["block_length"],
        max_denoising_steps=arguments["steps"],
        guidance_scale=arguments["guidance_scale"],
        eos_token_id=arguments["eos_ids"],
        return_dict_in_generate=True,
    )

    answers = _answer(seed)
    prompt_length = max(map(len, prompts))
    width = max(prompt_length + len(tokens) - len(prompt) for prompt, (tokens, _) in zip(prompts, answers))
    expected = [
        ([PAD] * (prompt_length - len(prompt)) + tokens + [PAD] * width)[:width]
        for prompt, (tokens, _) in zip(prompts, answers)
    ]
    assert output.sequences.tolist() == expected
    assert output.num_forward_passes.tolist() == [forwards for _, forwards in answers]


def test_the_settings_reach_what_they_are_meant_to_reach():
    """Guards the test above against settings that have become too easy, for instance a model that never says EOS."""
    counts = dict.fromkeys(("ended", "full", "several blocks", "EOS inside a block", "ragged", "several eos"), 0)
    for seed in range(NUM_SETTINGS):
        _, prompts, arguments = _setting(seed)
        counts["ragged"] += len(set(map(len, prompts))) > 1
        for prompt, (tokens, _) in zip(prompts, _answer(seed)):
            new = len(tokens) - len(prompt)
            ended = new > 0 and tokens[-1] in arguments["eos_ids"]
            counts["ended"] += ended
            counts["full"] += not ended
            counts["several blocks"] += new > arguments["block_length"]
            counts["EOS inside a block"] += ended and new % arguments["block_length"] != 0
            counts["several eos"] += ended and tokens[-1] != EOS
    assert min(counts.values()) >= 10, counts


def test_the_tokens_of_the_oracle_depend_on_the_context():
    """A model that ignores its context would let wrong positions, masks and guidance pass."""
    alone = {tuple(_answer(seed)[0][0][-3:]) for seed in range(NUM_SETTINGS)}
    assert len(alone) > 100


def test_batch_order_does_not_matter():
    _, prompts, _ = next(setting for setting in map(_setting, range(NUM_SETTINGS)) if len(setting[1]) == 4)
    arguments = {"max_new_tokens": 12, "block_length": 4}
    forward = _model(0).generate(**pad_left(prompts), **arguments)
    backward = _model(0).generate(**pad_left(prompts[::-1]), **arguments)
    assert torch.equal(forward, backward.flip(0))
