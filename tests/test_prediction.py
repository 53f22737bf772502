"""Forward passes without a cache: which rows share one, of which columns, and whose logits come back."""

import pytest
import torch
from tiny_models import EOS, MASK, PAD, pad_left, random_model

from illada import MaskedDiffusionGenerationConfig
from illada.canvas import Canvas
from illada.prediction import Predictor

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
    batch = [torch.randint(EOS + 1, MASK, (length,), generator=generator).tolist() for length in LENGTHS]
    inputs = pad_left(batch)
    canvas = Canvas(inputs["input_ids"], inputs["attention_mask"].bool(), MASK)
    config = MaskedDiffusionGenerationConfig(guidance_scale=guidance_scale)
    predictor = Predictor(model, canvas, config, 300 + 4)
    canvas.append_masks(4)
    predictor.begin(canvas.block(300, 304))
    for rows in (torch.arange(4), torch.tensor([1, 2, 3]), torch.tensor([0, 2])):
        assert predictor.seat(rows).equal(rows)
        # Rows and columns in any order.
        places, columns = torch.tensor([[1, 0, len(rows) - 1, 0, 1], [303, 301, 300, 300, 302]])
        logits = predictor(places, columns)
        for place, column, row_logits in zip(places.tolist(), columns.tolist(), logits, strict=True):
            tokens = torch.tensor([batch[rows[place]] + [MASK] * 4])
            position = column - 304
            expected = model(tokens).logits[0, position]
            if guidance_scale is not None:
                without = model(torch.full_like(tokens, MASK)).logits[0, position]
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
