"""The application of `illada serve` on a real socket, in a thread of the test's process or in one of its own."""

import functools
import json
import math
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

from processes import heed_interrupts


def wait_until(condition, what: str, seconds: float = 120):
    """Returns when `condition()` is true, which is asked often."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


class Caller:
    """Asks a server at `url`."""

    url: str

    @functools.cached_property  # making one takes as long as many answers of a small model
    def client(self):
        return self.client_with(api_key="none")

    def client_with(self, api_key: str):
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=300)

    def post(self, body: bytes | dict, path: str = "/v1/chat/completions"):
        """Status, text and headers of the answer to a body that no client would send."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        return self._open(
            urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method="POST")
        )

    def get(self, path: str, headers: dict | None = None):
        return self._open(urllib.request.Request(self.url + path, headers=headers or {}))

    def _open(self, request):
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, answer.read().decode(), answer.headers
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(), error.headers

    def open_connection(self, receive_buffer: int | None = None) -> socket.socket:
        """A connection over which nothing was sent yet."""
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", int(self.url.rpartition(":")[2])))
        return connection

    def connect(self, body: dict, path: str = "/v1/chat/completions", **options) -> socket.socket:
        """A connection over which a request was sent, and nothing is read yet."""
        data = json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(data)}"]
        connection = self.open_connection(**options)
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + data)
        return connection


class ThreadServer(Caller):
    """A context manager: the application for a model, served from a thread."""

    def __init__(self, model, tokenizer, limits: dict | None = None, **options):
        import uvicorn

        from illada.serving.app import build_app
        from illada.serving.service import ServerOptions
        from illada.serving.worker import Worker

        self.worker = Worker(model, **(limits or {}))
        app = build_app(self.worker, tokenizer, "illada-tiny", ServerOptions(**options))
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=20))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],))

    def __enter__(self):
        self.thread.start()
        wait_until(lambda: self.server.started, "the server does not start")
        return self

    def __exit__(self, *exception):
        self.server.should_exit = True
        self.thread.join()


class ProcessServer(Caller):
    """A process of `illada serve`."""

    def __init__(self, log, *options: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        self.process = subprocess.Popen(
            [sys.executable, "-m", "illada", "serve", "--port", str(port), "--device", "cpu", *options],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            preexec_fn=heed_interrupts,
        )

    def __enter__(self):
        def is_up():
            assert self.process.poll() is None, self.log.read_text()
            try:
                return self.get("/health")[0] == 200
            except OSError:
                return False

        wait_until(is_up, "the server does not come up", 300)
        return self

    def __exit__(self, *exception):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(60)


class Gate:
    """A hook before a model's forward pass: counts the passes since it was closed, and holds those after `limit`."""

    def __init__(self, model):
        self.changed = threading.Condition()
        self.num_arrived, self.num_passes, self.limit = 0, 0, math.inf
        model.register_forward_pre_hook(self)

    def __call__(self, module, arguments):
        with self.changed:
            self.num_arrived += 1
            assert self.changed.wait_for(lambda: self.num_passes < self.limit, 120), "the gate stays closed"
            self.num_passes += 1

    def close(self):
        with self.changed:
            self.num_arrived, self.num_passes, self.limit = 0, 0, 0

    def open(self, limit: float = math.inf):
        """Lets passes through until there were `limit` since the gate was closed."""
        with self.changed:
            self.limit = limit
            self.changed.notify_all()


def numbers(server) -> dict[str, float]:
    lines = [line.rpartition(" ") for line in server.get("/metrics")[1].splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def wait_until_idle(server):
    """Returns when no row is in use and nothing waits, as `/metrics` says."""

    def is_idle() -> bool:
        now = numbers(server)
        return now["illada_rows_in_use"] == now["illada_requests_waiting"] == 0

    wait_until(is_idle, "a row is lost", 60)


def reset(connection: socket.socket):
    """Ends a connection as a killed client's system does when more comes for it."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def assert_is_quiet(server):
    """Nothing in the log but its own lines: how it came up and ended, and a line for each request."""
    own = re.compile(
        r"Serving .* at http.*|INFO: +(127\.0\.0\.1:\d+ - \".*\" \d{3}.*|"
        r"Started server process.*|Waiting for (application startup|connections to close|background tasks|application "
        r"shutdown).*|Application (startup|shutdown) complete\.|Uvicorn running on .*|Shutting down|"
        r"Finished server process.*)"
    )
    lines = [line for line in server.log.read_text().splitlines() if line.strip() and not own.fullmatch(line.strip())]
    assert lines == []
