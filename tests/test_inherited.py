"""What the model classes inherit from Transformers: each public name is tested to work, or refuses by name."""

import inspect
import json
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from tiny_models import MASK, random_model
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from illada import ILLaDAForCausalLM, ILLaDAModel
from illada.inherited import RefusesOtherParts, RefusesWritingFromLeftToRight

IDS = torch.tensor([[7, 8, MASK, 10], [11, 12, 13, MASK]])
REFUSED = {
    name for base in (RefusesOtherParts, RefusesWritingFromLeftToRight) for name in vars(base) if name[0] != "_"
}
TESTED = set()


def covers(*names):
    """Marks a test as the one of these inherited names."""
    TESTED.update(names)
    return lambda test: test


@pytest.fixture
def model():
    return random_model(0, num_layers=2)


def test_nothing_is_inherited_unseen():
    """A name that a later Transformers adds fails here, until it is tested or refused."""
    inherited = {
        name
        for base in (*ILLaDAForCausalLM.__mro__, *ILLaDAModel.__mro__)
        if base.__module__.startswith("transformers.")
        for name in vars(base)
        if not name.startswith("_")
    }
    assert inherited - TESTED - REFUSED == set()
    assert not TESTED & REFUSED


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_does_not_work_says_what_to_use(model, name):
    with pytest.raises(NotImplementedError, match=f"`{name}` does not work on a masked diffusion model: .*`"):
        getattr(model, name)([[7, 8, 9]])


# Arguments of forward


@covers("forward", "loss_function")
def test_labels_give_the_cross_entropy_of_their_own_positions(model):
    loss = model(IDS, labels=IDS).loss
    assert torch.allclose(loss, F.cross_entropy(model(IDS).logits.flatten(0, 1), IDS.flatten()))
    theirs = model.loss_function(model(IDS).logits, IDS, vocab_size=37)  # unshifted, too; in fp32
    torch.testing.assert_close(theirs.double(), loss, rtol=1e-6, atol=0)


@covers("can_record_outputs")
def test_hidden_states_and_attentions_are_returned(model):
    model.set_attn_implementation("eager")
    output = model(IDS, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3 and len(output.attentions) == 2
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    assert (output.attentions[0] > 0).all()  # in both directions
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 2, 4, dtype=torch.float64))
    as_tuple = model(IDS, return_dict=False, token_type_ids=torch.zeros_like(IDS))
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.logits)


@pytest.mark.parametrize(
    "argument, value",
    [
        ("is_causal", True),
        ("use_cache", True),
        ("attention_masks", torch.ones(2, 4)),  # misspelt
        ("loss_weight", torch.ones(2, 4)),
        ("cu_seq_lens_q", torch.tensor([0, 4])),  # SDPA would attend across segments
        ("encoder_hidden_states", torch.ones(2, 4, 16)),
    ],
)
def test_an_argument_that_nothing_would_heed_is_refused(model, argument, value):
    with pytest.raises(ValueError, match=argument):
        model(IDS, **{argument: value})
    if argument != "use_cache":  # with which Transformers calls every trunk
        with pytest.raises(ValueError, match=argument):
            model.model(IDS, **{argument: value})


def test_a_cache_of_transformers_takes_part_and_grows(model):
    cache = DynamicCache()
    model(IDS, past_key_values=cache)
    assert cache.get_seq_length() == 4


# Parts


@covers("base_model", "base_model_prefix", "get_decoder", "get_encoder", "retrieve_modules_from_names")
def test_the_trunk_is_found(model):
    assert model.base_model is model.get_decoder() is model.model and model.base_model_prefix == "model"
    assert model.get_encoder() is model  # "otherwise returns `self`"
    assert model.retrieve_modules_from_names(["lm_head.weight"]) == [model.lm_head]


@covers("get_input_embeddings", "get_output_embeddings", "set_input_embeddings", "set_output_embeddings")
def test_embeddings_are_exchanged(model):
    embedding, head = nn.Embedding(37, 16, dtype=torch.float64), nn.Linear(16, 37, bias=False, dtype=torch.float64)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
    assert model.get_input_embeddings() is model.model.embed_tokens is embedding
    assert model.get_output_embeddings() is model.lm_head is head
    assert torch.equal(model(IDS).logits, model(inputs_embeds=embedding(IDS)).logits)


