"""The engine: what a request gets depends on nothing but the request; rows are free when they should be."""

import gc

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_decoding_properties import examples, parallel_rules, prompts, prompts_with_blanks
from tiny_models import EOS, MASK, PAD, TableModel, random_model, table_of
from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching import RequestStatus

MODELS = [random_model(seed, num_layers=2) for seed in range(2)]
SETTINGS = {"max_new_tokens": 8, "block_length": 4, "pad_token_id": PAD}


def manager_of(model, rows: int = 8, **settings):
    config = ContinuousBatchingConfig(max_requests_per_batch=rows, **settings)
    return model.init_continuous_batching(continuous_batching_config=config)


def run(manager, arrivals: dict[int, list], cancellations: dict[int, list] | None = None):
    """Steps until all is done; `arrivals` and `cancellations` are called for at their pass."""
    tick, last = 0, max([*arrivals, *(cancellations or {})], default=0)
    while True:
        for arguments in arrivals.get(tick, ()):
            manager.add_request(**arguments)
        for request_id in (cancellations or {}).get(tick, ()):
            manager.cancel_request(request_id)
        if not manager._step() and tick >= last:
            return {output.request_id: output for output in manager._results}
        tick += 1


# Time does not matter

noise = st.one_of(
    st.just({}),
    st.builds(lambda seed: {"do_sample": True, "temperature": 3.0, "seed": seed}, st.integers(0, 2**40)),
    st.builds(lambda seed: {"remasking": "random", "seed": seed}, st.integers(0, 2**40)),
)
requests = st.fixed_dictionaries(
    {
        "input_ids": st.one_of(prompts, prompts_with_blanks),
        "max_new_tokens": st.integers(1, 9),
        "block_length": st.integers(1, 5),
        "max_denoising_steps": st.integers(1, 5),
        "guidance_scale": st.sampled_from([None, None, 1.5]),
        "canvas, block_cache": st.sampled_from(
            [("growing", None), ("fixed", None), ("growing", "prefix"), ("fixed", "dual"), ("growing", "frozen")]
        ),
        "rule": parallel_rules,
        "noise": noise,
        "num_drafts": st.sampled_from([None, None, 2, 5]),
        "arrival": st.integers(0, 12),
        "cancelled": st.sampled_from([None, None, None, 0, 1, 3]),
    }
)


@examples
@given(st.sampled_from(MODELS), st.lists(requests, min_size=2, max_size=6), st.integers(1, 4))
def test_time_does_not_matter(model, asked, rows):
    """Random requests with random arrivals, cancellations and row limits give each the tokens of `generate` alone."""
    arrivals, cancellations, expected = {}, {}, {}
    for index, request in enumerate(asked):
        settings = {name: value for name, value in request.items() if name not in ("rule", "noise", "arrival")}
        settings["canvas"], settings["block_cache"] = settings.pop("canvas, block_cache")
        cancelled = settings.pop("cancelled")
        prompt = settings.pop("input_ids")
        settings |= {**request["rule"], **request["noise"], "pad_token_id": PAD}
        if request["noise"]:
            settings["num_drafts"] = None  # which is refused
        arrivals.setdefault(request["arrival"], []).append({"input_ids": prompt, "request_id": str(index), **settings})
        if cancelled is not None:
            cancellations.setdefault(request["arrival"] + cancelled, []).append(str(index))
        alone = model.generate(torch.tensor([prompt]), **settings)[0].tolist()
        expected[str(index)] = alone[: len(prompt)], alone[len(prompt) :], cancelled is not None
    outputs = run(manager_of(model, rows), arrivals, cancellations)
    for request_id, (prompt, response, is_cancelled) in expected.items():
        if request_id not in outputs:
            assert is_cancelled
            continue
        output = outputs[request_id]
        assert output.error is None
        assert (output.prompt_ids, output.generated_tokens) == (prompt, response)


# Who is served, and when


def writer() -> TableModel:
    """A model that writes 6, 6, ... and never an end."""
    return TableModel(table_of(dict.fromkeys(range(64), {6: 0.9}), 64))


def served(manager, arrivals: dict[int, list]) -> list[list[str]]:
    """The ids of the requests that took part in each pass."""
    passes: dict[int, list[str]] = {}

    def listener(name: str):
        return lambda step: passes.setdefault(manager.engine.num_passes, []).append(name)

    for arguments in (arguments for batch in arrivals.values() for arguments in batch):
        arguments["on_step"] = listener(arguments["request_id"])
    run(manager, arrivals)
    assert list(passes) == list(range(1, manager.engine.num_passes + 1))
    return [sorted(names) for names in passes.values()]


def request_of(name: str, num_tokens: int, prompt_length: int = 1) -> dict:
    settings = {"max_new_tokens": num_tokens, "block_length": 2, "eos_token_id": EOS, "pad_token_id": PAD}
    return {"input_ids": [7] * prompt_length, "request_id": name, **settings}


def test_first_come_first_admitted_and_a_row_is_free_at_the_next_pass():
    requests = [request_of("a", 2), request_of("b", 5), request_of("c", 2), request_of("d", 1)]
    passes = served(manager_of(writer(), rows=2), {0: requests})
    assert passes == [["a", "b"], ["a", "b"], ["b", "c"], ["b", "c"], ["b", "d"]]


