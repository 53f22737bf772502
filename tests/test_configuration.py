"""The configuration: defaults of iLLaDA-8B, keys of old releases, refusals."""

import json

import pytest
import torch
from transformers import AutoConfig

from illada import ILLaDAConfig, LLaDAConfig


def test_defaults_are_those_of_illada_8b():
    config = ILLaDAConfig()
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (32, 4096, 14336)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (32, 8, 128)
    assert (config.vocab_size, config.max_position_embeddings) == (155136, 8192)
    assert (config.bos_token_id, config.pad_token_id, config.eos_token_id, config.mask_token_id) == (0, 1, 2, 5)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500000.0}
    assert config.tie_word_embeddings


def test_parameter_count_of_illada_8b():
    """7.62 B parameters, 6.98 B without the embedding, as the paper states; nothing is allocated."""
    from illada import ILLaDAForCausalLM

    with torch.device("meta"):
        model = ILLaDAForCausalLM(ILLaDAConfig())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert round(total / 1e9, 2) == 7.62
    assert round((total - model.get_input_embeddings().weight.numel()) / 1e9, 2) == 6.98


def test_keys_of_the_release_are_understood(golden_illada):
    config = AutoConfig.from_pretrained(golden_illada / "checkpoint")
    assert type(config) is ILLaDAConfig
    assert config.dtype == torch.float32  # written as `torch_dtype`
    assert config.rope_parameters["rope_theta"] == 500000.0  # written as a top-level `rope_theta`
    assert config.resid_pdrop == config.attention_dropout == 0.1
    assert config.mask_token_id == 5  # not written at all


def test_save_and_load(tmp_path, tiny_config):
    tiny_config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == tiny_config.to_diff_dict()
    assert "rope_scaling" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize(
    "field, value",
    [
        ("layer_norm_eps", 1e-5),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("mask_token_id", 64),
        ("pad_token_id", -1),
    ],
)
def test_what_is_not_implemented_is_refused(field, value):
    with pytest.raises(Exception, match=field) as error:
        ILLaDAConfig(vocab_size=64, **{field: value})
    assert isinstance(error.value, ValueError) or isinstance(error.value.__cause__, ValueError)


@pytest.mark.parametrize("config_class", [ILLaDAConfig, LLaDAConfig])
def test_layer_norm_eps_is_a_key_of_releases_and_no_field(tmp_path, config_class):
    """Common code sets it on every config that has it, and on some that do not: it is not saved, and null loads."""
    config = config_class(layer_norm_eps=None)
    assert not hasattr(config, "layer_norm_eps")
    config.layer_norm_eps = 1.0
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "layer_norm_eps" not in written
    for value in (None, 1e-5):
        (tmp_path / "config.json").write_text(json.dumps({**written, "layer_norm_eps": value}))
        if value is None:
            assert config_class.from_pretrained(tmp_path).to_diff_dict() == config_class().to_diff_dict()
        else:
            with pytest.raises(ValueError, match="`layer_norm_eps` must be null, got 1e-05"):
                config_class.from_pretrained(tmp_path)
