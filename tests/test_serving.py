"""`illada serve`: OpenAI's interface on a real socket, asked by the `openai` client and by clients that misbehave."""

import functools
import json
import re
import shutil
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from illada import EMBEDDED_MODEL
from illada.commands.main import app as command

openai = pytest.importorskip("openai", reason="the server is asked by the `openai` client, which is not installed")
pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
from http_server import Gate, ProcessServer, ThreadServer, wait_until  # noqa: E402

NAME = "illada-tiny"
QUESTIONS = [f"Tom has {n} apples. He buys {n + 2} more. How many apples does Tom have now?" for n in range(2, 10)]
BLANK = "Today Tom has 3 pears and<[MASK]> cups. 3 + 4 = 7, so Tom has 7 things in all."


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def gate(model):
    return Gate(model)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def server(model, gate, tokenizer):
    with ThreadServer(model, tokenizer) as server:
        yield server


@pytest.fixture
def closed(gate):
    """The gate, closed until the test opens it; it is open afterwards."""
    gate.close()
    yield gate
    gate.open()


@pytest.fixture(scope="module")
def generated(tokenizer):
    """What `generate` answers to a message (a list) or continues a text with, by a model of its own."""
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)

    def generated(prompt, seed: int | None = None, **settings):
        if isinstance(prompt, list):
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        else:
            ids = tokenizer(prompt)["input_ids"]
        if seed is not None:
            settings["generator"] = torch.Generator().manual_seed(seed)
        output = model.generate(torch.tensor([ids]), return_dict_in_generate=True, **settings)
        return tokenizer.decode(output.sequences[0, len(ids) :], skip_special_tokens=True), output

    return generated


def user(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


def ask(server, question: str, stream: bool = False, **settings) -> str:
    completion = server.client.chat.completions.create(model=NAME, messages=user(question), stream=stream, **settings)
    if not stream:
        return completion.choices[0].message.content
    return "".join(chunk.choices[0].delta.content or "" for chunk in completion)


def complete(server, prompt, stream: bool = False, **settings) -> str:
    completion = server.client.completions.create(model=NAME, prompt=prompt, stream=stream, **settings)
    if not stream:
        return completion.choices[0].text
    return "".join(chunk.choices[0].text for chunk in completion)


BOTH = pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])


def test_the_model_is_listed_and_no_other_is_served(server):
    client = server.client
    assert [model.id for model in client.models.list()] == [NAME] and client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="'illada-tiny'"):
        client.models.retrieve("some/other")
    with pytest.raises(openai.NotFoundError, match="got 'another'"):
        client.chat.completions.create(model="another", messages=user("hello"))
    # What `transformers serve` offers, and is not offered here: any client could load another model.
    status, text, _ = server.post({"model": "some/other"}, "/load_model")
    assert status == 404 and "/load_model" in json.loads(text)["error"]["message"]


@BOTH
def test_an_answer_is_generates(server, generated, stream):
    assert ask(server, QUESTIONS[0], stream) == generated(user(QUESTIONS[0]))[0]  # in the checkpoint's own budget
    assert ask(server, QUESTIONS[0], stream, max_tokens=6) == generated(user(QUESTIONS[0]), max_new_tokens=6)[0]
    assert ask(server, QUESTIONS[0], stream, max_completion_tokens=6) == ask(server, QUESTIONS[0], max_tokens=6)
    assert complete(server, "Today Tom", stream, max_tokens=9) == generated("Today Tom", max_new_tokens=9)[0]


def test_a_checkpoint_of_single_turns_is_sent_the_last_message_only(server, generated, model, monkeypatch):
    past = [*user(QUESTIONS[0]), {"role": "assistant", "content": "Add: 2 + 4 = 6. The answer is 6."}]
    conversation = [*past, *user(QUESTIONS[1])]

    def ask_all() -> str:
        completion = server.client.chat.completions.create(model=NAME, messages=conversation, max_tokens=9)
        return completion.choices[0].message.content

    assert model.config.single_turn
    assert ask_all() == generated(user(QUESTIONS[1]), max_new_tokens=9)[0]
    monkeypatch.setattr(model.config, "single_turn", False)
    assert ask_all() == generated(conversation, max_new_tokens=9)[0]


