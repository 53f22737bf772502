"""The block cache: exact where it must be, its own approximation elsewhere, and nothing of the canvas copied."""

import copy
import json
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from cache_oracle import oracle_generate
from hypothesis import given
from hypothesis import strategies as st
from test_decoding_properties import (
    batches,
    certain_rankings,
    examples,
    guidance,
    models,
    parallel_rules,
    prompts_with_blanks,
    schedules,
)
from test_golden import run
from tiny_models import EOS, MASK, PAD, pad_left, random_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, CompileConfig

from illada import MaskedDiffusionGenerationConfig
from illada.block_cache import BlockCache
from illada.canvas import ActiveBlocks, Canvas, Row
from illada.prediction import CachedPredictor

CACHES = ["prefix", "dual"]
DEEP_MODELS = [random_model(seed, num_layers=3) for seed in range(3)]

caches = st.sampled_from(CACHES)
deep_models = st.sampled_from(DEEP_MODELS)
refreshes = st.sampled_from(
    [
        {},
        {},
        {"cache_refresh_interval": 2},
        {"cache_refresh_interval": 3},
        {"cache_refresh_entropy": 2.8},
        {"cache_refresh_entropy": 2.8, "cache_refresh_interval": 3},
    ]
)


# Exactness


@examples
@given(models, batches, schedules, parallel_rules, certain_rankings, guidance, caches, refreshes)
def test_one_layer_is_exact(model, batch, schedule, rule, ranking, scale, block_cache, refresh):
    """Keys and values of a first layer depend on their own tokens alone, and those outside the block do not change."""
    arguments = {**pad_left(batch), **schedule, **rule, "remasking": ranking, "guidance_scale": scale}
    arguments |= {"return_dict_in_generate": True, "output_trace": True}
    exact = model.generate(**arguments)
    cached = model.generate(**arguments, block_cache=block_cache, **refresh)
    assert torch.equal(cached.sequences, exact.sequences)
    assert torch.equal(cached.num_forward_passes, exact.num_forward_passes)
    assert torch.equal(cached.commit_steps, exact.commit_steps)
    torch.testing.assert_close(cached.commit_confidences, exact.commit_confidences, equal_nan=True)


@examples
@given(
    deep_models,
    batches,
    schedules,
    parallel_rules,
    certain_rankings,
    guidance,
    caches,
    st.sampled_from([{"cache_refresh_interval": 1}, {"cache_refresh_entropy": 1e-9}]),
)
def test_a_refresh_at_every_step_is_exact(model, batch, schedule, rule, ranking, scale, block_cache, refresh):
    arguments = {**pad_left(batch), **schedule, **rule, "remasking": ranking, "guidance_scale": scale}
    exact = model.generate(**arguments)
    assert torch.equal(model.generate(**arguments, block_cache=block_cache, **refresh), exact)


@pytest.mark.parametrize("block_cache", CACHES)
def test_a_refresh_at_every_step_gives_the_golden_runs(golden_illada, block_cache):
    model = AutoModel.from_pretrained(golden_illada / "checkpoint")
    for golden in json.loads((golden_illada / "generation.json").read_text()):
        exact = run(model, golden)
        cached = run(model, golden, block_cache=block_cache, cache_refresh_interval=1)
        assert torch.equal(cached.sequences, exact.sequences), golden["name"]
        assert torch.equal(cached.num_forward_passes, exact.num_forward_passes), golden["name"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("guidance_scale", [None, 1.5])
@pytest.mark.parametrize("where", ["growing", "fixed", "blanks"])
@pytest.mark.parametrize("block_cache", CACHES)
def test_right_after_a_full_pass_a_block_pass_changes_nothing(block_cache, where, guidance_scale, attention):
    model = random_model(0, num_layers=3)
    model.set_attn_implementation(attention)
    batch = [[7, 8, 9, 10, 11, 12, 13], [9, 8], [14, 15, 16, 17]]
    if where == "blanks":
        batch = [[7, MASK, 9, MASK, 11, MASK, 13], [MASK, 8], [14, 15, 16, MASK]]
    config = MaskedDiffusionGenerationConfig(
        block_cache=block_cache,
        guidance_scale=guidance_scale,
        canvas="fixed" if where == "fixed" else "growing",
        block_length=2,
    )
    canvas = Canvas(3, MASK)
    rows = [canvas.admit(index, torch.tensor(prompt), 8, config) for index, prompt in enumerate(batch)]
    predictor = CachedPredictor(model, canvas, torch.device("cpu"), 1 if guidance_scale is None else 2)
    for row in rows:
        row.block = next(row.blocks)
        if where == "growing":
            row.block = next(row.blocks)  # the second of the response
        predictor.begin(row)

    hidden = []
    hook = model.model.register_forward_hook(lambda module, args, output: hidden.append(output.last_hidden_state))
    blocks = ActiveBlocks(canvas, rows)
    places, line = blocks.masked.nonzero(as_tuple=True)
    logits = []
    with torch.no_grad():
        for block_steps in range(2):
            for row in rows:
                row.block_steps = block_steps
            logits.append(predictor.logits(rows, places, blocks.columns[places, line]))
    hook.remove()

    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-9)
    full, part = (states.unflatten(0, (3, -1)) for states in hidden)
    assert part.shape[2] < full.shape[2]
    for index, row in enumerate(rows):
        computed = predictor.computed[row].tolist()
        torch.testing.assert_close(part[index, :, : len(computed)], full[index][:, computed], rtol=0, atol=1e-9)


