"""Clients of `illada serve` that misbehave, bodies that are absurd, and the ends of the server.

Whatever they do, everybody else is served, no row is lost, and the log says no more than it should.
"""

import http.client
import json
import math
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from illada import EMBEDDED_MODEL

openai = pytest.importorskip("openai", reason="the server is asked by the `openai` client, which is not installed")
pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
from http_server import (  # noqa: E402
    Gate,
    ProcessServer,
    ThreadServer,
    assert_is_quiet,
    numbers,
    reset,
    wait_until,
    wait_until_idle,
)

NAME = "illada-tiny"
PROMPT = "Today Tom has"
LONG = {"prompt": PROMPT, "max_tokens": 400, "min_new_tokens": 400}


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def gate(model):
    return Gate(model)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


@pytest.fixture
def closed(gate):
    """The gate, closed until the test opens it; it is open afterwards."""
    gate.close()
    yield gate
    gate.open()


@pytest.fixture(scope="module")
def generated(tokenizer):
    """What `generate` continues a text with, and in how many passes, by a model of its own."""
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)

    def generated(prompt: str, **settings) -> tuple[str, int]:
        ids = tokenizer(prompt)["input_ids"]
        output = model.generate(torch.tensor([ids]), return_dict_in_generate=True, **settings)
        text = tokenizer.decode(output.sequences[0, len(ids) :], skip_special_tokens=True)
        return text, int(output.num_forward_passes[0])

    return generated


