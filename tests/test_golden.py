"""The released code's outputs on a checkpoint in the release's form: logits and generations."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from illada import ILLaDAForCausalLM

CANVASES = {"grow": "growing", "fixed": "fixed"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits(golden_illada, attention):
    model = AutoModel.from_pretrained(golden_illada / "checkpoint", attn_implementation=attention)
    golden = load_file(golden_illada / "logits.safetensors")
    mask = golden["attention_mask"]
    calls = {
        "logits_no_mask": {},
        "logits_masked": {"attention_mask": mask},
        "logits_masked_positions": {"attention_mask": mask, "position_ids": golden["position_ids"]},
    }
    for name, arguments in calls.items():
        with torch.no_grad():
            logits = model(golden["input_ids"], **arguments).logits
        difference = (logits - golden[name]).abs()
        assert difference[mask.bool()].max() < 1e-4, name
    assert (mask == 0).any()


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM])
def test_auto_classes_give_the_native_model_without_remote_code(golden_illada, auto_class):
    model = auto_class.from_pretrained(golden_illada / "checkpoint")
    assert type(model) is ILLaDAForCausalLM
    assert model.config.mask_token_id == model.generation_config.mask_token_id == 5
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_official_way_of_calling(golden_illada):
    model = AutoModel.from_pretrained(golden_illada / "checkpoint")
    x = torch.randint(6, 160, (2, 9))
    assert model(x, attention_mask=torch.ones_like(x)).logits.shape == (2, 9, model.config.vocab_size)


def run(model, golden: dict, **settings):
    blocks = golden["gen_length"] // golden["block_length"]
    return model.generate(
        torch.tensor([golden["prompt"]]),
        canvas=CANVASES[golden["canvas"]],
        max_new_tokens=golden["gen_length"],
        block_length=golden["block_length"],
        max_denoising_steps=golden["steps"] if golden["steps_are"] == "per block" else golden["steps"] // blocks,
        guidance_scale=golden["cfg_scale"] + 1,
        return_dict_in_generate=True,
        **settings,
    )


def test_generation(golden_illada):
    model = AutoModel.from_pretrained(golden_illada / "checkpoint")
    runs = json.loads((golden_illada / "generation.json").read_text())
    assert len(runs) == 8
    for golden in runs:
        output = run(model, golden)
        tokens, expected = output.sequences[0].tolist(), golden["sequence"]
        prompt_length = len(golden["prompt"])
        if 2 in expected[prompt_length:]:  # the release writes on behind its EOS
            expected = expected[: expected.index(2, prompt_length) + 1]
        assert tokens == expected, golden["name"]
        assert output.num_forward_passes[0] <= golden["forward_passes"], golden["name"]


def test_generation_in_a_left_padded_batch(golden_illada):
    """All golden prompts in one batch, with the settings of one run, give what each gives alone."""
    model = AutoModel.from_pretrained(golden_illada / "checkpoint")
    runs = json.loads((golden_illada / "generation.json").read_text())
    width = max(len(golden["prompt"]) for golden in runs)
    prompts = torch.tensor([[1] * (width - len(golden["prompt"])) + golden["prompt"] for golden in runs])
    mask = torch.tensor([[0] * (width - len(golden["prompt"])) + [1] * len(golden["prompt"]) for golden in runs])
    for canvas in ("growing", "fixed"):
        settings = {"canvas": canvas, "max_new_tokens": 16, "block_length": 8, "return_dict_in_generate": True}
        batch = model.generate(prompts, attention_mask=mask, **settings)
        for row, golden in enumerate(runs):
            alone = model.generate(torch.tensor([golden["prompt"]]), **settings)
            response = alone.sequences[0, len(golden["prompt"]) :].tolist()
            padded = response + [1] * (batch.sequences.shape[1] - width - len(response))
            assert batch.sequences[row, width:].tolist() == padded
            assert batch.num_forward_passes[row] == alone.num_forward_passes[0]