def test_usage_and_the_reason_of_the_end(server, generated):
    for budget, reason in ((6, "length"), (100, "stop")):
        completion = server.client.chat.completions.create(model=NAME, messages=user(QUESTIONS[0]), max_tokens=budget)
        _, output = generated(user(QUESTIONS[0]), max_new_tokens=budget)
        usage = completion.usage
        assert completion.choices[0].finish_reason == reason
        assert usage.forward_passes == int(output.num_forward_passes[0])
        assert usage.completion_tokens == output.sequences.shape[1] - usage.prompt_tokens
        assert usage.total_tokens == output.sequences.shape[1]
        assert usage.tokens_per_forward == pytest.approx(float(output.tokens_per_forward[0]), abs=1e-3)


def test_a_stream_brings_text_as_it_settles(server, generated):
    stream = server.client.chat.completions.create(
        model=NAME, messages=user(QUESTIONS[0]), stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    texts = [chunk.choices[0].delta.content for chunk in chunks]
    answer, output = generated(user(QUESTIONS[0]))
    assert "".join(text or "" for text in texts) == answer
    assert sum(bool(text) for text in texts) > 2  # not the block as a whole
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "stop"
    assert last.choices == [] and last.usage.forward_passes == int(output.num_forward_passes[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "fast"},
        {"confidence_threshold": 0.5, "block_length": 8},
        {"block_cache": "prefix", "block_length": 4, "canvas": "fixed"},
        {"max_denoising_steps": 2, "remasking": "entropy", "guidance_scale": 1.5},
    ],
    ids=str,
)
def test_the_packages_own_settings_are_fields_of_a_request(server, generated, settings):
    completion = server.client.chat.completions.create(
        model=NAME, messages=user(QUESTIONS[3]), max_tokens=16, extra_body=settings
    )
    answer, output = generated(user(QUESTIONS[3]), max_new_tokens=16, **settings)
    assert completion.choices[0].message.content == answer
    assert completion.usage.forward_passes == int(output.num_forward_passes[0])


def test_settings_of_the_server_are_the_defaults_of_requests(tokenizer, generated):
    from illada import MaskedDiffusionGenerationConfig

    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
    model.generation_config = MaskedDiffusionGenerationConfig.merged(
        model.generation_config, None, preset="fast", max_new_tokens=12
    )
    model.generation_config.stop_strings = ["12"]
    with ThreadServer(model, tokenizer) as server:
        answer, output = generated(user(QUESTIONS[3]), preset="fast", max_new_tokens=12)
        usage = server.client.chat.completions.create(model=NAME, messages=user(QUESTIONS[3]), stop="none").usage
        assert usage.forward_passes == int(output.num_forward_passes[0])
        assert ask(server, QUESTIONS[3]) == answer.partition("12")[0] != answer  # the checkpoint's own stop string
        exact = generated(user(QUESTIONS[3]), max_new_tokens=12)[0]
        assert ask(server, QUESTIONS[3], stop="none", extra_body={"preset": "exact"}) == exact


def test_several_prompts_and_several_answers(server, generated, tokenizer):
    prompts = ["Today Tom has", "Sort the numbers: 17 4 9"]
    settings = {"max_tokens": 8, "temperature": 1.5, "seed": 3, "n": 2}
    expected = [
        generated(prompt, seed, max_new_tokens=8, do_sample=True, temperature=1.5)[0]
        for prompt in prompts
        for seed in (3, 4)  # the second answer's noise is that of the next seed
    ]
    for given in (prompts, [tokenizer(prompt)["input_ids"] for prompt in prompts]):
        completion = server.client.completions.create(model=NAME, prompt=given, **settings)
        assert [choice.text for choice in completion.choices] == expected and len(set(expected)) == 4
        assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    texts = [""] * 4
    for chunk in server.client.completions.create(model=NAME, prompt=prompts, stream=True, **settings):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected
    assert complete(server, prompts[0], max_tokens=4, echo=True).startswith(prompts[0])


