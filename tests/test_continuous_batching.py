"""Many requests through one engine: each gets what `generate` gives it, by Transformers' interface."""

import asyncio
import json
import logging
import subprocess
import sys
import threading

import pytest
import torch
from conftest import FIXTURES
from tiny_models import EOS, MASK, PAD, random_model, tiny_tokenizer
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import RequestStatus

from illada.continuous_batching import QueueFull

PROMPTS = [[7, 8, 9], [10], [11, MASK, 13, 14, MASK], [15, 16], [7] * 9, [12, 13]]
SETTINGS = {"max_new_tokens": 12, "block_length": 4, "pad_token_id": PAD}


@pytest.fixture(scope="module")
def model():
    return random_model(0, num_layers=2)


def alone(model, prompt: list[int], **settings) -> tuple[list[int], list[int]]:
    """The prompt with its blanks filled, and the response."""
    tokens = model.generate(torch.tensor([prompt]), **{**SETTINGS, **settings})[0].tolist()
    return tokens[: len(prompt)], tokens[len(prompt) :]


def check(outputs, model, prompts, **settings):
    for output, prompt in zip(outputs, prompts, strict=True):
        assert (output.prompt_ids, output.generated_tokens) == alone(model, prompt, **settings)
        assert output.status == RequestStatus.FINISHED and output.error is None


@pytest.mark.parametrize("block_cache", [None, "prefix", "dual"])
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_generate_batch_gives_what_generate_gives(model, rows, block_cache):
    config = ContinuousBatchingConfig(max_requests_per_batch=rows)
    outputs = model.generate_batch(PROMPTS, continuous_batching_config=config, block_cache=block_cache, **SETTINGS)
    assert list(outputs) == [f"req_{index}" for index in range(len(PROMPTS))]
    check(outputs.values(), model, PROMPTS, block_cache=block_cache)
    for output, prompt in zip(outputs.values(), PROMPTS):
        settings = {**SETTINGS, "block_cache": block_cache, "return_dict_in_generate": True}
        by_itself = model.generate(torch.tensor([prompt]), **settings)
        assert output.num_forward_passes == by_itself.num_forward_passes
        assert output.tokens_per_forward == pytest.approx(by_itself.tokens_per_forward.item())


def test_samples_with_a_seed_are_those_of_generate(model):
    sampling = {"do_sample": True, "temperature": 2.0, "seed": 5}
    outputs = model.generate_batch(PROMPTS[:2], num_return_sequences=3, **SETTINGS, **sampling)
    assert list(outputs)[:3] == ["req_0__child#0", "req_0__child#1", "req_0"]
    batch = model.generate(torch.tensor(PROMPTS[:1]), num_return_sequences=3, **SETTINGS, **sampling)
    for output, row in zip(outputs.values(), batch.tolist()):
        assert output.generated_tokens == row[3 : 3 + len(output.generated_tokens)]
    second = alone(model, PROMPTS[1], **{**sampling, "seed": 8})
    assert (outputs["req_1__child#0"].prompt_ids, outputs["req_1__child#0"].generated_tokens) == second


def test_a_manager_takes_requests_of_different_settings_at_any_time(model):
    settings = [
        {},
        {"confidence_threshold": 0.3},
        {"do_sample": True, "temperature": 3.0, "seed": 3},
        {"guidance_scale": 2.0, "max_new_tokens": 5},
        {"block_cache": "dual", "canvas": "fixed"},
        {"eos_token_id": [EOS, 9, 11], "remasking": "margin"},
    ]
    with model.continuous_batching_context_manager(GenerationConfig(pad_token_id=PAD)) as manager:
        ids = []
        for prompt, own in zip(PROMPTS, settings):
            ids.append(manager.add_request(prompt, **{**SETTINGS, **own}))
            if len(ids) % 2 == 0:
                manager.get_result(ids[-2], timeout=30)  # so that some join while others are written
                manager.add_request(prompt, f"again-{ids[-2]}", **{**SETTINGS, **settings[len(ids) - 2]})
        results = {}
        while len(results) < len(ids):
            output = manager.get_result(timeout=30)
            results[output.request_id] = output
    for request_id, prompt, own in zip(ids, PROMPTS, settings):
        output = results.get(request_id) or results[f"again-{request_id}"]
        own_prompt = prompt if request_id in results else PROMPTS[ids.index(request_id) + 1]
        assert (output.prompt_ids, output.generated_tokens) == alone(model, own_prompt, **own)


