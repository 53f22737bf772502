"""The application of `illada serve` without a socket."""

import asyncio
from contextlib import AsyncExitStack

import httpx
from transformers import PreTrainedTokenizerBase

from ..generation import MaskedDiffusionGenerationMixin
from ..serving.app import build_app
from ..serving.service import ServerOptions
from ..serving.worker import Worker
from .lines import BadLine, Line, dump, parse

_HEADERS = {"content-type": "application/json"}
_NO_LIMIT = 2**62  # the number of lines under way limits what waits, and a line has a limit of its own


class Application:
    """Answers lines by the server's application, several at a time, in the event loop in which it is started.

    Args:
        model: a masked diffusion model, ready to generate.
        tokenizer: of the model.
        name (`str`): that a request's `model` must be, if it has one.
        max_rows (`int`): texts that are written at a time.
        max_tokens (`int`, *optional*): the most that rows times columns of the longest text may be.
    """

    def __init__(
        self,
        model: MaskedDiffusionGenerationMixin,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        max_rows: int,
        max_tokens: int | None = None,
    ):
        self.worker = Worker(model, max_rows, max_tokens, _NO_LIMIT)
        self.app = build_app(self.worker, tokenizer, name, ServerOptions(max_body_bytes=_NO_LIMIT))
        paths = self.app.openapi()["paths"]
        self.endpoints = frozenset(path for path, methods in paths.items() if "post" in methods)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://batch")
        self._stack, self._tasks = AsyncExitStack(), set()

    async def start(self):
        await self._stack.enter_async_context(self.app.router.lifespan_context(self.app))
        await self._stack.enter_async_context(self.client)

    async def close(self):
        """Gives up the lines that are under way, and ends the worker."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()

    async def answer(self, line: Line) -> dict:
        """The record that answers a line.

        Raises:
            RuntimeError: if the model's thread has ended, so that no line can be answered any more.
        """
        try:
            call = parse(line, self.endpoints)
        except BadLine as error:
            return line.record(error.custom_id, error=error.as_json())
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            answer = await self.client.post(call.url, content=dump(call.body), headers=_HEADERS)
        finally:
            self._tasks.discard(task)
        if answer.is_server_error and not self.worker.is_alive:
            raise RuntimeError("The thread that runs the model has ended; the log says why.")
        request_id = answer.headers["x-request-id"]
        response = {"status_code": answer.status_code, "request_id": request_id, "body": answer.json()}
        return line.record(call.custom_id, response)
