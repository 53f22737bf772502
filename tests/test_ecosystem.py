"""The tools around a Transformers model: compilation, dtypes, quantisation, adapters, offload, upload, logging."""

import accelerate
import pytest
import torch
from hub_stand_in import serve_hub
from peft import LoraConfig, get_peft_model
from tiny_models import pad_left, random_model
from transformers import AutoModelForCausalLM, set_seed
from transformers.utils import logging

from illada import ILLaDAConfig, ILLaDAForCausalLM

PROMPTS = pad_left([[7, 8, 9, 10], [11, 12], [13]])
SETTINGS = {"max_new_tokens": 12, "block_length": 4, "eos_token_id": None}


def generated(model, **settings) -> torch.Tensor:
    return model.generate(**PROMPTS, **SETTINGS, **settings)


@pytest.fixture
def model():
    return random_model(3)


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


class CountingBackend:
    """A backend of `torch.compile` that runs the graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


def test_a_compiled_model_gives_the_same_logits_and_generates(model):
    expected_logits, expected = model(PROMPTS["input_ids"]).logits, generated(model)
    backend = CountingBackend()
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(compiled(PROMPTS["input_ids"]).logits, expected_logits)
    assert backend.graphs > 0
    assert torch.equal(generated(compiled), expected)


def test_generate_runs_what_was_compiled_in_place(model):
    expected, backend = generated(model), CountingBackend()
    model.compile(backend=backend)
    assert torch.equal(generated(model), expected)
    assert backend.graphs > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_of_another_dtype(model, folder, dtype):
    moved, loaded = model.to(dtype), AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert moved(PROMPTS["input_ids"]).logits.dtype == dtype
    assert torch.equal(generated(moved), generated(loaded))


def test_int8_weights(tmp_path):
    """Transformers' own quantisation, by a library that runs on a CPU."""
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    from transformers import QuantoConfig

    torch.manual_seed(0)
    config = ILLaDAConfig(vocab_size=37, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    full = ILLaDAForCausalLM(config).eval()
    full.save_pretrained(tmp_path)
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=QuantoConfig(weights="int8"), device_map="cpu"
    )
    assert type(quantized.model.layers[0].mlp.up_proj).__name__ == "QLinear"
    with torch.no_grad():
        error = quantized(PROMPTS["input_ids"]).logits - full(PROMPTS["input_ids"]).logits
    assert 0 < error.abs().max() < 0.05 * full(PROMPTS["input_ids"]).logits.abs().max()
    assert (generated(quantized) != config.mask_token_id).all()


def test_an_adapter_is_heard_in_generate(model):
    plain = generated(model)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, adapter).eval()
    heard = generated(adapted)
    assert not torch.equal(heard, plain)
    with adapted.disable_adapter():
        assert torch.equal(generated(adapted), plain)
    assert torch.equal(generated(adapted.merge_and_unload()), heard)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offloaded_weights(model, offload, tmp_path):
    expected = generated(model)
    if offload == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.model.layers.parameters())
    assert torch.equal(generated(model), expected)


def test_a_device_map_with_a_disk(model, folder, tmp_path):
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    mapped = AutoModelForCausalLM.from_pretrained(
        folder, device_map={**parts, "model.layers.0": "disk"}, offload_folder=tmp_path / "offload"
    )
    assert mapped.hf_device_map["model.layers.0"] == "disk"
    assert torch.equal(generated(mapped), generated(model))


def test_push_to_hub_uploads_weights_settings_and_code(model, monkeypatch):
    with serve_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        # An `HfApi` that Transformers or another test made keeps the address of its day: a property stands before it.
        address = property(lambda api: hub.url, lambda api, value: None)
        monkeypatch.setattr("huggingface_hub.HfApi.endpoint", address, raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        model.push_to_hub("user/tiny")
    assert "user/tiny" in hub.repositories
    assert {"config.json", "generation_config.json", "model.safetensors"} <= set(hub.files)
    assert {"modeling_illada.py", "configuration_illada.py", "generation.py", "canvas.py"} <= set(hub.files)


def test_set_seed_makes_samples_repeat(model):
    draws = []
    for seed in (5, 5, 6):
        set_seed(seed)
        draws.append(generated(model, do_sample=True, temperature=3.0))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_messages_go_through_transformers_logging(tmp_path, caplog):
    """The warning of a head that should be tied and is not can be silenced."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    config = ILLaDAConfig(vocab_size=37, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    ILLaDAForCausalLM(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = torch.randn_like(weights["model.embed_tokens.weight"])
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    logging.set_verbosity_warning()
    ILLaDAForCausalLM.from_pretrained(tmp_path)
    assert "lm_head" in caplog.text
    caplog.clear()
    logging.set_verbosity_error()
    ILLaDAForCausalLM.from_pretrained(tmp_path)
    assert not caplog.records
