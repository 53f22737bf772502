"""`illada serve`: the real server process on loopback, asked by the `openai` client and by clients that misbehave."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from processes import heed_interrupts
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from illada import EMBEDDED_MODEL
from illada.commands.main import app

openai = pytest.importorskip("openai", reason="needs the extra serve")
pytest.importorskip("fastapi", reason="needs the extra serve")
psutil = pytest.importorskip("psutil", reason="needs psutil, which accelerate installs")
serving = pytest.importorskip("illada.serving", reason="needs the extra serve")

QUESTIONS = [f"Tom has {n} apples. He buys {n + 2} more. How many apples does Tom have now?" for n in range(2, 10)]
LONG = 192  # tokens of an answer that takes a while


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The embedded model without an EOS, so that an answer is as long as its budget."""
    folder = tmp_path_factory.mktemp("served") / "talker"
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.generation_config.max_new_tokens = 20
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED_MODEL).save_pretrained(folder)
    return folder


class Server:
    """A process of `illada serve`."""

    def __init__(self, folder, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "illada", "serve", *options, str(folder)],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            preexec_fn=heed_interrupts,
        )
        deadline = time.monotonic() + 300
        while not self.is_healthy():
            assert self.process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)

    def is_healthy(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200
        except OSError:
            return False

    def client(self):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    def post(self, body: bytes, path: str = "/v1/chat/completions") -> tuple[int, str]:
        """Status and text of the answer to a body that no client would send."""
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    server = Server(checkpoint, tmp_path_factory.mktemp("log") / "server.log")
    yield server
    if server.process.poll() is None:
        server.process.kill()
    server.process.wait(60)


@pytest.fixture(scope="module")
def answers(checkpoint) -> dict[tuple[str, int], str]:
    """What `generate` answers in 6 and in 20 tokens."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    answers = {}
    for question in QUESTIONS:
        inputs = tokenizer.apply_chat_template(
            user(question), add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        for budget in (6, 20):
            output = model.generate(inputs["input_ids"], max_new_tokens=budget)
            answers[question, budget] = tokenizer.decode(
                output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
    return answers


def user(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


def ask(client, question: str, stream: bool = False, **settings) -> str:
    completion = client.chat.completions.create(model="talker", messages=user(question), stream=stream, **settings)
    if not stream:
        return completion.choices[0].message.content
    return "".join(chunk.choices[0].delta.content or "" for chunk in completion)


@pytest.mark.parametrize(
    "arguments", [["--port", "9"], ["{}", "--port", "9"], ["--port", "9", "{}"], ["--port=9", "{}"]]
)
def test_the_model_may_be_left_out_or_stand_anywhere(checkpoint, monkeypatch, arguments):
    contexts = []
    monkeypatch.setattr(serving, "run_server", lambda arguments: contexts.append(serving.server_context(arguments)))
    result = CliRunner().invoke(app, ["serve", *(argument.format(checkpoint) for argument in arguments)])
    assert result.exit_code == 0, result.exception
    model = str(checkpoint) if "{}" in arguments else str(EMBEDDED_MODEL)
    assert contexts[0].params["force_model"] == model and contexts[0].params["port"] == 9


def test_the_model_is_listed(server):
    assert [model.id for model in server.client().models.list()] == ["talker"]


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_an_answer_is_generates(server, answers, stream):
    assert ask(server.client(), QUESTIONS[0], stream) == answers[QUESTIONS[0], 20]  # the checkpoint's own budget
    assert ask(server.client(), QUESTIONS[0], stream, max_tokens=6) == answers[QUESTIONS[0], 6]


def test_usage_and_the_reason_of_the_end(server):
    completion = server.client().chat.completions.create(
        model="talker", messages=user(QUESTIONS[0]), max_completion_tokens=6
    )
    assert completion.choices[0].finish_reason == "length" and completion.usage.completion_tokens == 6


def test_a_temperature_samples(server):
    draws = {ask(server.client(), QUESTIONS[0], temperature=2.0, seed=seed) for seed in (1, 1, 2)}
    assert len(draws) == 2


def test_200_requests_of_8_clients(server, answers):
    def converse(number: int) -> list[tuple[str, str]]:
        client = server.client()
        return [
            (ask(client, question, stream=(turn + number) % 2 == 0, max_tokens=6), answers[question, 6])
            for turn in range(25)
            for question in [QUESTIONS[(turn + number) % 8]]
        ]

    def resident() -> int:
        return psutil.Process(server.process.pid).memory_info().rss

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(lambda number: ask(server.client(), QUESTIONS[number], max_tokens=6), range(8)))
        before = resident()
        pairs = [pair for each in clients.map(converse, range(8)) for pair in each]
    grown = resident() - before
    assert len(pairs) == 200 and all(actual == expected for actual, expected in pairs)
    print(f"200 answers; the server grew by {grown / 2**20:.1f} MiB")
    assert grown < 64 * 2**20


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_clients_that_hang_up_free_their_work(server, stream):
    start = time.monotonic()
    ask(server.client(), QUESTIONS[0], max_tokens=LONG)
    whole_answer = time.monotonic() - start

    body = json.dumps({"model": "talker", "messages": user(QUESTIONS[0]), "max_tokens": LONG, "stream": stream})
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
    request = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", body]).encode()
    quitters = [socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) for _ in range(6)]
    for connection in quitters:
        connection.sendall(request)
    if stream:
        assert b"200 OK" in quitters[0].recv(1000)
    else:
        time.sleep(whole_answer / 4)  # all are received, and the first is being answered
    for connection in quitters:
        connection.close()
    start = time.monotonic()
    ask(server.client(), QUESTIONS[0], max_tokens=1)
    assert time.monotonic() - start < whole_answer


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize(
    "change, status, reason",
    [
        ({"max_tokens": 10**9}, 400, "512 positions"),
        ({"max_tokens": -1}, 400, "max_new_tokens"),
        ({"max_tokens": 0}, 400, "must be positive"),
        ({"max_tokens": "many"}, 400, "many"),
        ({"max_tokens": {}}, 400, "dict"),
        ({"temperature": -1}, 400, "temperature"),
        ({"stop": [""]}, 400, "stop_strings"),
        ({"generation_config": '{"num_beams": 4}'}, 400, "num_beams"),
        ({"messages": []}, 400, "messages"),
        ({"messages": None}, 400, "messages"),
        ({"messages": "hello"}, 400, "messages"),
        ({"messages": [{"content": "hello"}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "content"),
        ({"messages": [{"role": "system", "content": "Be brief."}]}, 400, "System role"),
        ({"model": "another"}, 404, "another"),
        ({"model": 3}, 404, "talker"),
        ({"no_such_field": 1}, 422, "no_such_field"),
    ],
    ids=str,
)
def test_bad_requests_get_a_reason(server, change, status, reason, stream):
    body = {"model": "talker", "messages": user("hello"), "stream": stream, **change}
    actual, text = server.post(json.dumps(body).encode())
    assert actual == status and reason in json.loads(text)["error"]["message"]


@pytest.mark.parametrize("body", [b"{nope", b"", b"[]", b'"hello"', b"\xff\xfe"])
def test_malformed_bodies_get_a_reason(server, body):
    status, text = server.post(body)
    assert status in (400, 422) and json.loads(text)["detail"]


def test_the_client_library_sees_its_own_errors(server):
    with pytest.raises(openai.BadRequestError, match="512 positions"):
        ask(server.client(), QUESTIONS[0], stream=True, max_tokens=10**9)
    with pytest.raises(openai.NotFoundError, match="'talker'"):
        server.client().chat.completions.create(model="another", messages=user("hello"))


def test_the_server_lived_on(server, answers):
    """After all of the above, in the order of this file."""
    assert server.process.poll() is None
    assert ask(server.client(), QUESTIONS[1]) == answers[QUESTIONS[1], 20]
    assert "Traceback" not in server.log.read_text()


def test_an_interrupt_ends_it(server):
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) in (0, 130)
    assert "Traceback" not in server.log.read_text()
