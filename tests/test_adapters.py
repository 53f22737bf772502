"""LoRA adapters that were trained on LLaDA's released code act in full, under whichever names, or are refused."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from release_checkpoints import read_tensors, release, write_release
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig
from typer import Typer
from typer.testing import CliRunner

import illada  # noqa: F401
from illada.conversion import CheckpointError, cli, convert, convert_adapter, export_to_hub_folder, load_whole_model
from illada.llada_names import standard_name

ALL = ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"]
IDS = torch.arange(6, 38)[None]


class ReleasedTree(nn.Module):
    """The modules of LLaDA's released code, under its names, with the golden checkpoint's matrices."""

    def __init__(self):
        super().__init__()
        self.config = PretrainedConfig(tie_word_embeddings=False)
        for name, tensor in read_tensors(release("llada")).items():
            *path, leaf, _ = name.split(".")
            parent = self
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent._modules[part]
            if tensor.dim() == 1:
                module = nn.LayerNorm(len(tensor), bias=False)
            elif leaf == "wte":
                module = nn.Embedding(*tensor.shape)
            else:
                module = nn.Linear(*reversed(tensor.shape), bias=False)
            module.weight = nn.Parameter(tensor)
            parent.add_module(leaf, module)


def trained(folder, **settings):
    """The folder of an adapter as PEFT saves it, trained on the released code, and the weights that it makes."""
    torch.manual_seed(0)
    model = ReleasedTree()
    settings = {"target_modules": ALL, "r": 4} | settings
    adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, **settings))
    adapted.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(release("llada"))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    merged = adapted.merge_and_unload()
    return folder, {standard_name(name): tensor for name, tensor in merged.state_dict().items()}


def logits_of(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def expected_logits(weights):
    """Of a model that never saw an adapter: the products of the matrices were added to its weights."""
    model = AutoModel.from_pretrained(release("llada"))
    model.load_state_dict(weights)
    return logits_of(model)


SETTINGS = {
    "all": {},
    "feed-forward": {"target_modules": ["ff_out"]},
    "pattern": {"target_modules": r".*blocks\.1\.(attn_out|up_proj)"},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "blocks"},
    "ranks": {"rank_pattern": {"attn_out": 2, r"blocks\.0\.ff_proj": 3}, "alpha_pattern": {"ff_out": 5, "q_proj": 1}},
    "excluded": {"exclude_modules": r".*blocks\.0\..*"},
    "embedding": {"target_modules": ["wte", "attn_out"], "use_dora": False},
    "saved": {"target_modules": ["attn_out"], "modules_to_save": ["ln_f", "wte"]},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dora": {"target_modules": ["attn_out", "ff_proj", "v_proj"], "use_dora": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_an_adapter_of_the_released_code_acts_in_full(tmp_path, settings):
    adapter, weights = trained(tmp_path / "adapter", **settings)
    expected = expected_logits(weights)
    assert (expected - logits_of(AutoModel.from_pretrained(release("llada")))).abs().max() > 0.05
    converted = convert(release("llada"), tmp_path / "base").out
    standard = convert_adapter(adapter, tmp_path / "standard")
    for base in (release("llada"), converted):
        model = AutoModel.from_pretrained(base)
        model.load_adapter(str(adapter))
        torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=0)
        model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), standard)
        torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("base", ["in place", "converted", "of the adapter"])
def test_export_merges_it_in_full(tmp_path, base):
    adapter, weights = trained(tmp_path / "adapter")
    sources = {
        "in place": lambda: (release("llada"), adapter),
        "converted": lambda: (convert(release("llada"), tmp_path / "base").out, adapter),
        "of the adapter": lambda: (adapter, None),
    }
    source, merged = sources[base]()
    out = export_to_hub_folder(source, tmp_path / "out", adapter=merged)
    torch.testing.assert_close(logits_of(AutoModel.from_pretrained(out)), expected_logits(weights), atol=1e-4, rtol=0)


def test_the_folder_of_an_adapter_is_a_model(tmp_path):
    adapter, weights = trained(tmp_path / "adapter")
    for load in (load_whole_model, AutoModelForCausalLM.from_pretrained):
        torch.testing.assert_close(logits_of(load(adapter)), expected_logits(weights), atol=1e-4, rtol=0)


@pytest.mark.parametrize("base", ["in place", "converted"])
def test_peft_refuses_what_it_would_load_by_half(tmp_path, base):
    adapter, _ = trained(tmp_path / "adapter")
    source = release("llada") if base == "in place" else convert(release("llada"), tmp_path / "base").out
    with pytest.raises(ValueError, match=r"no place for .*(attn_out|o_proj)\.lora_A.*`illada convert`"):
        PeftModel.from_pretrained(AutoModel.from_pretrained(source), adapter)


def damaged(folder, change):
    adapter, _ = trained(folder)
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    return adapter


STRANGE = "base_model.model.model.transformer.blocks.0.att_proj.lora_A.weight"
TENSOR = "base_model.model.model.transformer.blocks.1.attn_out.lora_B.weight"
DAMAGES = {
    "extra": (lambda tensors: tensors.update({STRANGE: torch.ones(4, 4)}), STRANGE.removeprefix("base_model.model.")),
    "missing": (lambda tensors: tensors.pop(TENSOR), r"layers\.1\.self_attn\.o_proj\.lora_B"),
    "misshapen": (lambda tensors: tensors.update({TENSOR: torch.ones(3, 4)}), r"layers\.1\.self_attn\.o_proj\.lora_B"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, damage):
    change, named = DAMAGES[damage]
    adapter = damaged(tmp_path / "adapter", change)
    with pytest.raises(ValueError, match=named) as exported:
        export_to_hub_folder(adapter, tmp_path / "out")
    with pytest.raises(ValueError, match=named) as loaded:
        load_whole_model(adapter)
    for error in (exported, loaded):
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_load_adapter_names_a_tensor_that_has_no_place(tmp_path):
    adapter = damaged(tmp_path / "adapter", DAMAGES["extra"][0])
    with pytest.raises(ValueError, match="no place for .*att_proj"):
        AutoModel.from_pretrained(release("llada")).load_adapter(str(adapter))


def test_an_adapter_goes_to_the_released_names_and_back(tmp_path):
    adapter, _ = trained(tmp_path / "adapter", rank_pattern={"attn_out": 2})
    standard = convert_adapter(adapter, tmp_path / "standard")
    back = convert_adapter(standard, tmp_path / "back", to="llada")
    first, last = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, back))
    assert first.keys() == last.keys() and all(torch.equal(first[name], last[name]) for name in first)
    model = PeftModel.from_pretrained(ReleasedTree(), back)
    expected = PeftModel.from_pretrained(ReleasedTree(), adapter).merge_and_unload().state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in model.merge_and_unload().state_dict().items())


def test_an_adapter_of_the_standard_names_stays_as_it_is(tmp_path):
    config = LoraConfig(target_modules=["o_proj", "q_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModel.from_pretrained(release("llada")), config)
    model.save_pretrained(tmp_path / "adapter")
    out = convert_adapter(tmp_path / "adapter", tmp_path / "out")
    first, last = (json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / "adapter", out))
    assert first == last
    again = AutoModel.from_pretrained(release("llada"))
    again.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(again), logits_of(model), atol=1e-4, rtol=0)


def test_the_convert_command_takes_an_adapter(tmp_path):
    adapter, weights = trained(tmp_path / "adapter")
    app = Typer()
    app.command()(cli.convert)
    result = CliRunner().invoke(app, [str(adapter), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(release("llada")), tmp_path / "out")
    torch.testing.assert_close(logits_of(model), expected_logits(weights), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="`source` must be a checkpoint, got the adapter .*`convert_adapter`"):
        convert(adapter, tmp_path / "other")


def test_the_base_of_an_adapter_is_whole(tmp_path):
    adapter, _ = trained(tmp_path / "adapter")
    tensors = read_tensors(release("llada"))
    tensors.pop("model.transformer.ln_f.weight")
    base = write_release(tmp_path / "base", "llada", tensors=tensors)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="missing: model.norm.weight"):
        load_whole_model(adapter)


@pytest.mark.parametrize("family", ["illada", "llada"])
def test_an_adapter_brings_its_resized_vocabulary(tmp_path, family):
    model = AutoModel.from_pretrained(release(family))
    model.resize_token_embeddings(170, mean_resizing=False)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    out = export_to_hub_folder(tmp_path / "adapter", tmp_path / "out")
    for exported in (AutoModel.from_pretrained(out), load_whole_model(tmp_path / "adapter")):
        assert exported.config.vocab_size == 170
        torch.testing.assert_close(logits_of(exported), logits_of(model), atol=1e-4, rtol=0)
