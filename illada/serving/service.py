"""What the endpoints share: one model under one name, the thread that runs it, and the limits of the server."""

import asyncio
import functools
import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from transformers import PreTrainedTokenizerBase

from ..continuous_batching import QueueFull
from ..engine import RequestResult
from .composing import Composer
from .errors import ApiError
from .metrics import Metrics
from .worker import Progress, TextRequest, Worker

logger = logging.getLogger(__name__)

PATIENCE = 60
"""Seconds that a client may take to send its request, where there is no time-out."""


@dataclass
class ServerOptions:
    """How the application meets its clients.

    Args:
        api_key (`str`, *optional*): that every request below `/v1` must bring.
        timeout (`float`, *optional*): seconds after which a request is given up.
        max_body_bytes (`int`): size of the largest body.
        allowed_origins (`list[str]`): whose pages a browser may let in.
        max_prompt_tokens (`int`, *optional*): of the longest prompt; if absent, as far as the context goes.
    """

    api_key: str | None = None
    timeout: float | None = None
    max_body_bytes: int = 2**20
    allowed_origins: list[str] = field(default_factory=list)
    max_prompt_tokens: int | None = None


class Service:
    """One model as the endpoints see it. Handlers queue and listen; the worker's thread runs the model.

    Args:
        worker: that writes.
        tokenizer: of its model.
        name: of the model, for clients.
    """

    def __init__(self, worker: Worker, tokenizer: PreTrainedTokenizerBase, name: str, options: ServerOptions):
        self.worker, self.tokenizer, self.name, self.options = worker, tokenizer, name, options
        self.created = int(time.time())
        self.composer = Composer(worker, tokenizer, options.max_prompt_tokens)
        self.metrics = Metrics(worker)
        # Long prompts are encoded beside the event loop; in one thread, since a tokenizer is not for several.
        self._encoding = ThreadPoolExecutor(1, "illada-encoding")

    def close(self):
        self.worker.close()
        self._encoding.shutdown()

    async def check_key(self, http: Request):
        """Raises an [`ApiError`] unless the request brings the key that the server asks for."""
        given = http.headers.get("authorization", "").removeprefix("Bearer ")
        key = self.options.api_key
        if key is not None and not secrets.compare_digest(given.encode("latin-1"), key.encode()):
            raise ApiError(401, "The API key is missing or wrong.", code="invalid_api_key")

    def check_model(self, name: str | None):
        """Raises an [`ApiError`] if a request names another model."""
        if name not in (None, self.name):
            raise ApiError(404, f"`model` must be {self.name!r}, got {name!r}.", "model", "model_not_found")

    async def encode(self, function: Callable, *arguments) -> Any:
        """What `function` returns, which may use the tokenizer: it is called in the one thread for that."""
        return await asyncio.get_running_loop().run_in_executor(self._encoding, function, *arguments)

    async def ask_model(self, function: Callable, *arguments) -> Any:
        """What `function` returns, which may use the model: it is called in the model's thread, between two passes.

        It should be one forward pass, since everybody else waits for it.
        """
        try:
            future = self.worker.call(functools.partial(function, *arguments))
        except QueueFull as error:
            raise _queue_is_full() from error
        return await asyncio.wrap_future(future)

    def submit(self, requests: list[TextRequest], count_field: str = "n"):
        """Queues texts. Raises an [`ApiError`] if the queue is too full."""
        if len(requests) > self.worker.max_waiting:
            limit = self.worker.max_waiting
            raise ApiError(400, f"A request must ask for at most {limit} texts, got {len(requests)}.", count_field)
        try:
            self.worker.submit(requests)
        except QueueFull as error:
            raise _queue_is_full() from error

    async def write(self, request: TextRequest) -> RequestResult:
        """Has a text written, and returns what became of it; it is cancelled with the task that waits for it.

        Raises:
            Exception: what made it fail.
        """
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def settle(error: Exception | None):
            if done.cancelled():
                return
            done.set_result(request.request.result) if error is None else done.set_exception(error)

        def listen(progress: Progress):
            if progress.is_finished:
                loop.call_soon_threadsafe(settle, progress.error)

        request.listener = listen
        self.submit([request])
        try:
            return await done
        finally:
            request.cancel()

    async def until_gone(self, http: Request, work: asyncio.Task) -> Any:
        """What `work` returns; it is cancelled when its client hangs up, or its time is up.

        Raises:
            ApiError: 504 if the time is up, 499 if nobody is left to read the answer.
        """
        leaving = asyncio.create_task(client_has_gone(http))
        try:
            await asyncio.wait([work, leaving], timeout=self.options.timeout, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            raise ApiError(499, "The client has gone.") if leaving.done() else self.time_is_up()
        finally:
            leaving.cancel()
            work.cancel()

    def time_is_up(self) -> ApiError:
        return ApiError(504, f"The request took longer than {self.options.timeout:g} seconds.")


async def client_has_gone(http: Request):
    """Returns when the client has hung up."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def log_failure(request_id: str, error: Exception) -> ApiError:
    """What a client is told of a fault of the server, whose reason is in the log."""
    logger.error("Request %s failed.", request_id, exc_info=error)
    return ApiError(500, f"The server failed on request {request_id}.")


def _queue_is_full() -> ApiError:
    return ApiError(429, "Too many requests are waiting; try again later.", headers={"Retry-After": "1"})