@covers("resize_token_embeddings")
@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary(tied, tmp_path):
    model = random_model(0, tie_word_embeddings=tied)
    logits = model(IDS).logits
    model.resize_token_embeddings(40)
    assert model.config.vocab_size == 40 and (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    torch.testing.assert_close(model(IDS).logits[..., :37], logits)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(again.generate(IDS, max_new_tokens=4), model.generate(IDS, max_new_tokens=4))
    assert (model.generate(IDS, max_new_tokens=4) != MASK).all()
    model.resize_token_embeddings(5)  # [MASK] is cut off: neither a text nor a checkpoint comes of this
    with pytest.raises(ValueError, match="`mask_token_id` must be in the vocabulary of 5 tokens"):
        model.generate(torch.tensor([[3, 4]]), max_new_tokens=4)
    with pytest.raises(Exception, match="`mask_token_id` must be in"):
        model.save_pretrained(tmp_path / "cut")


@covers("tie_weights", "get_expanded_tied_weights_keys")
def test_weights_are_tied_as_the_configuration_says():
    model = random_model(0, tie_word_embeddings=True)
    assert model.get_expanded_tied_weights_keys() == {"lm_head.weight": "model.embed_tokens.weight"}
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


@covers("get_parameter_or_buffer", "named_non_persistent_buffers", "num_parameters", "get_memory_footprint")
def test_parameters_are_counted_and_found(model):
    count = sum(parameter.numel() for parameter in model.parameters())
    assert model.num_parameters() == count
    assert model.num_parameters(exclude_embeddings=True) == count - 37 * 16
    buffers = dict(model.named_non_persistent_buffers())
    assert all("rotary_emb" in name for name in buffers)
    assert torch.equal(model.get_parameter_or_buffer("lm_head.weight"), model.lm_head.weight)
    assert model.get_memory_footprint() == 8 * count + sum(b.numel() * b.element_size() for b in buffers.values())


@covers("device", "dtype", "to", "cuda", "half", "float", "eval", "train", "dummy_inputs", "main_input_name")
def test_dtype_and_device(model):
    assert model.dtype == torch.float64 and model.device.type == "cpu"
    assert model.half().dtype == torch.float16 and model.float().dtype == torch.float32
    assert model.to(torch.bfloat16)(**model.dummy_inputs).logits.dtype == torch.bfloat16
    assert model.main_input_name in inspect.signature(model.forward).parameters
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError), match="CUDA|NVIDIA"):
            model.cuda()


# Attention, compilation, parallelism


@covers("set_attn_implementation", "get_correct_attn_implementation", "is_backend_compatible")
def test_attention_is_exchanged(model):
    expected = model(IDS).logits
    assert model.is_backend_compatible() and model.get_correct_attn_implementation("eager") == "eager"
    model.set_attn_implementation("eager")  # its softmax is in fp32
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises((ValueError, ImportError), match="(?i)nonsense"):
        model.set_attn_implementation("nonsense")


@covers("get_experts_implementation", "set_experts_implementation", "get_correct_experts_implementation")
def test_there_are_no_experts(model):
    with pytest.raises(ValueError, match="does not support setting experts implementation"):
        model.set_experts_implementation("grouped_mm")
    assert model.get_correct_experts_implementation(None) in (None, "eager", "grouped_mm")
    assert isinstance(model.get_experts_implementation(), dict)


@covers("get_compiled_call", "use_kernels", "set_use_kernels")
def test_a_compiled_call_is_the_call(model):
    from transformers import CompileConfig

    compiled = model.get_compiled_call(CompileConfig(backend="eager", mode=None, dynamic=False))
    torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits)
    model.set_use_kernels(False)
    assert not model.use_kernels


@covers(
    "ep_plan",
    "fsdp_plan",
    "fsdp_size",
    "init_parallel_plans",
    "maybe_distribute_model",
    "pp_plan",
    "prepare_distribute_model",
    "supports_context_parallel",
    "supports_pp_plan",
    "supports_tp_plan",
    "tp_plan",
    "tp_size",
)
def test_parallel_plans_name_parts_that_exist(model):
    """`test_parallel.py` runs the first of them; a sequence cut into causal pieces is none of them."""
    names = {name for name, _ in model.named_modules()}
    assert model.supports_tp_plan and model.supports_pp_plan and not model.supports_context_parallel
    assert "model.layers.*.self_attn.q_proj" in model.tp_plan and {"lm_head"} <= set(model.pp_plan)
    for pattern in model.tp_plan:
        assert {pattern.replace("*", "0"), pattern.rpartition(".")[0].replace("*", "0")} & names, pattern


# Loading and saving


@covers(
    "save_pretrained",
    "from_pretrained",
    "get_init_context",
    "init_weights",
    "initialize_weights",
    "post_init",
    "config_class",
    "generation_config_class",
    "adjust_generation_fn",
    "barrier_after_gathered_checkpoint_save",
    "gather_sharded_state_dict_for_save",
    "is_distributed_loading_by_transformers",
    "save_distributed_checkpoint",
    "should_save_on_this_rank",
    "push_to_hub",  # to a Hub: test_ecosystem.py
    "is_custom_code",
    "mark_tied_weights_as_initialized",
    "is_remote_code",
)
def test_variants_of_saving(model, tmp_path):
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "state", state_dict=state, variant="plus", max_shard_size="5KB")
    changed = ILLaDAForCausalLM.from_pretrained(tmp_path / "state", variant="plus")
    assert all(torch.equal(changed.state_dict()[name], tensor) for name, tensor in state.items())
    assert len(list((tmp_path / "state").glob("*.plus*.safetensors"))) > 1
    model.save_pretrained(tmp_path / "not_main", is_main_process=False)
    assert not (tmp_path / "not_main" / "config.json").exists()
    loaded = ILLaDAModel.from_pretrained(tmp_path / "state", variant="plus")
    assert type(loaded.config) is model.config_class
    assert type(changed.generation_config) is model.generation_config_class