# The approximation


def _oracle_settings():
    rng = random.Random(0)
    words = [token for token in range(37) if token not in (PAD, EOS, MASK)]
    for index in range(60):
        prompt = [rng.choice([*words[:9], MASK] if index % 3 == 0 else words) for _ in range(rng.randint(2, 7))]
        yield (
            index % 3,
            prompt,
            {
                "block_cache": CACHES[index % 2],
                "canvas": rng.choice(["growing", "fixed"]),
                "max_new_tokens": rng.randint(2, 9),
                "block_length": rng.randint(2, 5),
                "cache_refresh_interval": rng.choice([None, None, 2, 3]),
                "cache_refresh_entropy": rng.choice([None, None, 2.6, 2.9]),
                "confidence_threshold": rng.choice([None, 0.3]),
            },
        )


def test_cached_decoding_agrees_with_the_oracle():
    differs = dict.fromkeys((*CACHES, "cache_refresh_entropy"), 0)
    for index, prompt, settings in _oracle_settings():
        model = DEEP_MODELS[index]
        expected = oracle_generate(
            model, prompt, mask_id=MASK, **{name: value for name, value in settings.items() if value is not None}
        )
        arguments = {"inputs": torch.tensor([prompt]), "eos_token_id": None, "pad_token_id": PAD}
        assert model.generate(**arguments, **settings)[0].tolist() == expected, settings
        exact = {**settings, "block_cache": None, "cache_refresh_interval": None, "cache_refresh_entropy": None}
        differs[settings["block_cache"]] += model.generate(**arguments, **exact)[0].tolist() != expected
        without = {**settings, "cache_refresh_entropy": None}
        differs["cache_refresh_entropy"] += model.generate(**arguments, **without)[0].tolist() != expected
    assert min(differs.values()) >= 5, differs  # or else the cache, or the refresh, would not have been tried


@pytest.mark.parametrize("block_cache", CACHES)
def test_a_pass_of_the_whole_text_follows_a_token_of_much_entropy(block_cache):
    """Widths of the passes against the entropies of what each committed, by a forward pass over the text then seen."""
    model, prompt = DEEP_MODELS[0], torch.tensor([[7, 8, 9]])
    logits, committed = [], []
    head = model.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output.clone()))
    passes = Passes(
        model,
        inputs=prompt,
        block_cache=block_cache,
        cache_refresh_entropy=3.02,
        on_step=lambda step: committed.append(step.committed[step.confidence.isfinite()]),
        max_new_tokens=18,
        block_length=6,
    )
    head.remove()
    is_full = [width > 6 for width in passes.widths]
    for index in range(1, len(is_full)):
        row = logits[index - 1][committed[index - 1]]
        row[:, MASK] = -torch.inf
        entropy = torch.distributions.Categorical(logits=row).entropy().max()
        assert is_full[index] == (index % 6 == 0 or bool(entropy > 3.02))
    assert 3 < sum(is_full) < len(is_full)


