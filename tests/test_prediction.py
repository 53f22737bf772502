"""Forward passes without a cache: which rows share one, of which columns, and whose logits come back."""

import pytest
import torch
from tiny_models import EOS, MASK, PAD, pad_left, random_model

from illada import MaskedDiffusionGenerationConfig
from illada.canvas import Canvas
from illada.prediction import FullPredictor

LENGTHS = [30, 300, 31, 290]


@pytest.fixture(scope="module")
def model():
    return random_model(0, max_position_embeddings=512)


@pytest.fixture
def passes(model):
    """(rows, columns, whether there is a padding mask) of every forward pass of the model."""
    noted = []

    def note(module, args, kwargs):
        noted.append((*kwargs["input_ids"].shape, kwargs["attention_mask"] is not None))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    yield noted
    hook.remove()


@pytest.mark.parametrize("guidance_scale", [None, 1.5])
@torch.no_grad()
def test_logits_are_those_of_each_row_alone(model, guidance_scale):
    generator = torch.Generator().manual_seed(0)
    batch = [torch.randint(EOS + 1, MASK, (length,), generator=generator) for length in LENGTHS]
    config = MaskedDiffusionGenerationConfig(guidance_scale=guidance_scale, canvas="growing", block_length=4)
    canvas = Canvas(4, MASK)
    rows = [canvas.admit(index, prompt, 8, config) for index, prompt in enumerate(batch)]
    for row in rows:
        row.block = next(row.blocks)
    predictor = FullPredictor(model, canvas, torch.device("cpu"), 1 if guidance_scale is None else 2)
    for taken in ([0, 1, 2, 3], [3, 1, 2], [0, 2]):
        # Rows and positions of their blocks, in any order.
        places, offsets = torch.tensor([[1, 0, len(taken) - 1, 0, 1], [3, 1, 0, 0, 2]])
        lengths = torch.tensor([LENGTHS[index] for index in taken])
        logits = predictor.logits([rows[index] for index in taken], places, lengths[places] + offsets)
        for place, offset, row_logits in zip(places.tolist(), offsets.tolist(), logits, strict=True):
            tokens = torch.tensor([batch[taken[place]].tolist() + [MASK] * 4])
            expected = model(tokens).logits[0, offset - 4]
            if guidance_scale is not None:
                without = model(torch.full_like(tokens, MASK)).logits[0, offset - 4]
                expected = without + guidance_scale * (expected - without)
            torch.testing.assert_close(row_logits, expected, rtol=0, atol=1e-9)


def test_rows_of_like_length_share_passes_without_common_padding(model, passes):
    batch = [[7] * length for length in LENGTHS]
    model.generate(
        **pad_left(batch), max_new_tokens=2, block_length=2, max_denoising_steps=1, eos_token_id=None, pad_token_id=PAD
    )
    assert sorted(passes) == [(2, 33, True), (2, 302, True)]


def test_a_pass_without_padding_needs_no_mask(model, passes):
    arguments = {"max_new_tokens": 2, "block_length": 2, "max_denoising_steps": 1, "eos_token_id": None}
    model.generate(**pad_left([[7] * 30, [7] * 300]), **arguments, pad_token_id=PAD)
    assert sorted(passes) == [(1, 32, False), (1, 302, False)]


def test_short_prompts_share_every_pass(model, passes):
    arguments = {"max_new_tokens": 2, "block_length": 2, "max_denoising_steps": 1, "eos_token_id": None}
    model.generate(**pad_left([[7] * 3, [7] * 100, [7] * 60]), **arguments, pad_token_id=PAD)
    assert passes == [(3, 102, True)]
