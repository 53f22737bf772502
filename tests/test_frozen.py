"""The frozen cache: block-causal decoding, token for token, and nothing computed twice, from turn to turn either."""

import random

import pytest
import torch
from frozen_oracle import oracle_generate
from tiny_models import EOS, MASK, PAD, pad_left, random_model
from transformers import CompileConfig

from illada import FrozenCache
from illada.commit_rules import T2M, WINO, rule_names

MODELS = [random_model(seed, num_layers=3) for seed in range(3)]
WORDS = [token for token in range(37) if token not in (PAD, EOS, MASK)]
FROZEN = {"block_cache": "frozen", "canvas": "growing", "pad_token_id": PAD}


def random_call(rng: random.Random) -> tuple:
    """A model, ragged prompts with and without blanks, cut into segments or not, and settings."""
    prompts, segments = [], []
    for _ in range(rng.randint(1, 4)):
        words = [*WORDS, *[MASK] * 12] if rng.random() < 0.3 else WORDS
        # The first is a word, since masks that see nothing but masks are all predicted alike.
        prompts.append([rng.choice(WORDS), *(rng.choice(words) for _ in range(rng.randint(0, 11)))])
        cuts = sorted(rng.sample(range(1, len(prompts[-1])), rng.randint(0, min(3, len(prompts[-1]) - 1))))
        segments.append([end - start for start, end in zip([0, *cuts], cuts)])
    settings = {
        "max_new_tokens": rng.randint(1, 12),
        "block_length": rng.randint(1, 5),
        "max_denoising_steps": rng.randint(1, 5),
        "confidence_threshold": rng.choice([None, 0.2, 0.5]),
        "guidance_scale": rng.choice([None, None, 1.5]),
    }
    return rng.choice(MODELS), prompts, segments, settings


def expected_of(model, prompt: list[int], segments: list[int], settings: dict) -> tuple[list[int], int]:
    rest = len(prompt) - sum(segments)
    return oracle_generate(
        model,
        prompt,
        [*segments, rest] if rest else segments,
        max_new_tokens=settings["max_new_tokens"],
        block_length=settings["block_length"],
        steps=settings["max_denoising_steps"],
        threshold=settings["confidence_threshold"] or 2.0,
        guidance_scale=settings["guidance_scale"],
        mask_id=MASK,
        eos_id=EOS,
    )


def check_against_the_oracle(seed: int):
    rng = random.Random(seed)
    model, prompts, segments, settings = random_call(rng)
    output = model.generate(
        **pad_left(prompts), **FROZEN, **settings, prompt_segments=segments, return_dict_in_generate=True
    )
    width = max(map(len, prompts))
    for place, prompt in enumerate(prompts):
        tokens, passes = expected_of(model, prompt, segments[place], settings)
        own = output.sequences[place, width - len(prompt) :].tolist()
        assert own == tokens + [PAD] * (len(own) - len(tokens)), (seed, place)
        assert output.num_forward_passes[place] == passes, (seed, place)
        assert sum(output.segments[place]) == len(tokens)


@pytest.mark.parametrize("seed", range(25))
def test_the_text_is_that_of_a_block_causal_mask(seed):
    """Ragged batches, blanks, guidance, segments and thresholds, against a dense mask and no cache, in fp64."""
    check_against_the_oracle(seed)


@pytest.mark.slow
def test_a_thousand_texts_are_those_of_a_block_causal_mask():
    for seed in range(1000):
        check_against_the_oracle(seed)


REMASKING = {"t2m": T2M(threshold=0.4, bound=0.3), "wino": WINO(draft=0.15, verify=0.9)}