@examples
@given(
    deep_models,
    st.lists(prompts_with_blanks, min_size=2, max_size=4),
    schedules,
    parallel_rules,
    certain_rankings,
    guidance,
    caches,
    refreshes,
)
def test_a_row_of_a_batch_is_what_it_is_alone(model, batch, schedule, rule, ranking, scale, block_cache, refresh):
    """Rows differ in length, blanks and the step at which they retire; their cached keys change places."""
    arguments = {**schedule, **rule, "remasking": ranking, "guidance_scale": scale, "return_dict_in_generate": True}
    arguments |= {"block_cache": block_cache, **refresh}
    together = model.generate(**pad_left(batch), **arguments)
    width = max(map(len, batch))
    for row, prompt in enumerate(batch):
        alone = model.generate(torch.tensor([prompt]), **arguments)
        own = together.sequences[row, width - len(prompt) :].tolist()
        tokens = alone.sequences[0].tolist()
        assert own == tokens + [PAD] * (len(own) - len(tokens))
        assert together.num_forward_passes[row] == alone.num_forward_passes[0]


def test_rows_that_come_and_go_keep_their_keys():
    """The rows of a block pass have the first places, whoever joined, left or was computed in full meanwhile."""
    rng = random.Random(0)
    for num_branches in (1, 2):
        cache = BlockCache(num_layers=2, num_branches=num_branches)
        names: dict[Row, int] = {}  # what each row's keys are known by
        for turn in range(1, 40):
            for row in rng.sample(sorted(names, key=names.get), rng.randint(0, len(names) // 2)):
                cache.release(row)
                del names[row]
            part = rng.sample(sorted(names, key=names.get), rng.randint(0, len(names)))
            full = [row for row in names if row not in part]
            full += [Row(0, None, 0, 4, 4) for _ in range(rng.randint(0, 2))]
            cache.reserve(len(part) + len(full), 5 + turn // 10)
            for row in full:
                cache.release(row)
            part, full = cache.seat([part, full])
            for count, row in enumerate(full):
                names[row] = 100 * turn + count
            for rows, num_visible in ((full, None), (part, 4)):
                if not rows:
                    continue
                width = 4 if num_visible is None else 1
                columns = torch.arange(4) if num_visible is None else torch.tensor([cache.num_columns - 1])
                cache.look_at(rows, columns.expand(len(rows), -1), num_visible)
                wanted = [10 * names[row] + branch for row in rows for branch in range(num_branches)]
                keys = torch.tensor(wanted).double().view(-1, 1, 1, 1).expand(-1, 2, width, 3)
                for layer in range(2):
                    written = keys if num_visible is None else torch.zeros_like(keys)
                    seen, values = cache.update(written, -written, layer)
                    assert torch.equal(seen, keys.expand(-1, 2, 4, 3)) and torch.equal(values, -seen)


# What a step costs


class Allocations(TorchDispatchMode):
    """Records the size, in elements, of every tensor that comes into being."""

    def __enter__(self):
        self.sizes = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        known = {leaf.untyped_storage().data_ptr() for leaf in leaves if isinstance(leaf, torch.Tensor)}
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.sizes.append(tensor.numel())
        return output


class Passes:
    """Notes for every pass of the model what was allocated from it to the next."""

    def __init__(self, model, **arguments):
        self.widths, starts = [], []
        with Allocations() as allocations:

            def note(module, args, kwargs):
                self.widths.append(kwargs["input_ids"].shape[1])
                starts.append(len(allocations.sizes))

            hook = model.register_forward_pre_hook(note, with_kwargs=True)
            model.generate(**arguments, eos_token_id=None, pad_token_id=PAD)
            hook.remove()
            starts.append(len(allocations.sizes))
        self.largest = [max(allocations.sizes[start:end]) for start, end in zip(starts, starts[1:])]


@pytest.mark.parametrize("is_ragged", [False, True])
@pytest.mark.parametrize("block_cache", CACHES)
def test_nothing_of_the_size_of_the_cache_is_made_within_a_block(block_cache, is_ragged):
    # With a mask, Transformers' SDPA repeats the keys of grouped queries; so here each query head has its own.
    model = random_model(0, num_layers=2, num_key_value_heads=2, max_position_embeddings=512)
    batch = [[7] * 300, [8] * (290 if is_ragged else 300)]
    passes = Passes(model, **pad_left(batch), max_new_tokens=12, block_length=4, block_cache=block_cache)
    keys_of_a_layer = 2 * 300 * 16
    assert [width for width in passes.widths if width > 100] == [304, 308, 312]
    for width, largest in zip(passes.widths, passes.largest):
        assert (largest >= keys_of_a_layer) == (width > 100)


@pytest.mark.parametrize("mode", [{}, {"block_cache": "prefix"}, {"block_cache": "dual", "guidance_scale": 2.0}])
@pytest.mark.parametrize("canvas", ["growing", "fixed"])
@pytest.mark.parametrize("rule", [{}, {"entropy_bound": 0.1}, {"remasking": "margin", "do_sample": True, "top_k": 5}])
def test_logits_are_made_for_masked_positions_alone(mode, canvas, rule):
    """The largest tensor of a step is of the masks of the block by the vocabulary, and never of the text by it."""
    vocab_size, block_length = 12000, 4
    model = random_model(0, vocab_size=vocab_size, num_layers=2, max_position_embeddings=128)
    inputs = pad_left([[7] * 60, [8] * 50])
    passes = Passes(model, **inputs, max_new_tokens=8, block_length=block_length, canvas=canvas, **mode, **rule)
    num_branches = 2 if "guidance_scale" in mode else 1
    for step, largest in enumerate(passes.largest):
        num_masks = block_length - step % block_length
        if not rule.get("entropy_bound"):
            assert largest == 2 * num_masks * num_branches * vocab_size
        assert largest <= 2 * block_length * num_branches * vocab_size


@pytest.mark.parametrize("mode", [{}, {"block_cache": "prefix"}, {"block_cache": "dual", "guidance_scale": 2.0}])
@pytest.mark.parametrize("canvas", ["growing", "fixed"])
def test_logits_of_drafts_are_made_for_masked_positions_alone(mode, canvas):
    vocab_size, block_length, num_drafts = 12000, 4, 3
    model = random_model(0, vocab_size=vocab_size, num_layers=2, max_position_embeddings=128)
    inputs = pad_left([[7] * 60, [8] * 50])
    settings = {"max_new_tokens": 8, "block_length": block_length, "canvas": canvas, "num_drafts": num_drafts}
    passes = Passes(model, **inputs, **settings, **mode)
    num_branches = 2 if "guidance_scale" in mode else 1
    most = 2 * (3 + 2 + 1) * num_branches * vocab_size  # two rows with 3 masks, and drafts of them with 2 and 1
    assert max(passes.largest) <= most < 60 * vocab_size


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_cache": "suffix"}, "`block_cache` must be one of 'prefix', 'dual', 'frozen', got 'suffix'"),
        ({"block_cache": True}, "`block_cache` must be one of"),
        ({"block_cache": "dual", "cache_refresh_interval": 0}, "`cache_refresh_interval` must be an integer of at le"),
        ({"cache_refresh_interval": 2}, "`cache_refresh_interval`=2 must come with `block_cache`, got None"),
        ({"cache_refresh_entropy": 2.0}, "`cache_refresh_entropy`=2.0 must come with `block_cache`, got None"),
        (
            {"block_cache": "dual", "cache_refresh_entropy": 0},
            "`cache_refresh_entropy` must be a number above 0, got 0",
        ),
        ({"compile": True}, "`compile`=True must come with `block_cache`, got None"),
        ({"block_cache": "dual", "compile": 1}, "`compile` must be True or False, got 1"),
    ],
)
def test_wrong_arguments(tiny_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model.generate(torch.tensor([[7, 8]]), max_new_tokens=4, **arguments)


def test_use_cache_is_not_the_block_cache(tiny_model):
    assert tiny_model.config.use_cache
    passes = Passes(tiny_model, inputs=torch.tensor([[7, 8]]), max_new_tokens=4, use_cache=True)
    assert set(passes.widths) == {6}


def test_the_exact_preset_switches_a_cache_off(tiny_model):
    tiny_model.generation_config.update(block_cache="dual", cache_refresh_interval=4)
    arguments = {"inputs": torch.tensor([[7, 8]]), "max_new_tokens": 4}
    assert set(Passes(tiny_model, **arguments).widths) == {6, 4}
    assert set(Passes(tiny_model, **arguments, preset="exact").widths) == {6}


# Compiled


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize("canvas", ["growing", "fixed"])
@pytest.mark.parametrize("block_cache", CACHES)
def test_compiled_block_passes_share_one_shape(block_cache, canvas, fresh_dynamo):
    """Blocks, steps, retiring rows and later calls of like length run one compiled graph, with the same tokens."""
    model = random_model(0, num_layers=3)
    settings = {"block_cache": block_cache, "canvas": canvas, "block_length": 4, "confidence_threshold": 0.4}
    compiled = {"compile": True, "compile_config": CompileConfig(backend="eager", dynamic=False, fullgraph=True)}
    batch = [[7, 8, 9, 10, 11], [12, 13]]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shift, max_new_tokens in ((0, 12), (1, 12), (2, 12), (0, 10)):
            if canvas == "fixed" and max_new_tokens == 10 and block_cache == "prefix":
                continue
            arguments = {**pad_left([[token + shift for token in row] for row in batch]), **settings}
            arguments |= {"max_new_tokens": max_new_tokens, "return_dict_in_generate": True}
            eager = model.generate(**arguments)
            output = model.generate(**arguments, **compiled)
            assert torch.equal(output.sequences, eager.sequences)
            assert torch.equal(output.num_forward_passes, eager.num_forward_passes)
    assert fresh_dynamo["stats"]["unique_graphs"] == 1
    assert not fresh_dynamo["graph_break"]


@pytest.mark.parametrize("block_cache", CACHES)
def test_compiled_passes_with_blanks_and_guidance(block_cache, fresh_dynamo):
    model = random_model(1, num_layers=3)
    settings = {"block_cache": block_cache, "block_length": 3, "max_new_tokens": 6, "guidance_scale": 1.5}
    compiled = {"compile": True, "compile_config": CompileConfig(backend="eager", dynamic=False)}
    inputs = pad_left([[7, MASK, 9, 10, MASK, 11, MASK, MASK], [MASK, 13, 14]])
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(model.generate(**inputs, **settings, **compiled), model.generate(**inputs, **settings))
    assert fresh_dynamo["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("block_cache", CACHES)
@torch._dynamo.config.patch(automatic_dynamic_shapes=False)
def test_flex_attention_sees_the_cache(block_cache, fresh_dynamo):
    # Torch 2.13's C++ for flex attention does not compile where the numbers of queries and of keys are both dynamic.
    model = random_model(0, num_layers=2).float()  # the precision that it has on a CPU
    arguments = pad_left([[7, 8, 9], [10, 11, 12, 13, 14]]) | {"max_new_tokens": 8, "block_length": 4}
    arguments |= {"canvas": "fixed", "block_cache": block_cache}
    expected = model.generate(**arguments)
    model.set_attn_implementation("flex_attention")
    assert torch.equal(model.generate(**arguments), expected)


def test_compiled_to_machine_code(fresh_dynamo):
    model = random_model(2, num_layers=2, dtype=torch.float32)
    arguments = {"inputs": torch.tensor([[7, 8, 9]]), "block_cache": "dual", "max_new_tokens": 8, "block_length": 4}
    assert torch.equal(model.generate(**arguments, compile=True), model.generate(**arguments))
    assert fresh_dynamo["stats"]["unique_graphs"] == 1
    assert fresh_dynamo["inductor"]


SHORT = {"block_cache": "dual", "max_new_tokens": 8, "block_length": 4}
COMPILED = {**SHORT, "compile": True, "compile_config": CompileConfig(backend="eager", dynamic=False)}


def test_interleaved_compiled_calls_do_not_share_buffers(fresh_dynamo):
    """A call inside another's `on_step`, and calls in two threads, each with its own result."""
    model = random_model(0, num_layers=2)
    prompts = [torch.tensor([[7, 8, 9]]), torch.tensor([[10, 11, 12]]), torch.tensor([[13, 14, 15]])]
    expected = [model.generate(prompt, **SHORT) for prompt in prompts]
    inner = []

    def on_step(step):
        inner.append(model.generate(prompts[1], **COMPILED))

    assert torch.equal(model.generate(prompts[0], **COMPILED, on_step=on_step), expected[0])
    assert all(torch.equal(output, expected[1]) for output in inner) and len(inner) == 8

    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(model.generate, prompts[i % 3], **COMPILED) for i in range(12)]
    assert all(torch.equal(call.result(), expected[i % 3]) for i, call in enumerate(calls))


def test_compiled_calls_in_any_mode_and_order(fresh_dynamo):
    model = random_model(0, num_layers=2, dtype=torch.float32)
    prompt = torch.tensor([[7, 8, 9]])
    modes = {
        "plain": nullcontext,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }
    expected = {}
    for name, mode in modes.items():
        with mode():
            expected[name] = model.generate(prompt, **SHORT)
    for name in ("inference", "plain", "autocast", "plain", "inference", "autocast", "inference"):
        with modes[name]():
            assert torch.equal(model.generate(prompt, **COMPILED), expected[name]), name


def test_a_model_can_be_pickled_and_copied_after_a_compiled_call(fresh_dynamo):
    model, prompt = random_model(0, num_layers=2), torch.tensor([[7, 8, 9]])
    expected = model.generate(prompt, **COMPILED)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(again.generate(prompt, **COMPILED), expected)
