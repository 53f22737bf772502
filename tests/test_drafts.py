"""Lossless drafts: whatever is asked for, the steps are those of decoding without them, and the passes are fewer."""

import json
import random
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_decoding_oracle import _answer, _setting
from test_decoding_properties import (
    batches,
    certain_rankings,
    examples,
    guidance,
    parallel_rules,
    schedules,
)
from test_golden import run
from test_recorded_decoding import RECORDS
from tiny_models import EOS, MASK, PAD, TableModel, pad_left, prompt_of, random_model, table_of, tiny_tokenizer
from transformers import AutoModel, CompileConfig, ContinuousBatchingConfig
from transformers.generation import LogitsProcessorList

from illada import EMBEDDED_MODEL, FrozenCache, ILLaDAForCausalLM
from illada.commit_rules import CommitRule, Decision, LocalLeap
from illada.rankings import RANKINGS
from illada.text.blanks import encode_with_blanks
from illada.tiny.corpus import FAMILIES, held_out_examples

CACHES = [None, "prefix", "dual", "frozen"]


@cache
def calm_model(seed: int, num_layers: int = 3) -> ILLaDAForCausalLM:
    """A model whose predictions depend on the context now and then, so that some guesses are right and some wrong."""
    model = random_model(seed, num_layers=num_layers)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 0.3
    return model


def decode(model, num_drafts: int | None, **arguments) -> tuple:
    """The output, what each row's steps did, and what a listener heard of the passes."""
    steps = []
    arguments = {"pad_token_id": PAD, **arguments, "return_dict_in_generate": True, "output_trace": True}
    output = model.generate(**arguments, num_drafts=num_drafts, on_step=steps.append)
    done, confidences, passes = {}, {}, {}
    for step in steps:
        tensors = step.columns, step.tokens, step.proposals, step.committed, step.remasked
        done.setdefault(step.row, []).append([tensor.tolist() for tensor in tensors])
        confidences.setdefault(step.row, []).append(step.confidence)
        passes.setdefault(step.row, []).append(step.num_forward_passes)
    return output, done, confidences, passes


def check(model, num_drafts: int, **arguments) -> tuple[int, int]:
    """Every step of every row is that of decoding without drafts. Returns the passes without and with them."""
    plain, steps, confidences, _ = decode(model, None, **arguments)
    output, own_steps, own_confidences, passes = decode(model, num_drafts, **arguments)
    assert own_steps == steps, (num_drafts, arguments)
    assert torch.equal(output.sequences, plain.sequences)
    torch.testing.assert_close(output.commit_confidences, plain.commit_confidences, equal_nan=True)
    for row, expected in confidences.items():
        torch.testing.assert_close(own_confidences[row], expected, equal_nan=True)
    assert (output.num_forward_passes <= plain.num_forward_passes).all()
    for row, own in passes.items():
        # Passes are counted from 1, each is a step at least, and the trace has the pass of each commit.
        assert own == sorted(own) and set(own) == set(range(1, int(output.num_forward_passes[row]) + 1))
        pass_of = dict(enumerate([0, *own]))
        trace = [pass_of[step] for step in plain.commit_steps[row].tolist()]
        assert output.commit_steps[row].tolist() == trace
    return int(plain.num_forward_passes.sum()), int(output.num_forward_passes.sum())


# Against outside truth


@pytest.mark.parametrize("num_drafts", [2, 4, 8])
@pytest.mark.parametrize("settings", [{}, {"block_cache": "dual", "cache_refresh_interval": 1}])
def test_golden_runs(golden_illada, num_drafts, settings):
    model = AutoModel.from_pretrained(golden_illada / "checkpoint")
    for golden in json.loads((golden_illada / "generation.json").read_text()):
        output, expected = run(model, golden, **settings, num_drafts=num_drafts), golden["sequence"]
        prompt_length = len(golden["prompt"])
        if 2 in expected[prompt_length:]:
            expected = expected[: expected.index(2, prompt_length) + 1]
        assert output.sequences[0].tolist() == expected, golden["name"]
        assert output.num_forward_passes[0] <= golden["forward_passes"]