@pytest.fixture
def quiet(caplog):
    """The test fails if anything is logged that an operator would look into."""
    yield
    assert [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


def complete(server, prompt: str = PROMPT, **settings) -> str:
    return server.client.completions.create(model=NAME, prompt=prompt, **settings).choices[0].text


def events(text: str) -> list[dict]:
    """The events of a stream, from the body as it came over the connection."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


# Clients


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_killed_clients_lose_no_row(model, tokenizer, closed, generated, quiet, stream):
    """Of three killed clients one is being answered, and two wait; all connections are reset."""
    body = {**LONG, "block_length": 4, "stream": stream}
    with ThreadServer(model, tokenizer, {"max_rows": 1}) as server, ThreadPoolExecutor(1) as pool:
        manager = server.worker.manager
        killed = [server.connect(body, "/v1/completions")]
        wait_until(lambda: closed.num_arrived == 1, "the first request does not begin")
        killed += [server.connect(body, "/v1/completions") for _ in range(2)]
        wait_until(lambda: manager.num_waiting == 2, "the others do not arrive")
        closed.open(6)
        wait_until(lambda: closed.num_arrived == 7, "the first is not written")
        if stream:
            seen = b""
            while b"data: " not in seen:
                seen += killed[0].recv(2**16)
        pending = pool.submit(complete, server, max_tokens=4)
        wait_until(lambda: manager.num_waiting == 3, "the last request does not arrive")
        for connection in killed:
            reset(connection)
        wait_until(lambda: len(manager._cancelled) == 3, "the server does not notice")
        closed.open()
        text, num_passes = generated(PROMPT, max_new_tokens=4)
        assert pending.result() == text
        assert closed.num_passes == 7 + num_passes  # that of the killed one which had begun, and its own
        wait_until_idle(server)


def test_connections_without_a_request_hold_nobody_up(model, tokenizer, generated, quiet):
    with ThreadServer(model, tokenizer, {"max_rows": 1}) as server:
        silent = [server.open_connection() for _ in range(50)]
        for connection in silent[:25]:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Le")
        assert complete(server, max_tokens=4) == generated(PROMPT, max_new_tokens=4)[0]
    for connection in silent:  # nor did they hold up the end of the server
        connection.close()


HEADERS = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "sent",
    [HEADERS + b"Content-Length: 1000\r\n\r\n", HEADERS + b'Transfer-Encoding: chunked\r\n\r\n8\r\n{"prompt\r\n'],
    ids=["no body", "half a body"],
)
@pytest.mark.parametrize("options", [{"timeout": 0.4}, {}], ids=["with a time-out", "without"])
def test_a_body_that_does_not_arrive_is_given_up(model, tokenizer, generated, quiet, monkeypatch, sent, options):
    monkeypatch.setattr("illada.serving.app.PATIENCE", 0.4)
    with ThreadServer(model, tokenizer, {"max_rows": 1}, **options) as server:
        connection = server.open_connection()
        connection.sendall(sent)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.status == 408 and "0.4 seconds" in json.loads(answer.read())["error"]["message"]
        assert connection.recv(1) == b""  # after the answer the connection is closed
        connection.close()


def test_a_client_that_does_not_read_loses_its_row_when_the_time_is_up(model, tokenizer, closed, generated, quiet):
    body = {**LONG, "block_length": 64, "stream": True, "stream_options": {"include_drafts": True}}
    with ThreadServer(model, tokenizer, {"max_rows": 1}, timeout=5) as server:
        server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        closed.open(40)
        silent = server.connect(body, "/v1/completions", receive_buffer=4096)
        wait_until(lambda: closed.num_arrived == 41, "the text is not written while its client does not read")
        wait_until(lambda: server.worker.manager._cancelled, "its row is not freed")
        closed.open()
        text, num_passes = generated(PROMPT, max_new_tokens=4)
        assert complete(server, max_tokens=4) == text
        assert closed.num_passes == 41 + num_passes
        wait_until_idle(server)
        silent.close()
        wait_until(lambda: not server.server.server_state.tasks, "somebody still writes to it")


def test_a_client_that_reads_late_misses_no_text(model, tokenizer, generated, quiet, monkeypatch):
    """It holds nobody up meanwhile, and what waits for it is joined."""
    monkeypatch.setattr("illada.serving.writing.Mailbox.MAX_APART", 16)
    own = {"max_tokens": 120, "min_new_tokens": 120, "block_length": 64}
    body = {**LONG, **own, "stream": True, "stream_options": {"include_drafts": True}}
    with ThreadServer(model, tokenizer, {"max_rows": 1}) as server:
        server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        late = server.connect(body, "/v1/completions", receive_buffer=4096)
        wait_until(lambda: numbers(server)["illada_rows_in_use"] == 1, "the text is not begun")
        assert complete(server, max_tokens=4) == generated(PROMPT, max_new_tokens=4)[0]
        wait_until_idle(server)
        answer = http.client.HTTPResponse(late)
        answer.begin()
        told = [event["choices"][0] for event in events(answer.read().decode())]
        text, num_passes = generated(PROMPT, max_new_tokens=120, min_new_tokens=120, block_length=64)
        assert "".join(choice["text"] for choice in told) == text and told[-1]["finish_reason"] is not None
        assert len(told) < num_passes and told[-1]["draft"]["forward_passes"] == num_passes
        late.close()


@pytest.mark.parametrize("num_texts", [1, 7])
def test_what_waits_for_a_client_is_bounded(num_texts):
    import asyncio

    from illada.serving.choices import Piece
    from illada.serving.writing import Mailbox

    async def read_late() -> list[Piece]:
        mailbox = Mailbox()
        for number in range(10_000):
            mailbox.put(Piece(number % num_texts, f"{number} ", num_passes=number, draft={"number": number}))
        for index in range(num_texts):
            mailbox.put(Piece(index, finish_reason="stop", num_passes=10_000))
        assert len(mailbox._pieces) <= Mailbox.MAX_APART + num_texts
        pieces = [await mailbox.get() for _ in range(len(mailbox._pieces))]
        waiting = asyncio.create_task(mailbox.get())
        await asyncio.sleep(0)
        assert not waiting.done()
        mailbox.put(Piece(3))
        assert (await waiting).index == 3
        return pieces

    pieces = asyncio.run(read_late())
    for index in range(num_texts):
        own = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in own) == "".join(f"{n} " for n in range(index, 10_000, num_texts))
        assert [piece.finish_reason for piece in own] == [None] * (len(own) - 1) + ["stop"]
        assert own[-1].draft["number"] == max(range(index, 10_000, num_texts)) and own[-1].num_passes == 10_000


def test_a_stream_that_takes_too_long_ends_with_an_error(model, tokenizer, closed, quiet):
    with ThreadServer(model, tokenizer, {"max_rows": 1}, timeout=0.3) as server:
        status, text, _ = server.post({**LONG, "stream": True}, "/v1/completions")
        assert status == 200 and "0.3 seconds" in events(text)[-1]["error"]["message"]
        closed.open()
        wait_until_idle(server)


# Bodies


HALF = "\ud83d"  # of a surrogate pair; JSON can spell it, and UTF-8 cannot


@pytest.mark.parametrize(
    "path, body",
    [
        ("/v1/completions", {"prompt": HALF}),
        ("/v1/completions", {"prompt": ["a", HALF]}),
        ("/v1/completions", {"prompt": "a", "suffix": HALF, "max_tokens": 1}),
        ("/v1/completions", {"prompt": "a", "stop": HALF}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": HALF}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]}),
        ("/v1/infill", {"text": f"{HALF}<[MASK]>"}),
        ("/v1/revise", {"text": f"a {HALF} b", "fraction": 0.5}),
        ("/v1/completions", {"prompt": "a", HALF: 1}),
        ("/v1/completions", {"prompt": "a", "model": HALF}),
        ("/v1/completions", {"prompt": "<[MASK]*1000000000>"}),
        ("/v1/completions", {"prompt": f"<[MASK]*{'1' * 5000}>"}),
        ("/v1/completions", {"prompt": "<[MASK]*1000000>" * 1000}),
        ("/v1/completions", {"prompt": "a", "suffix": "<[MASK]*1000000000>", "max_tokens": 1}),
        ("/v1/completions", {"prompt": "a", "suffix": "b", "max_tokens": 10**15}),
        ("/v1/infill", {"text": "<[MASK]*1000000000>"}),
        ("/v1/completions", {"prompt": [None] * 150_000}),
        ("/v1/completions", {"prompt": [[]] * 250_000}),
        ("/v1/completions", {"prompt": ["a", *[3] * 300_000]}),
        ("/v1/completions", {"prompt": ["a"] * 129}),
        ("/v1/chat/completions", {"messages": [{}] * 250_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}] * 20_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{}] * 250_000}]}),
        ("/v1/completions", {"prompt": "a", "stop": [0] * 300_000}),
        ("/v1/completions", {"prompt": "a", "suppress_tokens": [7] * 300_000}),
        ("/v1/completions", {"prompt": "a", "bad_words_ids": [[7]] * 150_000}),
        ("/v1/completions", {"prompt": "a", "logit_bias": {str(n): "x" for n in range(60_000)}}),
        ("/v1/completions", {"prompt": "a", "guidance_scale": 1e308}),
        ("/v1/completions", {"prompt": "a"} | {f"field{n}": 1 for n in range(60_000)}),
        ("/v1/completions", {"prompt": "a", "n": 10**400}),
        ("/v1/completions", {"prompt": "a", "temperature": math.nan}),
        ("/v1/completions", {"prompt": "a", "temperature": math.inf}),
        ("/v1/completions", {"prompt": "a", "confidence_threshold": math.nan}),
    ],
    ids=lambda value: str(value).encode("ascii", "replace").decode()[:60] if isinstance(value, dict) else "",
)
def test_absurd_bodies_are_refused_at_once(faulty, path, body):
    """Without a pass, and with as few faults listed as there is room for."""
    manager = faulty.worker.manager
    passes = manager.engine.num_passes
    data = json.dumps({"max_tokens": 1, **body} if path == "/v1/completions" else body).encode()
    assert len(data) < 2**20
    status, text, _ = faulty.post(data, path)
    error = json.loads(text)["error"]
    assert status in (400, 404) and error["type"] == "invalid_request_error" and error["message"], text
    assert len(text) < 2000 and manager.engine.num_passes == passes


@pytest.fixture(scope="module")
def faulty(model, tokenizer):
    with ThreadServer(model, tokenizer) as server:
        yield server


DEEP = 10_000


@pytest.mark.parametrize("depth", [100, 900, DEEP])
@pytest.mark.parametrize("field", ["messages", "tools", "confidence_threshold", "logit_bias", None])
def test_deeply_nested_bodies_are_refused(faulty, field, depth):
    deep = b"[" * depth + b"]" * depth
    body = deep if field is None else b'{"messages": [{"role": "user", "content": "a"}], "%s": %s}'
    status, text, _ = faulty.post(body if field is None else body % (field.encode(), deep))
    assert status == 400 and json.loads(text)["error"]["message"] and len(text) < 2500


@pytest.mark.parametrize("number", ["1" + "0" * 5000, "-1e400", "1e400", "NaN", "-Infinity"])
@pytest.mark.parametrize(
    "field", ["max_tokens", "temperature", "top_p", "block_length", "confidence_threshold", "top_k"]
)
def test_numbers_beyond_all_measure_are_refused(faulty, field, number):
    status, text, _ = faulty.post(b'{"prompt": "a", "%s": %s}' % (field.encode(), number.encode()), "/v1/completions")
    assert status == 400 and json.loads(text)["error"]["message"], text


# The server as a process


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    with ProcessServer(tmp_path_factory.mktemp("log") / "log", "--max-rows", "2") as server:
        yield server
        wait_until_idle(server)
        assert_is_quiet(server)


@pytest.mark.parametrize("is_chunked", [False, True], ids=["Content-Length", "chunked"])
def test_a_body_of_50_mb_is_refused_and_not_kept(process, is_chunked):
    psutil = pytest.importorskip("psutil", reason="the server's memory is not measured: psutil is not installed")
    piece, count = b"x" * 2**20, 50
    server = psutil.Process(process.process.pid)
    assert complete(process, max_tokens=1)
    before = server.memory_info().rss
    connection = process.open_connection()
    length = b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: %d" % (count * len(piece))
    connection.sendall(HEADERS + length + b"\r\n\r\n")
    for _ in range(count):
        connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece) if is_chunked else piece)
    if is_chunked:
        connection.sendall(b"0\r\n\r\n")
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    assert answer.status == 413 and "1048576 bytes" in json.loads(answer.read())["error"]["message"]
    connection.close()
    assert server.memory_info().rss - before < 16 * 2**20


@pytest.mark.slow
def test_a_second_server_on_the_same_port_says_so(process):
    port = process.url.rpartition(":")[2]
    second = subprocess.run(
        [sys.executable, "-m", "illada", "serve", "--port", port], capture_output=True, text=True, timeout=300
    )
    assert second.returncode in (1, 2) and second.stdout == ""
    assert len(second.stderr.strip().splitlines()) == 1 and f"127.0.0.1:{port}" in second.stderr
    assert process.get("/health")[0] == 200


@pytest.mark.slow
def test_sigterm_under_load(tmp_path, generated):
    """Two are being written and three wait: all are finished, the next is refused, and the process ends with 0."""
    with ProcessServer(tmp_path / "log", "--max-rows", "2") as server, ThreadPoolExecutor(5) as pool:
        silent = server.open_connection()
        silent.sendall(b"POST /v1/completions HTTP/1.1\r\n")
        budgets, pending = (80, 81, 82, 90, 91), []
        for number, budget in enumerate(budgets):
            how = streamed if number > 2 else complete
            own = {"max_tokens": budget, "extra_body": {"min_new_tokens": budget}}
            pending.append(pool.submit(how, server, **own))

        def all_have_arrived() -> bool:
            now = numbers(server)
            return now["illada_rows_in_use"] == 2 and now["illada_requests_waiting"] == 3

        wait_until(all_have_arrived, "the requests do not arrive")
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "Shutting down" in server.log.read_text(), "the server does not heed the signal")
        wait_until(lambda: is_refused(server), "new connections are taken")
        server.process.send_signal(signal.SIGTERM)  # which changes nothing
        texts = [request.result() for request in pending]
        assert texts == [generated(PROMPT, max_new_tokens=n, min_new_tokens=n)[0] for n in budgets]
        assert server.process.wait(60) == 0
        silent.close()
    assert_is_quiet(server)


def streamed(server, **settings) -> str:
    chunks = server.client.completions.create(model=NAME, prompt=PROMPT, stream=True, **settings)
    return "".join(chunk.choices[0].text for chunk in chunks)


def is_refused(server) -> bool:
    try:
        server.open_connection().close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("how", ["a second Ctrl-C", "the stop timeout"])
def test_a_server_that_does_not_wait_ends_cleanly(tmp_path, how):
    """Answers under way are cut, and the log says no more than that."""
    options = ["--stop-timeout", "1"] if how == "the stop timeout" else []
    with ProcessServer(tmp_path / "log", "--max-rows", "1", *options) as server:
        body = {**LONG, "n": 64}
        cut = [server.connect({**body, "stream": stream}, "/v1/completions") for stream in (False, True)]
        wait_until(lambda: numbers(server)["illada_requests_waiting"] == 127, "the requests do not arrive")
        server.process.send_signal(signal.SIGTERM if options else signal.SIGINT)
        if not options:
            wait_until(lambda: "Waiting for connections" in server.log.read_text(), "the signal is not heeded")
            server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == (0 if options else 130)
        for connection in cut:
            connection.close()
    log = server.log.read_text()
    assert "Traceback" not in log and len([line for line in log.splitlines() if line.startswith("ERROR")]) <= 3, log
