"""The model: loading and saving, tied weights, the loss, training."""

import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, EuroBertConfig, EuroBertForMaskedLM

from illada import ILLaDAForCausalLM, masked_diffusion_loss


def equal_tensors(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Loading and saving


def test_logits_equal_a_peer_on_the_same_weights(tiny_config, tiny_model):
    """EuroBERT is the same architecture in Transformers itself."""
    names = set(EuroBertConfig().to_dict()) - {"model_type", "architectures"}
    config = {name: value for name, value in tiny_config.to_dict().items() if name in names}
    peer = EuroBertForMaskedLM(EuroBertConfig(**config)).eval()
    peer.load_state_dict(tiny_model.state_dict())
    input_ids = torch.randint(6, 64, (2, 11))
    mask = torch.ones_like(input_ids)
    mask[1, :4] = 0
    with torch.no_grad():
        logits = tiny_model(input_ids, attention_mask=mask).logits
        assert torch.equal(logits, peer(input_ids, attention_mask=mask).logits)


@pytest.mark.parametrize("max_shard_size", ["10KB", "1GB"])
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_reload(tmp_path, tiny_config, tied, max_shard_size):
    tiny_config.tie_word_embeddings = tied
    model = ILLaDAForCausalLM(tiny_config)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or max_shard_size == "10KB"
    assert not list(tmp_path.glob("*.bin"))
    reloaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert equal_tensors(model, reloaded)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert equal_tensors(model, AutoModel.from_pretrained(tmp_path, device_map="cpu"))
    assert equal_tensors(model.bfloat16(), AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16))


def test_release_form_loads_every_tensor(golden_illada):
    """Two shards with an index; no tensor is initialised anew."""
    model, report = AutoModel.from_pretrained(golden_illada / "checkpoint", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    shards = [load_file(path) for path in sorted((golden_illada / "checkpoint").glob("*.safetensors"))]
    stored = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert len(shards) == 2 and stored.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in stored.items())