@covers("register_for_auto_class", "add_model_tags", "model_tags", "can_generate")
def test_tags_and_auto_classes(model, tmp_path):
    assert model.can_generate() and not model.model.can_generate()
    model.add_model_tags("diffusion")
    assert "diffusion" in model.model_tags
    model.save_pretrained(tmp_path)
    assert "AutoModelForCausalLM" in json.loads((tmp_path / "config.json").read_text())["auto_map"]
    with pytest.raises(ValueError, match="nonsense"):
        type(model).register_for_auto_class("nonsense")


@covers("load_custom_generate")
def test_a_loop_from_a_folder(model, tmp_path):
    """Transformers' way to another loop: what the folder has is run, and `generate` itself takes none."""
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text("def generate(model, x): return model.dtype, x\n")
    custom = model.load_custom_generate(tmp_path, trust_remote_code=True)
    assert custom(model=model, x=1) == (torch.float64, 1)
    with pytest.raises(ValueError, match="custom_generate"):
        model.generate(IDS, max_new_tokens=2, custom_generate=str(tmp_path))


@covers(
    "continuous_batching_context_manager",
    "destroy_cached_continuous_batching_manager",
    "generate_batch",
    "init_continuous_batching",
)
def test_continuous_batching(model):
    """More of it in `test_continuous_batching.py`."""
    (output,) = model.generate_batch([[7, 8, 9]], max_new_tokens=4).values()
    assert output.generated_tokens == model.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=4)[0, 3:].tolist()
    model.destroy_cached_continuous_batching_manager()


@covers("generate", "input_modalities", "output_modalities")
def test_every_argument_of_the_inherited_generate_is_taken_or_refused(model):
    """Fields of the configuration: test_generation_arguments.py."""
    from transformers import GenerationMixin

    theirs = inspect.signature(GenerationMixin.generate).parameters.keys() - {"self", "kwargs"}
    ours = inspect.signature(model.generate).parameters.keys()
    for name in theirs - ours:
        with pytest.raises(ValueError, match=name):
            model.generate(IDS, max_new_tokens=2, **{name: True})
    assert model.input_modalities in ("text", ("text",)) and model.output_modalities == ("text",)


@covers("dequantize")
def test_there_is_nothing_to_dequantize(model):
    """int8 weights: test_ecosystem.py."""
    with pytest.raises(ValueError, match="quantize"):
        model.dequantize()


@covers("warn_if_padding_and_no_attention_mask")
def test_padding_without_a_mask_warns(model, caplog, monkeypatch):
    from transformers.utils import logging as transformers_logging

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    transformers_logging.get_logger("transformers").warning_once.cache_clear()
    model.warn_if_padding_and_no_attention_mask(torch.tensor([[1, 7]]), None)
    assert "attention_mask" in caplog.text


# Training


@covers(
    "activation_checkpointing_disable",
    "activation_checkpointing_enable",
    "gradient_checkpointing_disable",
    "gradient_checkpointing_enable",
    "is_activation_checkpointing",
    "is_gradient_checkpointing",
    "supports_gradient_checkpointing",
)
def test_checkpointing_gives_the_same_gradients(model):
    """Under the name of the installed version; later ones warn of the old."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    gradients = []
    for switch in ("enable", "disable"):
        model.train().zero_grad()
        getattr(model, f"{kind}_checkpointing_{switch}")()
        assert getattr(model, f"is_{kind}_checkpointing") == (switch == "enable")
        model(IDS, labels=IDS).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@covers("enable_input_require_grads", "disable_input_require_grads")
def test_inputs_require_gradients(model):
    model.requires_grad_(False)
    model.enable_input_require_grads()
    assert model(IDS).logits.requires_grad
    model.disable_input_require_grads()
    assert not model(IDS).logits.requires_grad


@covers(
    "active_adapters",
    "add_adapter",
    "delete_adapter",
    "disable_adapters",
    "enable_adapters",
    "enable_peft_hotswap",
    "get_adapter_state_dict",
    "load_adapter",
    "set_adapter",
)
def test_adapters_in_place(model, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    plain = model(IDS).logits
    try:
        model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False), "one")
    except ValueError as error:
        pytest.skip(f"this Transformers refuses this PEFT: {error}")
    adapted = model(IDS).logits
    assert not torch.equal(adapted, plain) and model.active_adapters() == ["one"]
    assert model.get_adapter_state_dict("one")
    model.disable_adapters()
    assert torch.equal(model(IDS).logits, plain)
    model.enable_adapters()
    model.set_adapter("one")
    model.save_pretrained(tmp_path)  # the adapter only
    again = random_model(0, num_layers=2)
    again.enable_peft_hotswap()
    again.load_adapter(tmp_path, "two")
    torch.testing.assert_close(again(IDS).logits, adapted)
    model.delete_adapter("one")
    with warnings.catch_warnings(), pytest.raises(ValueError):
        warnings.simplefilter("error")
        model.set_adapter("one")