def test_streaming_results_grow_and_end(model):
    with model.continuous_batching_context_manager() as manager:
        request_id = manager.add_request(PROMPTS[0], streaming=True, record_timestamps=True, **SETTINGS)
        outputs = list(manager.request_id_iter(request_id))
    assert outputs[-1].is_finished() and not any(output.is_finished() for output in outputs[:-1])
    lengths = [len(output.generated_tokens) for output in outputs]
    assert lengths == sorted(lengths) and len(set(lengths)) > 1
    for output in outputs:
        assert outputs[-1].generated_tokens[: len(output.generated_tokens)] == output.generated_tokens
    assert outputs[-1].generated_tokens == alone(model, PROMPTS[0])[1]
    assert len(outputs[-1].timestamps) == len(outputs[-1].generated_tokens)
    assert outputs[-1].timestamps == sorted(outputs[-1].timestamps)


def test_log_probabilities_are_those_at_commit(model):
    config = ContinuousBatchingConfig(return_logprobs=True)
    (output,) = model.generate_batch(PROMPTS[:1], continuous_batching_config=config, **SETTINGS).values()
    traced = model.generate(
        torch.tensor(PROMPTS[:1]), output_trace=True, return_dict_in_generate=True, **SETTINGS
    ).commit_confidences[0, 3:]
    assert output.logprobs == pytest.approx(traced.log().tolist())


def test_a_handler_hears_each_result_on_the_event_loop(model):
    async def serve():
        heard, done = [], asyncio.Event()

        def on_result(output):
            heard.append(output)
            if output.is_finished():
                done.set()

        with model.continuous_batching_context_manager() as manager:
            manager.register_result_handler("mine", on_result)
            manager.add_request(PROMPTS[0], "mine", streaming=True, **SETTINGS)
            await asyncio.wait_for(done.wait(), 60)
            assert manager.get_result(timeout=0.01) is None
        return heard

    heard = asyncio.run(serve())
    assert heard[-1].generated_tokens == alone(model, PROMPTS[0])[1] and len(heard) > 1


def test_a_cancelled_request_leaves_and_the_others_go_on(model):
    started, release = threading.Event(), threading.Event()

    def hold(step):
        started.set()
        release.wait(30)

    with model.continuous_batching_context_manager() as manager:
        manager.add_request(PROMPTS[0], "held", on_step=hold, **SETTINGS)
        started.wait(30)
        manager.add_request(PROMPTS[1], "other", **SETTINGS)
        manager.cancel_request("held")
        manager.cancel_request("nobody")
        release.set()
        output = manager.get_result(timeout=60)
    assert output.request_id == "other" and output.generated_tokens == alone(model, PROMPTS[1])[1]
    assert manager.get_result() is None


def test_a_request_that_raises_fails_alone(model):
    def refuse(input_ids, scores):
        raise RuntimeError("no")

    with model.continuous_batching_context_manager() as manager:
        manager.add_request(PROMPTS[0], "bad", logits_processor=[refuse], **SETTINGS)
        manager.add_request(PROMPTS[1], "worse", on_step=lambda step: 1 / 0, **SETTINGS)
        manager.add_request(PROMPTS[3], "good", **SETTINGS)
        results = {output.request_id: output for output in (manager.get_result(timeout=60) for _ in range(3))}
    assert results["bad"].status == RequestStatus.FAILED and "RuntimeError: no" in results["bad"].error
    assert "ZeroDivisionError" in results["worse"].error
    assert type(results["worse"].exception) is ZeroDivisionError
    check([results["good"]], model, [PROMPTS[3]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"confidence_threshold": 2}, "`confidence_threshold` must be a number in"),
        ({"input_ids": [7, 99]}, "`input_ids` must be in"),
        ({"input_ids": []}, "`input_ids` must be"),
        ({"stop_strings": "a"}, "`tokenizer` must be passed with `stop_strings`"),
        ({"max_new_tokens": 100}, "do not fit into the model's"),
        ({"mask_token_id": 6}, "`mask_token_id` must be the manager's, 5, got 6"),
        ({"max_new_tokens": 40}, "must fit into `max_tokens`=32, got 3 tokens of prompt and a budget of 40"),
        ({"nonsense": 1}, "`nonsense` is an unknown argument"),
    ],
)
def test_a_bad_request_is_refused_before_it_is_queued(model, arguments, message):
    manager = model.init_continuous_batching(continuous_batching_config=ContinuousBatchingConfig(max_batch_tokens=32))
    with pytest.raises(ValueError, match=message):
        manager.add_request(**{"input_ids": [7, 8, 9], **SETTINGS, **arguments})
    assert not manager._tickets and not manager._arrivals