@pytest.mark.parametrize("rule", rule_names())
@pytest.mark.parametrize("guidance_scale", [None, 1.5])
def test_one_layer_is_exact_with_every_rule(rule, guidance_scale):
    """Keys and values of a first layer depend on their own tokens, so that blocks see what they do without a cache."""
    rng, model, num_remasked = random.Random(0), random_model(0), 0
    for _ in range(8):
        _, prompts, _, settings = random_call(rng)
        settings |= {
            "commit_rule": REMASKING.get(rule, rule),
            "guidance_scale": guidance_scale,
            "confidence_threshold": None,
        }
        arguments = {**pad_left(prompts), **FROZEN, **settings, "return_dict_in_generate": True}
        steps = []
        exact = model.generate(**{**arguments, "block_cache": None}, on_step=steps.append)
        frozen = model.generate(**arguments)
        assert torch.equal(frozen.sequences, exact.sequences)
        assert torch.equal(frozen.num_forward_passes, exact.num_forward_passes)
        num_remasked += sum(int(step.remasked.sum()) for step in steps)
    assert num_remasked or rule not in REMASKING


# What is computed


class Columns:
    """The columns that each pass of a model computes, in all its rows, while the `with` lasts."""

    def __init__(self, model):
        self.model, self.passes = model, []

    def __enter__(self):
        def note(module, args, kwargs):
            self.passes.append(kwargs["input_ids"].numel())

        self.hook = self.model.register_forward_pre_hook(note, with_kwargs=True)
        return self

    def __exit__(self, *error):
        self.hook.remove()


@pytest.fixture
def model():
    return MODELS[0]


PROMPT = [7 + i for i in range(20)]
SETTINGS = {**FROZEN, "max_new_tokens": 12, "block_length": 4, "eos_token_id": None, "return_dict_in_generate": True}


def test_prompt_and_finished_blocks_are_computed_once(model):
    with Columns(model) as columns:
        model.generate(torch.tensor([PROMPT]), **SETTINGS)
    assert columns.passes == [20 + 4, 4, 4, 4, 4 + 4, 4, 4, 4, 4 + 4, 4, 4, 4]


def test_a_block_of_blanks_computes_its_segment_until_it_is_final(model):
    prompt = [7, 8, 9, MASK, 11, 12, MASK, MASK, 15, 16]
    with Columns(model) as columns:
        model.generate(torch.tensor([prompt]), **{**SETTINGS, "max_new_tokens": 2}, prompt_segments=[2, 3, 4])
    # One block of three blanks, over the segments 2..5 and 5..9, with what comes before them at first.
    assert columns.passes == [9, 7, 4, (4 + 1) + 2, 2]


def test_rows_that_open_a_block_do_not_widen_the_passes_of_others(model):
    manager = model.init_continuous_batching()
    manager.add_request(PROMPT, "a", **{**SETTINGS, "max_new_tokens": 4})
    with Columns(model) as columns:
        manager._step()
        manager.add_request(PROMPT[:10], "b", **{**SETTINGS, "max_new_tokens": 4})
        while manager._step():
            pass
    assert columns.passes == [24, 10 + 4, 4, 8, 8, 4]


# From turn to turn


def second_turn(model, cache, guidance_scale=None, **settings):
    """Two turns of a conversation, the second with `cache` as it is then; both outputs, and the second's columns."""
    settings = {**SETTINGS, "guidance_scale": guidance_scale, **settings}
    first = model.generate(torch.tensor([PROMPT]), **settings, cache=cache)
    assert first.segments == [[20, 4, 4, 4]] and first.cache is cache
    prompt = torch.cat([first.sequences, torch.tensor([[9, 8, 7]])], dim=1)
    with Columns(model) as columns:
        second = model.generate(prompt, **settings, cache=cache, prompt_segments=first.segments)
    assert second.segments == [[20, 4, 4, 4, 3, 4, 4, 4]]
    return prompt, first, second, columns.passes