@BOTH
def test_a_stop_string_ends_the_answer_and_is_not_in_it(server, generated, stream):
    answer, _ = generated(user(QUESTIONS[0]))
    assert "answer is" in answer  # "Add: 2 + 4 = 6. The answer is 6."
    assert ask(server, QUESTIONS[0], stream, stop="answer is") == answer.partition("answer is")[0]
    assert ask(server, QUESTIONS[0], stream, stop=["never", "er is", " The"]) == answer.partition(" The")[0]
    assert ask(server, QUESTIONS[0], stream, stop=["answer is not"]) == answer  # what was held back comes after all
    completion = server.client.chat.completions.create(
        model=NAME, messages=user(QUESTIONS[0]), stop="2", extra_body={"block_length": 4}
    )
    answer, output = generated(user(QUESTIONS[0]), block_length=4)
    assert completion.choices[0].message.content == answer.partition("2")[0]
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.forward_passes < int(output.num_forward_passes[0])


def test_a_stop_string_does_not_begin_in_the_prompt(server, generated):
    answer, _ = generated("Today Tom has", max_new_tokens=6)
    across = f"has{answer[:3]}"
    assert across not in answer
    assert complete(server, "Today Tom has", max_tokens=6, stop=across) == answer
    # Nor is it searched in a prompt that the answer shows.
    assert complete(server, "Today Tom has", max_tokens=6, echo=True, stop=["Tom", across]) == f"Today Tom has{answer}"
    prompt = "Today Tom has<[MASK]> pears and"
    whole = complete(server, prompt, max_tokens=5)
    assert complete(server, prompt, max_tokens=5, stop=["pears", "Today"]) == whole
    after = whole.partition("pears and")[2]
    assert len(after) > 3
    assert complete(server, prompt, True, max_tokens=5, stop=after[1:3]) == whole[: 1 - len(after)]


@BOTH
def test_a_suffix_is_what_the_answer_leads_to(server, generated, tokenizer, model, stream):
    prompt, texts = "Today Tom has 3 pears and", []
    for suffix in (" cups. 3 + 4 = 7, so Tom has 7 things in all.", " cups. 3 + 6 = 9, so Tom has 9 things in all."):
        after = tokenizer(suffix, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*tokenizer(prompt)["input_ids"], model.config.mask_token_id, *after]])
        filled = model.generate(ids, max_new_tokens=0)[0, -len(after) - 1]
        texts.append(complete(server, prompt, stream, suffix=suffix, max_tokens=1))
        assert texts[-1] == tokenizer.decode(filled)
    assert texts == [" 4", " 6"]


@BOTH
@pytest.mark.parametrize("budget", [0, 5])
def test_blanks_of_a_prompt_are_filled_and_shown(server, tokenizer, model, budget, stream):
    ids = tokenizer(BLANK, return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=budget)[0], skip_special_tokens=True)
    assert "3 pears and 4 cups" in expected
    assert complete(server, BLANK, stream, max_tokens=budget) == expected
    spelled = BLANK.replace("<[MASK]>", "<[MASK]*1>")
    assert complete(server, spelled, stream, max_tokens=budget) == expected


def test_a_seed_is_kept_whoever_else_is_served(server, generated):
    """24 overlapping requests, each with its own noise; and no request touches the process's own generator."""
    settings = {"temperature": 2.0, "max_tokens": 8}

    def request(number: int) -> str:
        return ask(server, QUESTIONS[number % 3], number % 2 == 0, seed=number % 5, **settings)

    torch.manual_seed(1)
    state = torch.get_rng_state()
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(request, range(24)))
    assert torch.equal(torch.get_rng_state(), state)
    expected = [
        generated(user(QUESTIONS[n % 3]), n % 5, max_new_tokens=8, do_sample=True, temperature=2.0)[0]
        for n in range(24)
    ]
    assert answers == expected and len(set(expected)) > 5
    fresh = {ask(server, QUESTIONS[0], temperature=50, max_tokens=8) for _ in range(3)}
    assert len(fresh) == 3  # without a seed, fresh noise


def test_a_checkpoint_decides_whether_it_samples(server, generated):
    assert ask(server, QUESTIONS[0], temperature=0, top_p=0.5) == generated(user(QUESTIONS[0]))[0]
    with pytest.raises(openai.BadRequestError, match="`top_p`=0.5 must come with a `temperature`"):
        ask(server, QUESTIONS[0], top_p=0.5)