def test_two_requests_of_one_id_are_refused(model):
    manager = model.init_continuous_batching()
    manager.add_request(PROMPTS[0], "one", **SETTINGS)
    with pytest.raises(ValueError, match="`request_id` must be unique, got 'one'"):
        manager.add_request(PROMPTS[0], "one", **SETTINGS)


def test_what_is_waiting_is_bounded(model):
    manager = model.init_continuous_batching(
        continuous_batching_config=ContinuousBatchingConfig(max_queue_size=2, max_requests_per_batch=1)
    )
    for _ in range(2):
        manager.add_request(PROMPTS[0], **SETTINGS)
        manager._step()
    manager.add_request(PROMPTS[0], **SETTINGS)
    manager._step()
    with pytest.raises(RuntimeError, match="`max_queue_size`=2"):
        manager.add_request(PROMPTS[0], **SETTINGS)


def test_what_has_arrived_during_a_pass_is_waiting_too(model):
    config = ContinuousBatchingConfig(max_queue_size=2, max_requests_per_batch=1)
    manager = model.init_continuous_batching(continuous_batching_config=config)
    manager.add_requests(PROMPTS[:2], **SETTINGS)  # no pass has taken them in yet
    with pytest.raises(QueueFull, match="`max_queue_size`=2 requests may wait, and 2 do already"):
        manager.add_request(PROMPTS[3], **SETTINGS)
    manager.cancel_request("req_0")
    manager.add_request(PROMPTS[3], "instead", **SETTINGS)
    manager.run()
    assert [output.request_id for output in manager._results] == ["req_1", "instead"]


def test_a_fault_of_the_thread_ends_every_request_and_is_told(model, monkeypatch):
    manager = model.init_continuous_batching()
    manager.add_requests(PROMPTS[:2], **SETTINGS)
    monkeypatch.setattr(manager.engine, "step", lambda: 1 / 0)
    manager.start()
    results = [manager.get_result(timeout=60) for _ in range(2)]
    manager.join()
    assert [output.error for output in results] == ["ZeroDivisionError: division by zero"] * 2
    assert isinstance(manager.background_thread_status.fatal_error, ZeroDivisionError)
    with pytest.raises(RuntimeError, match="takes no more requests"):
        manager.add_request(PROMPTS[0], **SETTINGS)
    assert manager.get_result("req_0") is None  # and nobody waits for ever