def test_a_second_turn_computes_its_new_tokens_only(model):
    """What is new to it: its message, and the last block of the answer, whose final tokens no pass has seen."""
    prompt, first, second, columns = second_turn(model, FrozenCache())
    assert columns[:2] == [4 + 3 + 4, 4] and sum(columns) == 12 * 4 + 2 * 4 + (4 + 3)
    for cache in (None, FrozenCache()):
        with Columns(model) as again:
            alone = model.generate(prompt, **SETTINGS, cache=cache, prompt_segments=first.segments)
        assert torch.equal(alone.sequences, second.sequences)
        assert again.passes[:2] == [35 + 4, 4]
    expected, _ = oracle_generate(
        model,
        prompt[0].tolist(),
        [20, 4, 4, 4, 3],
        max_new_tokens=12,
        block_length=4,
        steps=4,
        mask_id=MASK,
        eos_id=-1,
    )
    assert second.sequences[0].tolist() == expected


@pytest.mark.parametrize("compile", [None, True])
@pytest.mark.parametrize("guidance_scale", [None, 1.5])
def test_no_text_depends_on_what_a_cache_has(model, guidance_scale, compile):
    """Conversations that share beginnings, edited, retried and cut elsewhere, with a cache and without."""
    torch._dynamo.reset()
    rng, cache = random.Random(0), FrozenCache(max_tokens=150)
    settings = {**SETTINGS, "guidance_scale": guidance_scale, "eos_token_id": EOS}
    compiled = {"compile": compile, "compile_config": CompileConfig(backend="eager", dynamic=False)} if compile else {}
    history, saved = [(PROMPT, [])], 0
    for _ in range(20):
        prompt, segments = rng.choice(history)
        prompt, segments = list(prompt), list(segments)
        change = rng.choice(["next", "next", "retry", "edit", "cut"])
        if change == "next":
            prompt += rng.sample(WORDS, 3)
        elif change == "edit":
            prompt[rng.randrange(len(prompt))] = rng.choice(WORDS)
        elif change == "cut" and segments:
            segments = [segments[0] - 1, 1, *segments[1:]]
        if len(prompt) > 50:
            continue
        batch = [prompt, rng.sample(WORDS, 5)]
        arguments = {**pad_left(batch), **settings, "prompt_segments": [segments, []]}
        with Columns(model.model) as alone:
            expected = model.generate(**arguments)
        with Columns(model.model) as found:
            output = model.generate(**arguments, **compiled, cache=cache)
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.num_forward_passes, expected.num_forward_passes)
        saved += sum(alone.passes) - sum(found.passes)
        assert cache.num_tokens <= 150
        width = len(batch[0])
        text = [token for token in output.sequences[0].tolist() if token != PAD]
        history.append((text, output.segments[0])) if len(text) > width else None
    assert compiled or saved > 100


def test_keys_and_values_of_other_weights_are_not_found(model):
    cache, other = FrozenCache(), random_model(0, num_layers=3)
    prompt = torch.tensor([PROMPT])

    def columns_of(model) -> int:
        with Columns(model) as columns:
            model.generate(prompt, **SETTINGS, cache=cache)
        return columns.passes[0]

    assert [columns_of(model), columns_of(model), columns_of(other), columns_of(other)] == [24, 4, 24, 4]
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    assert [columns_of(other), columns_of(other), columns_of(model)] == [24, 4, 4]
    cache.clear()
    assert cache.num_tokens == 0 and columns_of(model) == 24
    short = FrozenCache(max_tokens=10)
    model.generate(prompt, **SETTINGS, cache=short)
    assert short.num_tokens == 0  # the text is longer


def test_many_requests_share_a_cache(model):
    """Each begins with a text of an earlier one, and gets what it gets by itself."""
    cache, expected, manager = FrozenCache(), {}, model.init_continuous_batching()
    settings = {name: value for name, value in SETTINGS.items() if name != "return_dict_in_generate"}
    first = model.generate(torch.tensor([PROMPT]), **SETTINGS, cache=cache)
    text = first.sequences[0].tolist()
    for name, rest in (("a", [7]), ("b", [8, 9]), ("c", [10, 11, 12])):
        expected[name] = model.generate(torch.tensor([text + rest]), **settings, prompt_segments=first.segments)[
            0, len(text + rest) :
        ].tolist()
        manager.add_request(text + rest, name, **settings, cache=cache, prompt_segments=first.segments[0])
    with Columns(model) as columns:
        while manager._step():
            pass
    assert columns.passes[0] == 3 * (4 + 3 + 4)
    assert {output.request_id: output.generated_tokens for output in manager._results} == expected