@pytest.fixture
def tied_folder(tmp_path, tiny_model) -> Path:
    tiny_model.save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_lm_head_may_be_absent(tied_folder, tiny_model):
    rewrite(tied_folder, lambda tensors: tensors.pop("lm_head.weight", None))
    model = AutoModel.from_pretrained(tied_folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert equal_tensors(model, tiny_model)


def test_lm_head_may_be_stored_and_equal(tied_folder, tiny_model):
    rewrite(tied_folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = AutoModel.from_pretrained(tied_folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_lm_head_that_differs_is_kept_untied(tied_folder, tiny_model, tmp_path, caplog, monkeypatch):
    """The config says tied, the tensors differ: both are kept, a warning says so, and saving keeps both again."""
    other = torch.randn_like(tiny_model.lm_head.weight)
    rewrite(tied_folder, lambda t: t.update({"lm_head.weight": other}))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for folder in (tied_folder, tmp_path / "again"):
        caplog.clear()
        model = AutoModel.from_pretrained(folder)
        assert "NOT tie" in caplog.text
        assert torch.equal(model.lm_head.weight, other)
        assert torch.equal(model.model.embed_tokens.weight, tiny_model.model.embed_tokens.weight)
        model.save_pretrained(tmp_path / "again")


def test_truncated_file_and_missing_folder_are_errors(tied_folder, tmp_path):
    path = tied_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Exception, match="(?i)safetensors|incomplete|truncated|header|metadata"):
        AutoModel.from_pretrained(tied_folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="config.json"):
        AutoModel.from_pretrained(tmp_path / "empty")


REMOTE_SCRIPT = """
import json, sys
sys.modules["illada"] = None  # importing the package fails
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
output = model.generate(torch.tensor(json.loads(sys.argv[2])), max_new_tokens=24, block_length=8)
print(json.dumps(output.tolist()))
"""


def test_saved_folder_works_as_remote_code_without_the_package(tmp_path, tiny_config):
    folder = tmp_path / "remote"
    script = f"""
import torch
from illada import ILLaDAConfig, ILLaDAForCausalLM
ILLaDAConfig.register_for_auto_class()
ILLaDAForCausalLM.register_for_auto_class("AutoModelForCausalLM")
torch.manual_seed(0)
ILLaDAForCausalLM(ILLaDAConfig(**{tiny_config.to_diff_dict()!r})).save_pretrained({str(folder)!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    prompt = [[0, 7, 8, 9, 10], [0, 30, 31, 5, 33]]
    expected = AutoModelForCausalLM.from_pretrained(folder).generate(
        torch.tensor(prompt), max_new_tokens=24, block_length=8
    )
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", REMOTE_SCRIPT, str(folder), json.dumps(prompt)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == expected.tolist()


# Forward


def test_logits_to_keep(tiny_model):
    input_ids = torch.randint(6, 64, (2, 7))
    keep = torch.rand(2, 7) < 0.5
    with torch.no_grad():
        logits = tiny_model(input_ids).logits
        torch.testing.assert_close(tiny_model(input_ids, logits_to_keep=3).logits, logits[:, -3:])
        torch.testing.assert_close(
            tiny_model(input_ids, logits_to_keep=torch.tensor([1, 4])).logits, logits[:, [1, 4]]
        )
        torch.testing.assert_close(tiny_model(input_ids, logits_to_keep=keep).logits, logits[keep])
        pair = (torch.tensor([1, 0, 1]), torch.tensor([4, 2, 0]))
        torch.testing.assert_close(tiny_model(input_ids, logits_to_keep=pair).logits, logits[pair])


def test_attention_sees_both_directions_and_no_padding(tiny_model):
    input_ids = torch.randint(6, 64, (1, 8))
    changed = input_ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 58 + 6
    mask = torch.ones_like(input_ids)
    with torch.no_grad():
        assert not torch.allclose(tiny_model(input_ids).logits[:, 0], tiny_model(changed).logits[:, 0])
        mask[0, -1] = 0
        a, b = (tiny_model(ids, attention_mask=mask).logits[:, :-1] for ids in (input_ids, changed))
    assert torch.equal(a, b)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float])
def test_a_four_dimensional_mask_keeps_segments_apart(tiny_config, attention, dtype):
    """True or 1 where attention is allowed, or additive; also through eager attention, which adds what it gets."""
    model = ILLaDAForCausalLM._from_config(tiny_config, attn_implementation=attention).eval()
    input_ids = torch.randint(6, 64, (1, 8))
    segment = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]])
    allowed = (segment.unsqueeze(1) == segment.unsqueeze(2)).unsqueeze(1)
    mask = torch.where(allowed, 0.0, torch.finfo(dtype).min) if dtype.is_floating_point else allowed.to(dtype)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    with torch.no_grad():
        logits = model(input_ids, attention_mask=mask, position_ids=positions).logits
        apart = torch.cat([model(part).logits for part in (input_ids[:, :5], input_ids[:, 5:])], 1)
    torch.testing.assert_close(logits, apart)


def test_residual_dropout_acts_in_training_on_attention_and_mlp_outputs(tiny_config):
    tiny_config.resid_pdrop = 1.0
    model = ILLaDAForCausalLM(tiny_config)
    input_ids = torch.randint(6, 64, (1, 8))
    embeddings_alone = model.lm_head(model.model.norm(model.model.embed_tokens(input_ids)))
    assert torch.allclose(model.train()(input_ids).logits, embeddings_alone)  # nothing reaches the residual stream
    assert not torch.allclose(model.eval()(input_ids).logits, embeddings_alone)


def test_initialisation_is_the_release_s(tiny_config):
    tiny_config.hidden_size, tiny_config.head_dim, tiny_config.intermediate_size = 256, 64, 512
    model = ILLaDAForCausalLM(tiny_config)
    layer = model.model.layers[0]
    residual_std = 0.1 / math.sqrt(2 * 2)
    for weight, std in [
        (layer.self_attn.q_proj.weight, 0.1),
        (layer.mlp.up_proj.weight, 0.1),
        (layer.self_attn.o_proj.weight, residual_std),
        (layer.mlp.down_proj.weight, residual_std),
        (model.model.embed_tokens.weight, math.sqrt(1 / 512)),
    ]:
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert model.model.embed_tokens.weight[tiny_config.pad_token_id].any()


def test_flex_attention_refuses_a_dense_mask(tiny_model):
    tiny_model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="attention_mask"):
        tiny_model(torch.randint(6, 64, (1, 8)), attention_mask=torch.ones(1, 1, 8, 8, dtype=torch.bool))


# Loss and training


def test_loss_equals_a_plain_derivation(tiny_config):
    model = ILLaDAForCausalLM(tiny_config).double()
    torch.manual_seed(1)
    model.requires_grad_(False)
    input_ids, labels = torch.randint(6, 64, (3, 9)), torch.randint(6, 64, (3, 9))
    labels[torch.rand(3, 9) < 0.3] = -100
    weights = torch.where(torch.rand(3, 9) < 0.5, torch.rand(3, 9).double() * 5, 0)
    logits = model(input_ids).logits
    total = 0.0
    for row in range(3):
        for position in range(9):
            if labels[row, position] != -100:
                probabilities = logits[row, position].exp() / logits[row, position].exp().sum()
                total -= weights[row, position].item() * math.log(probabilities[labels[row, position]].item())
    output = model(input_ids, labels=labels, loss_weights=weights)
    assert output.loss.item() == pytest.approx(total / 27, rel=1e-12)
    assert output.logits.shape == (((labels != -100) & (weights != 0)).sum(), 64)  # no others are made
    by_items = model(input_ids, labels=labels, loss_weights=weights, num_items_in_batch=torch.tensor(5))
    assert by_items.loss.item() == pytest.approx(total / 5, rel=1e-12)
    unweighted = model(input_ids, labels=labels).loss
    assert unweighted.item() == pytest.approx(
        model(input_ids, labels=labels, loss_weights=torch.ones(3, 9)).loss.item(), rel=1e-12
    )


def test_loss_is_made_in_fp32_at_least():
    logits, targets = torch.randn(4, 8).bfloat16(), torch.tensor([1, 2, 3, 4])
    assert masked_diffusion_loss(logits, targets, None, 4).dtype == torch.float32
    assert masked_diffusion_loss(logits.double(), targets, None, 4).dtype == torch.float64


def switch_checkpointing(model, state: str):
    """By the name that the installed Transformers has for it."""
    newer = getattr(model, f"activation_checkpointing_{state}", None)
    (newer or getattr(model, f"gradient_checkpointing_{state}"))()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_steps_lower_the_loss(tiny_config, checkpointing):
    torch.manual_seed(0)
    model = ILLaDAForCausalLM(tiny_config).train()
    if checkpointing:
        switch_checkpointing(model, "enable")
    clean = torch.randint(6, 64, (4, 12))
    masked = torch.rand(4, 12) < 0.5
    batch = {
        "input_ids": clean.masked_fill(masked, 5),
        "labels": clean,
        "loss_weights": masked / 0.5,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(**batch).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_gradient_checkpointing_gives_the_same_gradients(tiny_config):
    torch.manual_seed(0)
    model = ILLaDAForCausalLM(tiny_config).train()
    input_ids = torch.randint(6, 64, (2, 10))
    gradients = []
    for state in ("disable", "enable"):
        switch_checkpointing(model, state)
        model.zero_grad()
        model(input_ids, labels=input_ids).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


# Generation config


def test_generation_config_is_saved_and_loaded_with_the_model(tmp_path, tiny_model):
    tiny_model.generation_config.update(block_length=4, canvas="fixed", confidence_threshold=0.9, max_new_tokens=6)
    tiny_model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "generation_config.json").read_text())
    assert stored["block_length"] == 4 and None not in stored.values()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded.generation_config) is type(tiny_model.generation_config)
    prompt = torch.tensor([[0, 9, 10, 11]])
    assert torch.equal(reloaded.generate(prompt), tiny_model.generate(prompt))
    (tmp_path / "generation_config.json").unlink()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.block_length is None


def test_a_length_that_cannot_be_loaded_is_not_saved(tmp_path, tiny_model):
    tiny_model.generation_config.max_new_tokens = 0
    with pytest.raises(ValueError, match="max_new_tokens"):
        tiny_model.save_pretrained(tmp_path)


def test_the_lm_head_runs_on_masked_positions_of_the_block_alone(tiny_model):
    rows = []
    tiny_model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(tuple(output.shape)))
    tiny_model.generate(torch.tensor([[0, 9, 10, 11]]), max_new_tokens=8, block_length=4, eos_token_id=None)
    assert rows == [(n, 64) for n in (4, 3, 2, 1, 4, 3, 2, 1)]
