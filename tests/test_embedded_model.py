"""The model that comes with the package: its form, and that what it is shipped for works."""

import configparser
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from illada import EMBEDDED_MODEL, ILLaDAForCausalLM
from illada.tiny.corpus import FAMILIES, held_out_examples
from illada.tiny.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(embedded_tokenizer):
    return embedded_tokenizer


@pytest.fixture(scope="module")
def model(embedded_model):
    return embedded_model


def test_it_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in EMBEDDED_MODEL.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "README.md"} <= set(
        files
    )
    assert sum(files.values()) < 6_000_000
    assert [name for name in files if "model" in name] == ["model.safetensors"]


def test_an_installed_package_has_every_file_of_it():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    package = EMBEDDED_MODEL.parents[1]
    patterns = setup["options.package_data"]["illada"].split()
    installed = {path for pattern in patterns for path in package.glob(pattern)}
    assert set(EMBEDDED_MODEL.iterdir()) <= installed


def test_it_loads_natively_with_illada_s_special_ids(model, tokenizer):
    assert type(model) is ILLaDAForCausalLM
    for source in (model.config, model.generation_config, tokenizer):
        assert (source.bos_token_id, source.pad_token_id, source.eos_token_id, source.mask_token_id) == (0, 1, 2, 5)
    assert tokenizer.padding_side == "left"


def test_its_tokenizer_is_the_one_that_the_recipe_makes(tokenizer):
    assert train_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_its_card_has_a_figure_for_every_family():
    card = ModelCard.load(EMBEDDED_MODEL / "README.md")
    assert card.data.pipeline_tag == "text-generation" and card.data.license == "apache-2.0"
    for family in FAMILIES:
        assert any(line.startswith(f"| {family} |") and "%" in line for line in card.text.splitlines()), family
    assert json.loads((EMBEDDED_MODEL / "training_log.json").read_text())[-1]["step"] > 1000


def fill(model, tokenizer, example) -> tuple[str, float]:
    """The document of an example with its blanks filled, and tokens per forward."""
    from illada.text.blanks import encode_with_blanks

    text = example.text
    for start, end in reversed(example.blanks):
        count = len(tokenizer.tokenize(text[start:end]))
        text = f"{text[:start]}<[MASK]*{count}>{text[end:]}"
    ids = tokenizer.pad({"input_ids": [encode_with_blanks(tokenizer, text, 5)]}, return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=0, return_dict_in_generate=True)
    return tokenizer.decode(output.sequences[0], skip_special_tokens=True), float(output.tokens_per_forward[0])


def answer(model, tokenizer, example) -> str:
    messages = [{"role": "user", "content": example.prompt}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    output = model.generate(torch.tensor([ids]), max_new_tokens=32)
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_solves_what_training_never_saw(model, tokenizer, family):
    """At least nine of ten, as the card says of two hundred."""
    examples = held_out_examples(family, 20)
    if examples[0].prompt:
        texts = [answer(model, tokenizer, example) for example in examples]
    else:
        texts, speeds = zip(*(fill(model, tokenizer, example) for example in examples))
        assert set(speeds) == {1.0}  # exact: one token per forward pass
    assert sum(example.is_correct(text) for example, text in zip(examples, texts)) >= 18
