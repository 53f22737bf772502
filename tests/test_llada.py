import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from illada import ILLaDAConfig, ILLaDAForCausalLM, LLaDAConfig, LLaDAModelLM
from illada.configuration_llada import IMPLEMENTED_VALUES

GOLDEN = Path(__file__).parent / "fixtures" / "llada"
CHECKPOINT = GOLDEN / "checkpoint"
RUNS = json.loads((GOLDEN / "generation.json").read_text())
RELEASED = json.loads((CHECKPOINT / "config.json").read_text())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_golden_logits(attention):
    golden = load_file(GOLDEN / "logits.safetensors")
    model, loading = AutoModel.from_pretrained(CHECKPOINT, attn_implementation=attention, output_loading_info=True)
    assert type(model) is LLaDAModelLM
    assert not any(loading.values())
    with torch.no_grad():
        logits = model(golden["input_ids"]).logits
        masked = model(golden["input_ids"], attention_mask=golden["attention_mask"]).logits
    torch.testing.assert_close(logits, golden["logits_no_mask"], atol=1e-4, rtol=0)
    kept = golden["attention_mask"].bool()
    torch.testing.assert_close(masked[kept], golden["logits_masked"][kept], atol=1e-4, rtol=0)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run['gen_length']}-by-{run['block_length']}")
def test_golden_runs(run):
    """Token for token, on the fixed canvas, which nobody has to ask for."""
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    num_blocks = run["gen_length"] // run["block_length"]
    output = model.generate(
        torch.tensor([run["prompt"]]),
        max_new_tokens=run["gen_length"],
        block_length=run["block_length"],
        max_denoising_steps=run["steps"] // num_blocks,
        eos_token_id=None,  # the released code goes on after EOS
    )
    assert output[0].tolist() == run["sequence"]


def test_both_spellings_are_read_and_the_standard_one_is_written(tmp_path):
    config = AutoConfig.from_pretrained(CHECKPOINT)
    standard = LLaDAConfig(
        vocab_size=150,
        hidden_size=48,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        mask_token_id=5,
        eos_token_id=2,
        pad_token_id=2,
    )
    for released_name, name in LLaDAConfig.attribute_map.items():
        assert getattr(config, released_name) == getattr(config, name) == getattr(standard, name), name
    assert config.head_dim == standard.head_dim == 12
    assert (config.rms_norm_eps, config.mask_token_id, config.bos_token_id) == (1e-5, 5, None)

    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["hidden_size"] == 48
    assert not set(written) & (set(LLaDAConfig.attribute_map) | set(IMPLEMENTED_VALUES) | {"embedding_size"})
    assert AutoConfig.from_pretrained(tmp_path).to_json_string() == config.to_json_string()


def test_derived_sizes_of_the_release():
    assert LLaDAConfig(**{**RELEASED, "embedding_size": 192}).vocab_size == 192
    assert LLaDAConfig(**{**RELEASED, "embedding_size": None}).vocab_size == 150
    assert LLaDAConfig(**{**RELEASED, "mlp_hidden_size": None}).intermediate_size == 4 * 48
    assert LLaDAConfig(**{**RELEASED, "n_kv_heads": None}).num_key_value_heads == 4
    assert LLaDAConfig(**{**RELEASED, "n_kv_heads": 2}).num_key_value_heads == 2


def test_overriding_a_field_under_either_name():
    assert AutoModel.from_pretrained(CHECKPOINT, n_layers=1).config.num_hidden_layers == 1
    assert len(AutoModel.from_pretrained(CHECKPOINT, num_hidden_layers=1).model.layers) == 1