def test_a_late_request_joins_at_the_next_pass():
    passes = served(manager_of(writer(), rows=2), {0: [request_of("a", 4)], 2: [request_of("b", 1)]})
    assert passes == [["a"], ["a"], ["a", "b"], ["a"]]


def test_what_is_large_is_not_overtaken_and_starves_nobody():
    """`max_batch_tokens` are rows times the columns of the longest. What does not fit waits, and all behind it too."""
    # 24 tokens: two rows of 12 columns, or one of up to 24.
    requests = [request_of("small", 3), request_of("large", 4, prompt_length=16), request_of("last", 1)]
    passes = served(manager_of(writer(), rows=4, max_batch_tokens=24), {0: requests})
    assert passes == [["small"]] * 3 + [["large"]] * 4 + [["last"]]
    # A long one does not hold up those that fit beside it.
    requests = [request_of("long", 6), request_of("b", 1), request_of("c", 1), request_of("d", 1)]
    passes = served(manager_of(writer(), rows=2, max_batch_tokens=24), {0: requests})
    assert passes == [["b", "long"], ["c", "long"], ["d", "long"]] + [["long"]] * 3


def test_a_request_that_raises_fails_alone_whatever_it_shares():
    """A processor, a rule, a streamer's handler, a criterion, a logit that is not finite."""

    def explode(*_):
        raise RuntimeError("mine")

    bad = [{"logits_processor": [explode]}, {"on_step": explode}, {"stopping_criteria": [explode]}]
    bad += [{"logits_processor": [lambda ids, scores: scores * torch.nan]}]
    model = MODELS[0]
    manager = manager_of(model)
    good = [[7, 8, 9], [10, MASK, 12], [13]]
    for index, prompt in enumerate(good):
        manager.add_request(prompt, f"good-{index}", **SETTINGS)
        for number, arguments in enumerate(bad):
            manager.add_request(prompt, f"bad-{index}-{number}", **SETTINGS, **arguments)
    outputs = run(manager, {})
    for index, prompt in enumerate(good):
        alone = model.generate(torch.tensor([prompt]), **SETTINGS)[0, len(prompt) :].tolist()
        assert outputs[f"good-{index}"].generated_tokens == alone
        for number in range(3):
            assert outputs[f"bad-{index}-{number}"].status == RequestStatus.FAILED
            assert "mine" in outputs[f"bad-{index}-{number}"].error
        assert "NaN or infinite at position" in outputs[f"bad-{index}-3"].error


def test_a_forward_pass_that_raises_fails_the_rows_in_it_and_the_engine_lives(monkeypatch):
    model = random_model(0)
    manager = manager_of(model)
    manager.add_request([7, 8], "exact", **SETTINGS)
    manager.add_request([7, 8], "guided", guidance_scale=2.0, **SETTINGS)
    real = type(model).forward

    def forward(self, input_ids=None, **arguments):
        if len(input_ids) == 2:
            raise MemoryError("too much")
        return real(self, input_ids=input_ids, **arguments)

    monkeypatch.setattr(type(model), "forward", forward)
    outputs = run(manager, {})
    assert "too much" in outputs["guided"].error and outputs["exact"].error is None
    monkeypatch.undo()
    manager._results.clear()
    manager.add_request([7, 8], "again", guidance_scale=2.0, **SETTINGS)
    assert run(manager, {})["again"].error is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 0}])
def test_logits_that_are_not_finite_are_an_error_that_names_position_and_cause(value, sampling):
    table = table_of(dict.fromkeys(range(8), {6: 0.9}), 8)
    table[5, 9] = value
    model = TableModel(table.half())
    prompt = torch.tensor([[7, 7, 7]])
    with pytest.raises(ValueError, match=r"NaN or infinite at position 5: float16 overflows .* bfloat16 or float32"):
        model.generate(prompt, max_new_tokens=4, block_length=4, **sampling)
    assert model.generate(prompt, max_new_tokens=2, block_length=2, **sampling).shape == (1, 5)


@pytest.mark.slow
@pytest.mark.parametrize("block_cache", [None, "prefix"])
def test_2000_requests_leave_the_memory_where_200_left_it(block_cache):
    model, manager = random_model(0, dtype=torch.float32), None
    manager = manager_of(model, rows=8)
    process = psutil.Process()

    def serve(count: int):
        for index in range(count):
            prompt = [7 + (index + i) % 20 for i in range(1 + index % 30)]
            settings = {"seed": index, "do_sample": index % 3 == 0, "confidence_threshold": 0.5 + index % 50 / 100}
            manager.add_request(
                prompt, block_cache=block_cache, **{**SETTINGS, "max_new_tokens": 1 + index % 8}, **settings
            )
        while manager._step():
            pass
        assert len(manager._results) == count and not manager._tickets and not manager.engine.active
        manager._results.clear()
        gc.collect()

    serve(200)
    before = process.memory_info().rss
    serve(2000)
    assert process.memory_info().rss - before < 20e6