def check_record(index: int, num_drafts: int):
    record = RECORDS[index]
    model, inputs = recorded_model(record["model_seed"], record["num_layers"]), pad_left(record["prompts"])
    if record["kind"] == "revise":
        output = model.revise(**inputs, **record["arguments"], num_drafts=num_drafts)
        assert output.sequences.tolist() == record["sequences"]
        assert output.num_rounds == record["num_rounds"]
        return
    output, steps, _, _ = decode(model, num_drafts, **inputs, **record["arguments"])
    assert output.sequences.tolist() == record["sequences"]
    assert [len(steps.get(row, ())) for row in range(len(record["prompts"]))] == record["num_forward_passes"]
    assert all(own <= old for own, old in zip(output.num_forward_passes.tolist(), record["num_forward_passes"]))


@cache
def recorded_model(seed: int, num_layers: int):
    return random_model(seed, num_layers=num_layers)


def is_certain(record: dict) -> bool:
    arguments = record["arguments"]
    return not arguments.get("do_sample") and arguments.get("remasking") != "random"


CERTAIN = [index for index, record in enumerate(RECORDS) if is_certain(record)]


def test_the_recorded_settings_that_are_left_out_are_those_with_noise():
    assert len(CERTAIN) > 300
    for index in set(range(len(RECORDS))).difference(CERTAIN):
        with pytest.raises(ValueError, match="`num_drafts` must be unset with `(do_sample|remasking)`="):
            check_record(index, 2)


@pytest.mark.parametrize("index", CERTAIN[::3])
def test_recorded_decoding(index):
    check_record(index, (2, 4, 8)[index % 3])


@pytest.mark.by_hand
@pytest.mark.parametrize("num_drafts", [2, 4, 8])
def test_all_of_recorded_decoding(num_drafts):
    for index in CERTAIN:
        check_record(index, num_drafts)


def check_oracle_setting(seed: int) -> tuple[int, int]:
    """A random setting, cached or not. Without a cache, the tokens are those of the oracle."""
    rng = random.Random(seed)
    model_seed, prompts, arguments = _setting(seed)
    num_drafts, block_cache = rng.randint(2, 8), rng.choice([None, None, None, *CACHES[1:]])
    settings = {
        **pad_left(prompts),
        "canvas": arguments["canvas"],
        "max_new_tokens": arguments["max_new_tokens"],
        "block_length": arguments["block_length"],
        "max_denoising_steps": arguments["steps"],
        "guidance_scale": arguments["guidance_scale"],
        "eos_token_id": arguments["eos_ids"],
    }
    if block_cache is None:
        model = random_model(model_seed)
        output = model.generate(**settings, num_drafts=num_drafts, return_dict_in_generate=True)
        width, passes = max(map(len, prompts)), output.num_forward_passes.tolist()
        for row, (prompt, (tokens, oracle_passes)) in enumerate(zip(prompts, _answer(seed))):
            own = output.sequences[row, width - len(prompt) :].tolist()
            assert own == tokens + [PAD] * (len(own) - len(tokens)), seed
            assert passes[row] <= oracle_passes
        return sum(oracle_passes for _, oracle_passes in _answer(seed)), sum(passes)
    if block_cache == "frozen":
        settings["canvas"] = "growing"
    else:
        settings |= rng.choice([{}, {"cache_refresh_interval": rng.randint(2, 4)}, {"cache_refresh_entropy": 2.6}])
    return check(calm_model(model_seed), num_drafts, block_cache=block_cache, **settings)


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_random_settings(first):
    for seed in range(first, first + 10):
        check_oracle_setting(seed)


@pytest.mark.by_hand
def test_a_thousand_random_settings():
    passes = [check_oracle_setting(seed) for seed in range(1000)]
    print(f"passes of 1,000 settings: {sum(p for p, _ in passes)} without drafts, {sum(p for _, p in passes)} with")


# Every setting that drafts allow

drafts = st.integers(2, 8)
calm_models = st.integers(0, 3).map(calm_model)
refreshes = st.sampled_from(
    [
        {},
        {"cache_refresh_interval": 2},
        {"cache_refresh_interval": 4},
        {"cache_refresh_entropy": 2.0},
        {"cache_refresh_entropy": 2.8, "cache_refresh_interval": 3},
    ]
)
more = st.sampled_from(
    [
        {},
        {"min_new_tokens": 6, "max_new_tokens": 9},
        {"defer_eos": True},
        {"end_think_token_ids": [20, 21, 22], "end_think_boost": 12.0},
        {"repetition_penalty": 1.5, "suppress_tokens": [8]},
        {"stop_strings": ["a", "bc", "ef"], "tokenizer": tiny_tokenizer()},
        {"commit_rule": LocalLeap(anchor=0.3, nearby=0.2)},
    ]
)


