"""The application of `illada serve` on a real socket, in a thread of the test's process."""

import functools
import json
import math
import socket
import threading
import time
import urllib.error
import urllib.request


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

    def connect(self, body: dict, path: str = "/v1/chat/completions") -> socket.socket:
        """A connection over which a request was sent, and nothing is read yet."""
        data = json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(data)}"]
        connection = socket.create_connection(("127.0.0.1", int(self.url.rpartition(":")[2])), timeout=300)
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
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self):
        self.thread.start()
        wait_until(lambda: self.server.started, "the server does not start")
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *exception):
        self.server.should_exit = True
        self.thread.join()


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