def test_logit_bias(server, generated):
    answer, output = generated(user(QUESTIONS[0]), max_new_tokens=8)
    token = int(output.sequences[0, -8])
    expected, biased = generated(user(QUESTIONS[0]), max_new_tokens=8, sequence_bias=[[[token], -100.0]])
    assert token in output.sequences[0, -8:] and token not in biased.sequences[0, -8:]
    assert ask(server, QUESTIONS[0], max_tokens=8, logit_bias={str(token): -100}) == expected != answer
    for bias, reason in (({"many": 1}, "got 'many'"), ({"99999": 1}, "got '99999'"), ({str(token): 101}, "101")):
        with pytest.raises(openai.BadRequestError, match=f"`logit_bias.*{reason}"):
            ask(server, QUESTIONS[0], logit_bias=bias)


def test_health_answers_while_the_model_is_at_work(server, closed, generated):
    """A request with blanks is in its first forward pass, which does not end before /health has answered."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(complete, server, BLANK, max_tokens=8)
        wait_until(lambda: closed.num_arrived == 1, "the request does not begin")
        assert server.get("/health")[:2] == (200, '{"status":"ok"}')
        assert server.get("/v1/models")[0] == 200
        assert not pending.done()
        closed.open()
        pending.result()
    # Nothing was decoded twice, as a check or otherwise.
    assert closed.num_passes == int(generated(BLANK, max_new_tokens=8)[1].num_forward_passes[0])


def wait_for_line(server, gate, num_waiting: int):
    """Returns when a pass is held and so many requests wait for the next."""
    manager = server.worker.manager
    wait_until(lambda: gate.num_arrived == 1 and manager.num_waiting == num_waiting, "the requests do not arrive")


def test_texts_are_written_together(server, closed, generated):
    """One begins; three that arrive in its first pass join at the second, each with settings of its own."""
    settings = [
        {"max_tokens": 60},
        {"max_tokens": 8, "temperature": 2.0, "seed": 3},
        {"max_tokens": 9, "extra_body": {"block_cache": None, "confidence_threshold": 0.9}},
        {"max_tokens": 7, "stream": True, "extra_body": {"block_length": 4}},
    ]
    manager = server.worker.manager
    passes, row_passes = manager.engine.num_passes, manager.engine.num_row_passes
    with ThreadPoolExecutor(4) as pool:
        pending = []
        for number, own in enumerate(settings):
            pending.append(pool.submit(ask, server, QUESTIONS[number], **own))
            wait_for_line(server, closed, number)
        closed.open()
        answers = [request.result() for request in pending]
    expected = [
        generated(user(QUESTIONS[0]), max_new_tokens=60),
        generated(user(QUESTIONS[1]), 3, max_new_tokens=8, do_sample=True, temperature=2.0),
        generated(user(QUESTIONS[2]), max_new_tokens=9, confidence_threshold=0.9),
        generated(user(QUESTIONS[3]), max_new_tokens=7, block_length=4),
    ]
    assert answers == [answer for answer, _ in expected]
    first, *others = (int(output.num_forward_passes[0]) for _, output in expected)
    assert manager.engine.num_passes - passes == closed.num_passes == max(first, 1 + max(others))
    assert manager.engine.num_row_passes - row_passes == first + sum(others)


def test_a_short_answer_does_not_wait_for_a_long_one(server, closed, generated):
    short, output = generated(user(QUESTIONS[1]), max_new_tokens=4)
    passes = 1 + int(output.num_forward_passes[0])  # the long one's first, and the short one's
    assert int(generated("Today", max_new_tokens=60)[1].num_forward_passes[0]) > passes + 1
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(complete, server, "Today", max_tokens=60)
        wait_for_line(server, closed, 0)
        pending = pool.submit(ask, server, QUESTIONS[1], max_tokens=4)
        wait_for_line(server, closed, 1)
        closed.open(passes)
        assert pending.result(60) == short
        assert not long.done()  # its next pass is held
        closed.open()
        assert long.result(60) == generated("Today", max_new_tokens=60)[0]


@BOTH
def test_clients_that_hang_up_free_their_rows(model, gate, tokenizer, closed, generated, stream):
    """Of four clients one has the only row and three wait; the row is free at the pass after they are gone."""
    body = {"model": NAME, "messages": user(QUESTIONS[0]), "max_tokens": 64, "stream": stream}
    with ThreadServer(model, tokenizer, {"max_rows": 1}) as server, ThreadPoolExecutor(1) as pool:
        quitters = [server.connect(body) for _ in range(4)]
        manager = server.worker.manager
        wait_for_line(server, closed, 3)
        pending = pool.submit(ask, server, QUESTIONS[1], max_tokens=1)
        wait_for_line(server, closed, 4)
        for connection in quitters:
            connection.close()
        wait_until(lambda: len(manager._cancelled) == 4, "the server does not notice")
        assert manager.num_waiting == 1  # who has gone takes no place in the queue
        closed.open()
        answer, output = generated(user(QUESTIONS[1]), max_new_tokens=1)
        assert pending.result() == answer
        assert closed.num_passes == 1 + int(output.num_forward_passes[0])  # the first quitter's pass had begun


def test_a_full_queue_is_a_429(model, gate, tokenizer, closed):
    with ThreadServer(model, tokenizer, {"max_rows": 1, "max_waiting": 2}) as server, ThreadPoolExecutor(3) as pool:
        running = pool.submit(ask, server, QUESTIONS[0], max_tokens=2)
        wait_for_line(server, closed, 0)
        waiting = [pool.submit(ask, server, QUESTIONS[1], max_tokens=2) for _ in range(2)]
        wait_for_line(server, closed, 2)
        status, text, headers = server.post({"messages": user("hello")})
        assert status == 429 and int(headers["retry-after"]) > 0
        assert json.loads(text)["error"]["type"] == "rate_limit_error"
        status, text, _ = server.post({"messages": user("hello"), "n": 3})
        assert status == 400 and "at most 2 texts, got 3" in text
        closed.open()
        assert running.result() and len({answer.result() for answer in waiting}) == 1


def test_a_limit_on_tokens_in_flight(model, gate, tokenizer, closed, generated):
    """48 tokens: two rows of at most 24, or one of 48, prompts included."""
    with ThreadServer(model, tokenizer, {"max_tokens": 48}) as server, ThreadPoolExecutor(3) as pool:
        length = len(tokenizer("Today Tom has")["input_ids"])
        with pytest.raises(openai.BadRequestError, match="this server takes 48 tokens at a time"):
            complete(server, "Today Tom has", max_tokens=49 - length)
        pending = [pool.submit(complete, server, "Today Tom has", max_tokens=24 - length)]
        wait_for_line(server, closed, 0)
        for number in (1, 2):
            pending.append(pool.submit(complete, server, "Today Tom has", max_tokens=24 - length))
            wait_for_line(server, closed, number)
        closed.open(1)
        wait_until(lambda: closed.num_arrived == 2, "there is no second pass")
        assert len(server.worker.manager.engine.active) == 2 and server.worker.manager.num_waiting == 1
        closed.open()
        answer, _ = generated("Today Tom has", max_new_tokens=24 - length)
        assert [request.result() for request in pending] == [answer] * 3
        # Without a budget of its own, a request may have what fits.
        assert complete(server, "Today Tom has") == generated("Today Tom has", max_new_tokens=48 - length)[0]


def test_a_request_fails_alone(model, tokenizer, generated):
    """The listener of one of three raises at its second call; the others are written beside it."""
    from illada.serving.worker import Progress, Worker

    worker = Worker(model)
    ids = tokenizer("Today Tom has")["input_ids"]
    requests = worker.prepare(ids, {"max_new_tokens": 6}, len(ids), count=3)
    heard: list[list[Progress]] = [[], [], []]

    def listen(number: int, progress: Progress):
        heard[number].append(progress)
        if number == 1 and len(heard[1]) == 2:
            raise ArithmeticError("a fault")

    for number, request in enumerate(requests):
        request.listener = functools.partial(listen, number)
    worker.submit(requests)
    wait_until(lambda: all(reports and reports[-1].is_finished for reports in heard), "they do not finish")
    worker.close()
    assert not worker.is_alive
    assert len(heard[1]) == 3 and isinstance(heard[1][-1].error, ArithmeticError)
    answer, output = generated("Today Tom has", max_new_tokens=6)
    for reports in (heard[0], heard[2]):
        tokens = [token for progress in reports for token in progress.new_tokens]
        assert tokens == output.sequences[0, len(ids) :].tolist()
        assert reports[-1].num_passes == int(output.num_forward_passes[0]) and reports[-1].error is None


def test_tokens_of_a_rule_that_masks_again_are_reported_when_they_are_settled(model, tokenizer):
    from illada.commit_rules import COMMIT_RULES, CommitRule, Decision
    from illada.serving.worker import Progress, Worker

    class Doubtful(CommitRule):
        """Commits the whole block, and masks each token of it again once."""

        may_remask = True

        def __call__(self, step) -> Decision:
            return Decision(step.masked, step.predicted & ~step.masked)

    COMMIT_RULES["doubtful"] = Doubtful
    worker = Worker(model)
    try:
        ids = tokenizer("Today Tom has")["input_ids"]
        settings = {"max_new_tokens": 12, "block_length": 4, "commit_rule": "doubtful"}
        [request] = worker.prepare(ids, settings, len(ids))
        heard: list[Progress] = []
        request.listener = heard.append
        worker.submit([request])
        wait_until(lambda: heard and heard[-1].is_finished, "it does not finish")
        assert heard[-1].error is None
        tokens = [token for progress in heard for token in progress.new_tokens]
        assert tokens == model.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist()
        assert len(heard) > 3
    finally:
        del COMMIT_RULES["doubtful"]
        worker.close()


@BOTH
def test_a_fault_of_the_model_is_a_500_and_the_server_lives(server, gate, generated, caplog, monkeypatch, stream):
    def fail(module, arguments):
        raise RuntimeError("secret of the machine")

    handle = server.worker.model.register_forward_pre_hook(fail)
    status, text, headers = server.post({"messages": user("hello"), "stream": stream})
    handle.remove()
    error = json.loads(text.splitlines()[-2].removeprefix("data: ") if stream else text)["error"]
    assert status == (200 if stream else 500) and error["type"] == "server_error"
    assert headers["x-request-id"] in error["message"] and "secret" not in text
    assert headers["x-request-id"] in caplog.text and "secret of the machine" in caplog.text
    assert ask(server, QUESTIONS[1]) == generated(user(QUESTIONS[1]))[0]


def test_a_request_that_takes_too_long_is_given_up(model, gate, tokenizer, closed):
    with ThreadServer(model, tokenizer, timeout=0.01) as server:
        status, text, _ = server.post({"messages": user("hello")})
        assert status == 504 and "0.01 seconds" in json.loads(text)["error"]["message"]
        closed.open()


def test_an_api_key(model, tokenizer):
    with ThreadServer(model, tokenizer, api_key="opén", allowed_origins=["http://page"]) as server:
        assert server.get("/health")[0] == 200
        assert server.get("/v1/models")[0] == 401
        with pytest.raises(openai.AuthenticationError):
            server.client_with("wrong").models.list()
        status, _, headers = server.get(
            "/v1/models", {"Authorization": "Bearer opén".encode().decode("latin-1"), "Origin": "http://page"}
        )
        assert status == 200 and headers["access-control-allow-origin"] == "http://page"


@BOTH
@pytest.mark.parametrize(
    "change, status, reason",
    [
        ({"max_tokens": 10**9}, 400, "`max_tokens` must be at most"),
        ({"max_completion_tokens": 10**9}, 400, "`max_completion_tokens` must be at most"),
        ({"max_tokens": -1}, 400, "`max_tokens`"),
        ({"max_tokens": 0}, 400, "`max_tokens` must be above 0"),
        ({"max_tokens": "many"}, 400, "'many'"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, 400, "must not differ, got 3 and 4"),
        ({"temperature": -1}, 400, "`temperature`"),
        ({"top_p": 2, "temperature": 1}, 400, "`top_p`"),
        ({"seed": 2**64}, 400, "`seed`"),
        ({"n": 0}, 400, "`n`"),
        ({"stop": [""]}, 400, "`stop.0`"),
        ({"logit_bias": {"many": 1}}, 400, "`logit_bias` must have token ids"),
        ({"logit_bias": {"5": 1000}}, 400, "`logit_bias.5`"),
        ({"preset": "quick"}, 400, "`preset` must be one of"),
        ({"confidence_threshold": 5}, 400, "`confidence_threshold` must be a number in (0, 1]"),
        ({"cache_refresh_interval": 4}, 400, "`cache_refresh_interval`=4 must come with `block_cache`"),
        ({"compile": True}, 400, "`compile` is not a field"),
        ({"num_beams": 4}, 400, "`num_beams` is not a field"),
        ({"suppress_tokens": [10**6]}, 400, "`suppress_tokens`"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "`tools` must be left out"),
        ({"response_format": {"type": "json_object"}}, 400, "`response_format` must be left out"),
        ({"logprobs": 1}, 400, "`logprobs`"),
        ({"top_logprobs": 3}, 400, "`top_logprobs` must be left out"),
        ({"frequency_penalty": 0.5}, 400, "`frequency_penalty` must be left out"),
        ({"messages": []}, 400, "`messages`"),
        ({"messages": None}, 400, "`messages`"),
        ({"messages": "hello"}, 400, "`messages`"),
        ({"messages": [{"content": "hello"}]}, 400, "`messages.0.role`"),
        ({"messages": [{"role": "user"}]}, 400, "`content`"),
        ({"messages": [{"role": "wizard", "content": "hello"}]}, 400, "'wizard'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "'image_url'"),
        ({"messages": [{"role": "system", "content": "Be brief."}]}, 400, "System role"),
        ({"messages": [{"role": "user", "content": "a <[MASK]> b"}]}, 400, "/v1/completions fills blanks"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, 400, "the model has 512 positions"),
        ({"model": "another"}, 404, "'another'"),
        ({"no_such_field": 1}, 400, "`no_such_field` is not a field"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_requests_get_a_reason(server, change, status, reason, stream):
    actual, text, headers = server.post({"model": NAME, "messages": user("hello"), "stream": stream, **change})
    error = json.loads(text)["error"]
    assert actual == status and reason in error["message"] and error["type"] == "invalid_request_error", error
    assert headers["x-request-id"]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"prompt": ""}, None),  # BOS alone is a prompt
        ({"prompt": []}, "`prompt`"),
        ({"prompt": [10**6]}, "`prompt` must have token ids below"),
        ({"prompt": "a<[MASK]*0>"}, "at least one token"),
        ({"max_tokens": 0}, "for a prompt without blanks"),
        ({"suffix": " b"}, "`suffix` must come with a `max_tokens`"),
        ({"suffix": " b", "prompt": "a<[MASK]>", "max_tokens": 1}, "`suffix` needs a prompt without blanks"),
        ({"suffix": " b", "echo": True, "max_tokens": 1}, "`echo` must not be true"),
        ({"prompt": "a<[MASK]>", "echo": False}, "`echo` must not be false"),
        ({"best_of": 4}, "`best_of` must be left out"),
        ({"logprobs": 1}, "`logprobs` must be left out or 0"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_completions_get_a_reason(server, change, reason):
    status, text, _ = server.post({"model": NAME, "prompt": "Today", **change}, "/v1/completions")
    assert (status, reason) == (200, None) or (status == 400 and reason in json.loads(text)["error"]["message"]), text


@pytest.mark.parametrize("body", [b"{nope", b"", b"[]", b'"hello"', b"\xff\xfe", b'{"messages": NaN}'])
def test_malformed_bodies_get_a_reason(server, body):
    status, text, _ = server.post(body)
    assert status == 400 and json.loads(text)["error"]["message"]


def test_a_body_beyond_the_limit_is_refused(server):
    status, text, _ = server.post({"messages": user("x" * 2**21)})
    assert status == 413 and "1048576 bytes" in json.loads(text)["error"]["message"]
    status, text, _ = server.get("/v1/chat/completions")
    assert status == 405 and json.loads(text)["error"]["message"]


def test_a_client_that_sends_half_a_body_holds_nobody_up(server, generated):
    connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    assert ask(server, QUESTIONS[2]) == generated(user(QUESTIONS[2]))[0]
    connection.close()


def test_texts_of_characters_that_take_several_tokens():
    from illada.serving.settled import SettledText

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    text = "a 日本 \U0001f600 é"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    settled, seen = SettledText(tokenizer), []
    for token in tokens:
        settled.append([token])
        seen.append(settled.text)
        assert text.startswith(settled.text)
    settled.finish()
    assert settled.text == text and len(tokens) > len(text) and len(set(seen)) > 4


def test_options_are_listed_and_unknown_ones_refused():
    help_text = CliRunner().invoke(command, ["serve", "--help"], env={"COLUMNS": "200"}).output
    for option in (
        "--model",
        "--host",
        "--port",
        "--device",
        "--dtype",
        "--preset",
        "--api-key",
        "--max-waiting",
        "--max-rows",
        "--max-tokens",
        "--max-prompt-tokens",
        "--max-body-kib",
        "--timeout",
        "--stop-timeout",
        "--allow-origin",
        "--name",
    ):
        assert option in help_text
    for options in (["--continuous-batching"], ["--compile"], ["--port", "99999"], ["--port", "0"]):
        result = CliRunner().invoke(command, ["serve", *options])
        assert 2 in (result.exit_code, getattr(result.exception, "exit_code", None)), options


def test_what_is_wrong_is_said_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr(
        "illada.commands.options.ModelOptions.load", lambda *_, **__: pytest.fail("the model is loaded")
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options, reason in (
            (["serve", "--preset", "quick"], "quick"),
            (["serve", "--port", str(port)], f"127.0.0.1:{port}"),
            (["demo", "--port", str(port)], f"127.0.0.1:{port}"),
            (["serve", "--host", "192.0.2.1"], "192.0.2.1"),
            (["serve", "--host", "no host"], "'no host'"),
        ):
            result = CliRunner().invoke(command, options)
            assert result.exit_code != 0 and reason in str(result.exception) + result.output, options


def test_a_server_finishes_its_answers_before_it_ends(tmp_path, generated):
    """SIGTERM while an answer is streamed: the rest of it comes, and then the process ends without a word."""
    with ProcessServer(tmp_path / "log", "--name", "short", "--max-new-tokens", "3") as server:
        assert [model.id for model in server.client.models.list()] == ["short"]
        assert server.client.completions.create(model="short", prompt="Today").usage.completion_tokens == 3
        stream = iter(server.client.completions.create(model="short", prompt="Today", max_tokens=300, stream=True))
        text = next(stream).choices[0].text
        server.process.send_signal(signal.SIGTERM)
        text += "".join(chunk.choices[0].text for chunk in stream)
        assert text == generated("Today", max_new_tokens=300)[0]
        assert server.process.wait(60) in (0, -signal.SIGTERM)  # newer uvicorn raises the signal again at its end
        assert "Traceback" not in server.log.read_text()


def test_the_lines_of_the_docs_work_as_they_are_pasted(server, generated, capsys):
    if shutil.which("curl") is None:
        pytest.skip("the lines of the docs are not tried: curl is not installed")
    page = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
    section = page[page.index("\n## Server\n") : page.index("\n## Command line\n")]
    blocks = re.findall(r"```(sh|py)\n(.*?)```", section.replace("http://127.0.0.1:8000", server.url), re.DOTALL)
    lines = [block for kind, block in blocks if kind == "sh" and block.startswith("curl ")]
    assert len(lines) >= 3
    for line in lines:
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and json.loads(done.stdout)["usage"], done
    for code in (block for kind, block in blocks if kind == "py"):
        exec(code, {"openai": openai})
        assert generated(user("Sort the numbers: 17 4 9"))[0] in capsys.readouterr().out


def test_the_calls_of_a_chat_page(server, generated):
    """As Open WebUI makes them: the list of models, a stream with usage, and a title in between."""
    client = server.client
    [model] = client.models.list()
    stream = client.chat.completions.create(
        model=model.id,
        messages=[{"role": "user", "content": [{"type": "text", "text": QUESTIONS[0]}]}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == generated(user(QUESTIONS[0]))[0]
    assert chunks[-1].usage.completion_tokens
    title = client.chat.completions.create(
        model=model.id, messages=user(QUESTIONS[1]), stream=False, max_completion_tokens=20
    )
    assert title.choices[0].message.content