@examples
@given(calm_models, drafts, batches, schedules, parallel_rules, certain_rankings, guidance, more)
def test_steps_without_a_cache(model, num_drafts, batch, schedule, rule, ranking, scale, others):
    rule = {} if "commit_rule" in others else rule
    check(
        model,
        num_drafts,
        **pad_left(batch),
        **{**schedule, **rule, **others},
        remasking=ranking,
        guidance_scale=scale,
    )


@examples
@given(
    calm_models,
    drafts,
    batches,
    schedules,
    parallel_rules,
    certain_rankings,
    guidance,
    more,
    refreshes,
    st.sampled_from(CACHES[1:]),
)
def test_steps_over_a_cache(model, num_drafts, batch, schedule, rule, ranking, scale, others, refresh, block_cache):
    rule = {} if "commit_rule" in others else rule
    settings = {**schedule, **rule, **others, "remasking": ranking, "guidance_scale": scale}
    if block_cache == "frozen":
        settings["canvas"], refresh = "growing", {}
    check(model, num_drafts, **pad_left(batch), **settings, **refresh, block_cache=block_cache)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("block_cache", CACHES)
def test_long_blocks_take_fewer_passes(block_cache, attention):
    """Guards the tests above: guesses are right often, and wrong often."""
    without = with_drafts = 0
    for seed in range(2):
        model = calm_model(seed)
        model.set_attn_implementation(attention)
        inputs = pad_left([[7, 8, 9, 10, 11, 12], [13, MASK, 14], [15]])
        settings = {"max_new_tokens": 36, "block_length": 12, "eos_token_id": None, "block_cache": block_cache}
        passes = check(model, 6, **inputs, **settings)
        model.set_attn_implementation("sdpa")
        without, with_drafts = without + passes[0], with_drafts + passes[1]
    assert without / 6 < with_drafts < 0.9 * without, (without, with_drafts)


@pytest.mark.parametrize("block_cache", [None, "prefix", "dual", "frozen"])
@pytest.mark.parametrize("num_steps", [2, 3, 5, 12])
def test_schedules_of_fewer_steps_than_positions(num_steps, block_cache):
    """S < N, and N mod S != 0: a draft has the quotas of the steps that it skips."""
    settings = {"max_new_tokens": 21, "block_length": 7, "max_denoising_steps": num_steps, "eos_token_id": None}
    for seed in range(3):
        check(calm_model(seed), 4, **pad_left([[7, 8, 9], [10, 11]]), **settings, block_cache=block_cache)