@pytest.mark.parametrize(
    "switch",
    [
        {"activation_type": "swiglu"},
        {"alibi": True},
        {"attention_layer_norm": True},
        {"bias_for_layer_norm": True},
        {"block_group_size": 4},
        {"block_type": "sequential"},
        {"clip_qkv": 8.0},
        {"embedding_dropout": 0.1},
        {"include_bias": True},
        {"include_qkv_bias": True},
        {"input_emb_norm": True},
        {"layer_norm_type": "default"},
        {"layer_norm_with_affine": False},
        {"multi_query_attention": True},
        {"rope": False},
        {"scale_logits": True},
    ],
    ids=lambda switch: next(iter(switch)),
)
def test_what_is_not_implemented_is_refused_by_name(switch):
    (name, value), *_ = switch.items()
    with pytest.raises(ValueError, match=rf"^`{name}` must be .*, got {value!r}: ") as error:
        LLaDAConfig(**{**RELEASED, **switch})
    assert "\n" not in str(error.value)


def test_every_switch_is_in_the_refusal_test():
    tested = test_what_is_not_implemented_is_refused_by_name.pytestmark[0].args[1]
    assert {name for switch in tested for name in switch} == set(IMPLEMENTED_VALUES)


def test_saving_gives_the_parameters_their_released_names(tmp_path):
    model = AutoModel.from_pretrained(CHECKPOINT)
    model.save_pretrained(tmp_path)
    original, saved = load_file(CHECKPOINT / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert original.keys() == saved.keys()
    assert all(torch.equal(original[name], saved[name]) for name in original)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is LLaDAModelLM
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_queries_and_keys_are_rotated_in_full_precision():
    """What attention receives in bf16 is the fp32 rotation, rounded once; iLLaDA's is rounded on the way."""
    seen = {}

    def record(module, query, key, value, attention_mask, **kwargs):
        seen["query"], seen["key"] = query, key
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("record", record)
    model = AutoModel.from_pretrained(CHECKPOINT, dtype=torch.bfloat16)
    model.config._attn_implementation = "record"
    attention = model.model.layers[0].self_attn
    torch.manual_seed(0)
    hidden = torch.randn(1, 200, 48, dtype=torch.bfloat16)
    positions = torch.arange(200)[None]
    with torch.no_grad():
        cos, sin = model.model.rotary_emb(hidden, positions)
        attention(hidden, position_embeddings=(cos, sin), attention_mask=None)
        expected = {}
        for name, projection in (("query", attention.q_proj), ("key", attention.k_proj)):
            states = projection(hidden).view(1, 200, 4, 12).transpose(1, 2).float()
            rotated = torch.cat((-states[..., 6:], states[..., :6]), dim=-1)
            angles = positions[0, :, None].double() / 500000.0 ** (torch.arange(0, 12, 2).double() / 12)
            angles = torch.cat((angles, angles), dim=-1)
            expected[name] = (states * angles.cos() + rotated * angles.sin()).to(torch.bfloat16)
        assert cos.dtype == torch.float32
        for name in ("query", "key"):
            # A bf16 unit in the last place may still flip where the fp32 value lies half-way between two.
            assert (seen[name] == expected[name]).float().mean() > 0.999
        attention(hidden, position_embeddings=(cos.bfloat16(), sin.bfloat16()), attention_mask=None)
        assert (seen["query"] == expected["query"]).float().mean() < 0.9


def test_the_standard_class_keeps_the_full_precision_rotation():
    model = ILLaDAForCausalLM(ILLaDAConfig(**LLaDAConfig(**RELEASED).to_dict()))
    cos, _ = model.model.rotary_emb(torch.zeros(1, 1, 48, dtype=torch.bfloat16), torch.zeros(1, 1))
    assert cos.dtype == torch.float32
    assert ILLaDAConfig().rope_full_precision is False


def test_a_step_of_training_lowers_the_loss():
    model = AutoModel.from_pretrained(CHECKPOINT).train()
    tokens = torch.arange(10, 42)[None]
    masked = torch.arange(32)[None] % 2 == 0
    batch = {"input_ids": tokens.masked_fill(masked, 5), "labels": tokens.masked_fill(~masked, -100)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