# Compiled, and other kinds of attention


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize("guidance_scale", [None, 1.5])
def test_compiled_passes_share_one_shape(guidance_scale, fresh_dynamo):
    model = random_model(1, num_layers=3)
    settings = {**SETTINGS, "eos_token_id": EOS, "confidence_threshold": 0.4, "guidance_scale": guidance_scale}
    compiled = {"compile": True, "compile_config": CompileConfig(backend="eager", dynamic=False, fullgraph=True)}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shift, budget in ((0, 12), (1, 12), (2, 10)):
            batch = [[token + shift for token in row] for row in ([7, 8, 9, 10, 11], [12, MASK, 3], [13])]
            arguments = {**pad_left(batch), **settings, "max_new_tokens": budget}
            eager, output = model.generate(**arguments), model.generate(**arguments, **compiled)
            assert torch.equal(output.sequences, eager.sequences)
            assert torch.equal(output.num_forward_passes, eager.num_forward_passes)
    assert fresh_dynamo["stats"]["unique_graphs"] == 1
    assert not fresh_dynamo["graph_break"]


@pytest.mark.parametrize("seed", range(25))
def test_segments_one_after_the_other_give_the_same_text(seed, monkeypatch):
    """What kinds of attention without dense masks do."""
    monkeypatch.setattr("illada.frozen.WITH_DENSE_MASKS", ())
    check_against_the_oracle(seed)


@pytest.mark.parametrize("attention", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
@torch._dynamo.config.patch(automatic_dynamic_shapes=False)
def test_other_attention_gives_the_same_text(attention, fresh_dynamo):
    model = random_model(0, num_layers=2).float()
    arguments = {**pad_left([PROMPT[:6], [7, MASK]]), **SETTINGS, "max_new_tokens": 4, "block_length": 2}
    expected = model.generate(**arguments)
    model.set_attn_implementation(attention)
    assert torch.equal(model.generate(**arguments).sequences, expected.sequences)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"canvas": "fixed"}, r"`canvas` must be 'growing'.* with `block_cache='frozen'`, got 'fixed'"),
        ({"cache_refresh_interval": 2}, r"`cache_refresh_interval` must be absent.* got 2"),
        ({"cache_refresh_entropy": 0.5}, r"`cache_refresh_entropy` must be absent.* got 0.5"),
        ({"cache": {}}, r"`cache` must be a FrozenCache, got \{\}"),
        (
            {"cache": FrozenCache(), "block_cache": "dual"},
            r"`cache` must come with `block_cache='frozen'`",
        ),
        ({"prompt_segments": [1], "block_cache": None}, r"`prompt_segments` must come with `block_cache='frozen'`"),
        ({"prompt_segments": [1, 2]}, r"`prompt_segments` must be lengths .* prompt of 2 tokens, got \[1, 2\]"),
        ({"prompt_segments": [0]}, r"`prompt_segments` must be lengths of at least 1"),
        ({"prompt_segments": 1}, r"`prompt_segments` must be lengths of at least 1 .* got 1"),
        ({"prompt_segments": [[1], [1]]}, r"`prompt_segments` must be one list for each of the 1 prompts"),
    ],
)
def test_wrong_arguments(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([[7, 8]]), **{**SETTINGS, **arguments})
    with pytest.raises(ValueError, match="`max_tokens` must be an integer of at least 1, got 0"):
        FrozenCache(max_tokens=0)