def test_passes_by_hand():
    """Where no token depends on another, all guesses are right: 1 pass, and then K positions in each."""
    model = TableModel(table_of({place: {6 + place % 5: 0.5 + place / 100} for place in range(40)}, 40))
    arguments = {"max_new_tokens": 24, "block_length": 12, "eos_token_id": None}
    for num_drafts, passes in ((1, 12), (2, 7), (3, 5), (4, 4), (8, 3), (12, 2), (100, 2)):
        output, steps, _, heard = decode(model, num_drafts, inputs=prompt_of(2), **arguments)
        assert output.num_forward_passes.tolist() == [2 * passes] and len(steps[0]) == 24
        first_block = [1, *(2 + step // num_drafts for step in range(11))]
        assert heard[0] == [*first_block, *(passes + number for number in first_block)]
        # The last position is the surest, then the one before it.
        assert output.commit_steps[0, 2:14].tolist() == first_block[::-1]


class Shapes:
    """The shapes of a model's inputs while the `with` lasts."""

    def __init__(self, model):
        self.model, self.shapes = model, []

    def __enter__(self):
        def note(module, args, kwargs):
            self.shapes.append(tuple(kwargs["input_ids"].shape))

        self.hook = self.model.register_forward_pre_hook(note, with_kwargs=True)
        return self

    def __exit__(self, *exception):
        self.hook.remove()


def test_one_draft_is_none():
    model, arguments = calm_model(0), pad_left([[7, 8, 9], [10, MASK, 12, 13]])
    arguments |= {"max_new_tokens": 9, "block_length": 5, "pad_token_id": PAD}
    for settings in ({}, {"block_cache": "dual"}, {"do_sample": True, "seed": 3}, {"remasking": "random", "seed": 3}):
        with Shapes(model) as plain:
            expected = model.generate(**arguments, **settings)
        with Shapes(model) as one:
            output = model.generate(**arguments, **settings, num_drafts=1)
        assert torch.equal(output, expected) and one.shapes == plain.shapes


def test_the_columns_of_a_pass():
    """Over a cache a row is one sequence of K blocks; without, K sequences. A block's first pass has no drafts."""
    model = calm_model(0)
    arguments = {"inputs": torch.tensor([[7, 8, 9]]), "max_new_tokens": 16, "block_length": 16, "eos_token_id": None}
    for block_cache, second in ((None, (4, 19)), ("prefix", (1, 64)), ("dual", (1, 64)), ("frozen", (1, 64))):
        with Shapes(model) as passes:
            model.generate(**arguments, num_drafts=4, block_cache=block_cache)
        assert passes.shapes[:2] == [(1, 19), second]


# Who listens


class Listener:
    """A streamer, and a stopping criterion."""

    def __init__(self):
        self.heard = []

    def __call__(self, input_ids, scores, **kwargs):
        self.heard.append(("asked", input_ids.tolist()))
        return torch.tensor([input_ids.shape[1] > 20])

    def put(self, value):
        self.heard.append(("put", value.tolist()))

    def put_draft(self, value):
        self.heard.append(("draft", value.tolist()))

    def end(self):
        self.heard.append(("end", None))


@pytest.mark.parametrize("block_cache", CACHES)
def test_streamers_and_criteria_are_told_the_same(block_cache):
    heard = []
    for num_drafts in (None, 5):
        listener = Listener()
        arguments = {"inputs": torch.tensor([[7, MASK, 9, MASK]]), "max_new_tokens": 30, "block_length": 6}
        calm_model(1).generate(
            **arguments,
            num_drafts=num_drafts,
            block_cache=block_cache,
            streamer=listener,
            stopping_criteria=[listener],
            eos_token_id=None,
            pad_token_id=PAD,
        )
        heard.append(listener.heard)
    assert heard[0] == heard[1] and [kind for kind, _ in heard[0]].count("asked") == 3


def test_requests_with_and_without_drafts_share_an_engine():
    model = calm_model(2)
    config = ContinuousBatchingConfig(max_requests_per_batch=4)
    manager = model.init_continuous_batching(continuous_batching_config=config)
    prompts, expected = [[7, 8, 9], [10, MASK, 12], [13], [14, 15], [16, 17, 18, 19]], {}
    for block_cache in CACHES:
        for num_drafts in (None, 3, 8):
            for index, prompt in enumerate(prompts):
                settings = {"max_new_tokens": 7 + index, "block_length": 5, "block_cache": block_cache}
                name = f"{block_cache}-{num_drafts}-{index}"
                manager.add_request(prompt, name, **settings, num_drafts=num_drafts)
                expected[name] = model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
    while manager._step():
        pass
    outputs = {output.request_id: output.generated_tokens for output in manager._results}
    assert outputs == expected
    canvas = manager.engine.canvas
    assert sorted(canvas.free_drafts) == list(range(4, len(canvas.tokens)))  # every place is free again


def test_drafts_count_in_the_room_of_a_batch():
    config = ContinuousBatchingConfig(max_requests_per_batch=4, max_batch_tokens=48)
    manager = calm_model(0).init_continuous_batching(continuous_batching_config=config)
    settings = {"max_new_tokens": 8, "block_length": 8}
    with pytest.raises(ValueError, match=r"4 tokens of prompt and a budget of 8, 5 times for `num_drafts`"):
        manager.add_request([7] * 4, **settings, num_drafts=5)
    manager.add_request([7] * 4, **settings, num_drafts=3)
    manager.add_request([7] * 4, **settings, num_drafts=2)
    manager._step()
    assert len(manager.engine.active) == 1


def test_a_frozen_cache_from_turn_to_turn():
    model, kept = calm_model(0), FrozenCache()
    settings = {"block_cache": "frozen", "max_new_tokens": 12, "block_length": 4, "eos_token_id": None}
    settings |= {"pad_token_id": PAD, "return_dict_in_generate": True}
    first = model.generate(torch.tensor([[7, 8, 9]]), **settings, num_drafts=4, cache=kept)
    prompt = torch.cat([first.sequences, torch.tensor([[10, 11]])], dim=1)
    plain = model.generate(prompt, **settings, prompt_segments=first.segments)
    second = model.generate(prompt, **settings, prompt_segments=first.segments, num_drafts=4, cache=kept)
    assert torch.equal(second.sequences, plain.sequences)
    assert second.num_forward_passes < plain.num_forward_passes


# Rules and rankings of one's own


class Pairs(CommitRule):
    """Two positions in a step, three where the text so far has an even sum."""

    def __call__(self, step):
        return Decision(step.best_ranked(2 + (step.canvas.sum(-1) % 2 == 0)))


@pytest.mark.parametrize("block_cache", CACHES)
def test_own_rules_and_rankings(block_cache, monkeypatch):
    monkeypatch.setitem(RANKINGS, "from the right", lambda step: step.positions.double())
    settings = {"commit_rule": Pairs(), "max_new_tokens": 24, "block_length": 12, "block_cache": block_cache}
    passes = check(calm_model(0), 8, **pad_left([[7, 8, 9], [10]]), **settings, remasking="from the right")
    assert passes[1] < passes[0]


def test_a_ranking_that_draws_noise_is_refused_when_it_does(monkeypatch):
    monkeypatch.setitem(RANKINGS, "noisy", lambda step: step.uniform_noise())
    with pytest.raises(ValueError, match="`num_drafts` must be unset with a rule or ranking that draws noise, got 4"):
        calm_model(0).generate(torch.tensor([[7, 8]]), max_new_tokens=4, remasking="noisy", num_drafts=4)


@pytest.mark.parametrize("block_cache", CACHES)
def test_processors_see_the_text_of_each_guess(block_cache):
    """A processor that depends on the whole text before it decides."""

    def processor(texts, logits):
        count = (texts == MASK).sum(-1, keepdim=True)
        return logits + (texts.sum(-1, keepdim=True) % 7 == 0) * torch.roll(logits, 1, -1) / (1 + count)

    arguments = pad_left([[7, 8, 9], [10, MASK, 12, 13]]) | {"max_new_tokens": 14, "block_length": 7}
    check(calm_model(0), 5, **arguments, block_cache=block_cache, logits_processor=LogitsProcessorList([processor]))


# Compiled


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize("guidance_scale", [None, 1.5])
@pytest.mark.parametrize("block_cache", CACHES[1:])
def test_compiled_passes_have_one_shape(block_cache, guidance_scale, fresh_dynamo):
    """Whatever number of guesses there is, one graph; and the steps are those of eager decoding without drafts."""
    model = calm_model(0)
    compiled = {"compile": True, "compile_config": CompileConfig(backend="eager", dynamic=False, fullgraph=True)}
    settings = {"block_cache": block_cache, "block_length": 6, "max_new_tokens": 18, "guidance_scale": guidance_scale}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shift in range(3):
            inputs = pad_left([[7 + shift, 8, 9, 10], [11, MASK, 12 + shift]])
            plain = decode(model, None, **inputs, **settings)
            output = decode(model, 4, **inputs, **settings, **compiled)
            assert output[1] == plain[1]
            assert (output[0].num_forward_passes < plain[0].num_forward_passes).any()
    assert fresh_dynamo["stats"]["unique_graphs"] == 1
    assert not fresh_dynamo["graph_break"]


# The embedded model


def texts_of(tokenizer, family: str, count: int) -> list[tuple[torch.Tensor, int]]:
    """Prompts of held-out examples, and how many tokens may follow."""
    prompts = []
    for example in held_out_examples(family, count):
        if example.prompt:
            messages = [{"role": "user", "content": example.prompt}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            prompts.append((torch.tensor([ids]), 32))
            continue
        text = example.text
        for start, end in reversed(example.blanks):
            text = f"{text[:start]}<[MASK]*{len(tokenizer.tokenize(text[start:end]))}>{text[end:]}"
        prompts.append((torch.tensor([encode_with_blanks(tokenizer, text, MASK)]), 0))
    return prompts


def passes_of(model, tokenizer, family: str, count: int, num_drafts: int, **settings) -> tuple[int, int, int]:
    """Passes without and with drafts, and tokens written, of texts that are the same."""
    figures = [0, 0, 0]
    for prompt, max_new_tokens in texts_of(tokenizer, family, count):
        arguments = {"max_new_tokens": max_new_tokens, "return_dict_in_generate": True, **settings}
        plain = model.generate(prompt, **arguments)
        drafted = model.generate(prompt, **arguments, num_drafts=num_drafts)
        assert torch.equal(drafted.sequences, plain.sequences), (family, prompt)
        own = plain.num_forward_passes.item(), drafted.num_forward_passes.item()
        written = round(plain.tokens_per_forward.item() * own[0])
        figures = [old + new for old, new in zip(figures, (*own, written))]
    return tuple(figures)


def test_the_embedded_model_answers_the_same_in_at_most_half_the_passes(embedded_model, embedded_tokenizer):
    figures = [passes_of(embedded_model, embedded_tokenizer, family, 4, num_drafts=8) for family in FAMILIES]
    plain, drafted, _ = (sum(each) for each in zip(*figures))
    assert drafted <= plain / 2, figures


@pytest.mark.by_hand
@pytest.mark.parametrize("settings", [{}, {"block_cache": "prefix"}, {"block_cache": "frozen"}], ids=str)
def test_fifty_answers_of_each_family(embedded_model, embedded_tokenizer, settings):
    total = [0, 0]
    for family in FAMILIES:
        plain, drafted, written = passes_of(embedded_model, embedded_tokenizer, family, 50, num_drafts=8, **settings)
        print(f"{family}: {plain} passes, {drafted} with drafts, {written / drafted:.2f} tokens per pass")
        total = [total[0] + plain, total[1] + drafted]
    assert total[1] <= total[0] / 2


def differences_in_bf16(model, tokenizer, family: str, count: int) -> int:
    """How many texts come out differently in bf16, where a wider pass rounds differently.

    Up to the first step that differs, all is the same. In that step, what the two chose must be a near-tie: its
    probabilities are the same but for the rounding of logits with 8 bits of precision.
    """
    num_different = 0
    for prompt, max_new_tokens in texts_of(tokenizer, family, count):
        runs = [[], []]
        for steps, num_drafts in zip(runs, (None, 8)):
            model.generate(prompt, max_new_tokens=max_new_tokens, num_drafts=num_drafts, on_step=steps.append)
        for plain, drafted in zip(*runs):
            predicted = plain.confidence.isfinite()
            torch.testing.assert_close(plain.confidence[predicted], drafted.confidence[predicted], rtol=0, atol=0.05)
            if not torch.equal(plain.tokens, drafted.tokens):
                chosen = plain.confidence[plain.committed | drafted.committed]
                assert chosen.max() - chosen.min() < 0.05
                num_different += 1
                break  # from here on these are different texts
        else:
            assert len(runs[0]) == len(runs[1])
    return num_different


def test_in_bf16_only_near_ties_fall_differently(embedded_tokenizer):
    model = ILLaDAForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.bfloat16)
    assert differences_in_bf16(model, embedded_tokenizer, "ordering", 3) <= 1


@pytest.mark.by_hand
def test_near_ties_of_many_answers_in_bf16(embedded_tokenizer):
    model = ILLaDAForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.bfloat16)
    for family in FAMILIES:
        print(f"{family}: {differences_in_bf16(model, embedded_tokenizer, family, 20)} of 20 steps are near-ties")


# Refusals

REFUSED = [
    ({"do_sample": True}, "`num_drafts` must be unset with `do_sample`=True, since each step draws new noise, got 4"),
    ({"remasking": "random"}, "`num_drafts` must be unset with `remasking`='random', since each step draws new noise"),
    ({"commit_rule": "klass"}, "`num_drafts` must be unset with `commit_rule`='klass', since it decides by the steps"),
    (
        {"commit_rule": "credit_decoding"},
        "`num_drafts` must be unset with `commit_rule`='credit_decoding', since it d",
    ),
    ({"commit_rule": "t2m"}, "`num_drafts` must be unset with `commit_rule`='t2m', since it may mask again what was"),
    ({"commit_rule": "wino"}, "`num_drafts` must be unset with `commit_rule`='wino', since it decides by the steps"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_cannot_be_exact_is_refused(arguments, message):
    model = TableModel(table_of({}, 8))
    prompt = torch.tensor([[7]])
    for call in (
        lambda: model.generate(prompt, max_new_tokens=4, num_drafts=4, **arguments),
        lambda: model.generate_batch([[7]], max_new_tokens=4, num_drafts=4, progress_bar=False, **arguments),
        lambda: model.revise(prompt, fraction=0.5, num_drafts=4, **arguments),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not model.calls
    assert model.generate(prompt, max_new_tokens=4, num_drafts=1, eos_token_id=EOS).shape == (1, 5)


def test_a_cache_needs_attention_that_takes_any_mask():
    model = random_model(0, dtype=torch.float32)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="`num_drafts`=4 with a `block_cache` must come with 'sdpa' or 'eager'"):
        model.generate(torch.tensor([[7]]), max_new_tokens=4, num_drafts=4, block_cache="dual")