def test_what_on_done_raises_is_logged_and_stops_nobody(model, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    manager = model.init_continuous_batching()
    (request,) = manager.prepare(PROMPTS[0], **SETTINGS)
    request.on_done = lambda request: 1 / 0
    manager.submit([request])
    manager.add_request(PROMPTS[1], "other", **SETTINGS)
    manager.run()
    assert request.result is not None and request.error is None
    check(manager._results, model, [PROMPTS[1]])
    assert "`on_done` of a request raised ZeroDivisionError" in caplog.text


def test_requests_with_the_same_stop_strings_share_the_search(model):
    tokenizer, manager = tiny_tokenizer(), model.init_continuous_batching()

    def criterion(strings):
        return manager.prepare(PROMPTS[0], tokenizer, **SETTINGS, stop_strings=strings)[0].stopping_criteria[0]

    first = criterion("ab")
    assert criterion(["ab"]) is first and criterion(["ab", "c"]) is not first
    tokenizer.add_tokens("abc")
    assert criterion("ab") is not first


def test_a_stop_writes_what_is_in_line_and_a_hard_stop_makes_it_fail(model):
    manager = model.init_continuous_batching()
    ids = manager.add_requests(PROMPTS, **SETTINGS)
    manager.start()
    manager.stop()
    assert not manager.is_running() and sorted(output.request_id for output in manager._results) == sorted(ids)
    with pytest.raises(RuntimeError, match="is stopping"):
        manager.add_request(PROMPTS[0], **SETTINGS)

    manager = model.init_continuous_batching()
    manager.add_request(PROMPTS[0], "late", **SETTINGS)
    manager.stop(hard_stop=True)
    manager._run()
    assert [(output.request_id, output.error) for output in manager._results] == [
        ("late", "RuntimeError: The manager was stopped.")
    ]


def test_stop_strings_of_one_request(model):
    tokenizer = tiny_tokenizer()
    text = alone(model, PROMPTS[0], eos_token_id=None)[1]
    stop = tokenizer.decode(text[:3])
    outputs = model.generate_batch(
        PROMPTS[:2], stop_strings=stop, tokenizer=tokenizer, **{**SETTINGS, "eos_token_id": None}
    )
    assert outputs["req_0"].generated_tokens == text[:3]


def test_a_manager_may_be_kept_for_the_next_session(model):
    with model.continuous_batching_context_manager(persistent_manager=True) as manager:
        pass
    with model.continuous_batching_context_manager() as again:
        assert again is manager
        manager.add_request(PROMPTS[0], **SETTINGS)
        check([manager.get_result(timeout=60)], model, PROMPTS[:1])
    model.destroy_cached_continuous_batching_manager()
    assert model.init_continuous_batching() is not manager


STRANGER = """
import json, sys
sys.modules["illada"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
outputs = model.generate_batch([[7, 8, 9], [10]], max_new_tokens=8, block_length=4)
print(json.dumps([output.generated_tokens for output in outputs.values()]))
"""


def test_generate_batch_where_the_package_is_not_installed(tmp_path):
    from illada import ILLaDAForCausalLM

    model = ILLaDAForCausalLM.from_pretrained(FIXTURES / "illada" / "checkpoint")
    model.save_pretrained(tmp_path)
    run = subprocess.run([sys.executable, "-c", STRANGER, str(tmp_path)], capture_output=True, text=True, check=True)
    outputs = model.generate_batch([[7, 8, 9], [10]], max_new_tokens=8, block_length=4)
    assert json.loads(run.stdout.splitlines()[-1]) == [output.generated_tokens for output in outputs.values()]


def test_calls_are_made_in_the_managers_thread_between_passes(tiny_model):
    with tiny_model.continuous_batching_context_manager() as manager:
        manager.add_request([7, 8, 9], "text", max_new_tokens=8)
        futures = [manager.call(lambda: (threading.current_thread(), torch.is_grad_enabled())) for _ in range(3)]
        failing = manager.call(lambda: 1 / 0)
        for future in futures:
            assert future.result(60) == (manager._thread, False)
        with pytest.raises(ZeroDivisionError):
            failing.result(60)
        assert manager.get_result("text").error is None
        late = manager.call(lambda: "done")  # a stop that lets requests finish lets calls finish
    assert late.result(0) == "done"
    with pytest.raises(RuntimeError, match="takes no more requests"):
        manager.call(lambda: None)


def test_calls_are_bounded_and_end_with_the_manager(tiny_model):
    manager = tiny_model.init_continuous_batching(
        continuous_batching_config=ContinuousBatchingConfig(max_queue_size=2)
    )
    calls = [manager.call(lambda: None) for _ in range(2)]  # nobody makes them yet
    with pytest.raises(QueueFull, match="`max_queue_size`=2"):
        manager.call(lambda: None)
    calls[0].cancel()
    manager.start()
    assert calls[1].result(60) is None
    with manager.pause():
        last = manager.call(lambda: None)
        manager.stop(block=False, hard_stop=True)
    manager.join()
    try:
        assert last.result(0) is None  # made before the thread saw the stop
    except RuntimeError as error:
        assert "stopped" in str(error)
