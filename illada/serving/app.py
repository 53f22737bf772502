"""The application: OpenAI's endpoints over a worker. Handlers queue and listen; the worker's thread writes."""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from transformers import PreTrainedTokenizerBase

from ..continuous_batching import QueueFull
from .answers import Answer, Piece, form_of
from .composing import Composer
from .edge import BodyLimit, RequestIds
from .errors import ApiError, install_handlers
from .requests import ChatBody, CompletionBody, TextBody
from .worker import TextRequest, Worker

logger = logging.getLogger(__name__)


@dataclass
class ServerOptions:
    """How the application meets its clients.

    Args:
        api_key (`str`, *optional*): that every request below `/v1` must bring.
        timeout (`float`, *optional*): seconds after which a request is given up.
        max_body_bytes (`int`): size of the largest body.
        allowed_origins (`list[str]`): whose pages a browser may let in.
    """

    api_key: str | None = None
    timeout: float | None = None
    max_body_bytes: int = 2**20
    allowed_origins: list[str] = field(default_factory=list)


def build_app(
    worker: Worker, tokenizer: PreTrainedTokenizerBase, name: str, options: ServerOptions | None = None
) -> FastAPI:
    """The application that serves the worker's model under `name`. The worker is closed when the application ends."""
    options = ServerOptions() if options is None else options
    api = Api(worker, tokenizer, name, options)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        await asyncio.to_thread(api.close)

    app = FastAPI(title="illada", lifespan=lifespan, docs_url=None, redoc_url=None)
    install_handlers(app)
    app.include_router(api.router)
    app.add_middleware(BodyLimit, max_bytes=options.max_body_bytes)
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=options.allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(RequestIds)
    return app


@dataclass
class Exchange:
    """An HTTP request that is being answered: its texts, and the queue in which their pieces arrive."""

    body: TextBody
    requests: list[TextRequest]
    pieces: asyncio.Queue[Piece]
    answer: Answer
    request_id: str

    def cancel(self):
        for request in self.requests:
            request.cancel()


class Api:
    """The endpoints."""

    def __init__(self, worker: Worker, tokenizer: PreTrainedTokenizerBase, name: str, options: ServerOptions):
        self.worker, self.name, self.options = worker, name, options
        self.created = int(time.time())
        self.composer = Composer(worker, tokenizer)
        # Long prompts are encoded beside the event loop; in one thread, since a tokenizer is not for several.
        self._encoding = ThreadPoolExecutor(1, "illada-encoding")
        self.router = APIRouter()
        self.router.add_api_route("/health", self.health, methods=["GET"])
        guarded = {"dependencies": [Depends(self.check_key)]}
        self.router.add_api_route("/v1/models", self.models, methods=["GET"], **guarded)
        self.router.add_api_route("/v1/models/{model:path}", self.model, methods=["GET"], **guarded)
        self.router.add_api_route("/v1/completions", self.complete, methods=["POST"], **guarded)
        self.router.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], **guarded)

    def close(self):
        self.worker.close()
        self._encoding.shutdown()

    async def check_key(self, http: Request):
        given = http.headers.get("authorization", "").removeprefix("Bearer ")
        key = self.options.api_key
        if key is not None and not secrets.compare_digest(given.encode("latin-1"), key.encode()):
            raise ApiError(401, "The API key is missing or wrong.", code="invalid_api_key")

    async def health(self) -> Response:
        is_alive = self.worker.is_alive
        return JSONResponse({"status": "ok" if is_alive else "the worker has ended"}, 200 if is_alive else 503)

    async def models(self) -> dict:
        return {"object": "list", "data": [self._card()]}

    async def model(self, model: str) -> dict:
        self._check_model(model)
        return self._card()

    async def complete(self, body: CompletionBody, http: Request) -> Response:
        return await self._answer(http, body)

    async def chat(self, body: ChatBody, http: Request) -> Response:
        return await self._answer(http, body)

    def _card(self) -> dict:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "illada"}

    def _check_model(self, name: str | None):
        if name not in (None, self.name):
            raise ApiError(404, f"`model` must be {self.name!r}, got {name!r}.", "model", "model_not_found")

    async def _answer(self, http: Request, body: TextBody) -> Response:
        self._check_model(body.model)
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece] = asyncio.Queue()

        def post(piece: Piece):
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        prompts, requests = await loop.run_in_executor(self._encoding, self.composer.compose, body, post)
        request_id = http.state.request_id
        form = form_of(body, request_id, self.name)
        exchange = Exchange(body, requests, pieces, Answer(form, prompts, len(requests)), request_id)
        self._submit(requests)
        leaving = asyncio.create_task(_cancel_when_gone(http, exchange))
        if body.stream:
            return StreamingResponse(self._events(exchange, leaving), media_type="text/event-stream")
        return await self._whole(exchange, leaving)

    def _submit(self, requests: list[TextRequest]):
        if len(requests) > self.worker.max_waiting:
            limit = self.worker.max_waiting
            raise ApiError(400, f"A request must ask for at most {limit} texts, got {len(requests)}.", "n")
        try:
            self.worker.submit(requests)
        except QueueFull as error:
            reason = "Too many requests are waiting; try again later."
            raise ApiError(429, reason, headers={"Retry-After": "1"}) from error

    async def _whole(self, exchange: Exchange, leaving: asyncio.Task) -> Response:
        collecting = asyncio.create_task(self._collect(exchange))
        await asyncio.wait([collecting, leaving], return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if not collecting.done():
            collecting.cancel()
            return Response(status_code=499)  # nobody is left to read it
        return JSONResponse(collecting.result())

    async def _collect(self, exchange: Exchange) -> dict:
        async for _ in self._pieces(exchange):
            pass
        return exchange.answer.whole()

    async def _events(self, exchange: Exchange, leaving: asyncio.Task) -> AsyncIterator[str]:
        """Server-sent events: each piece as soon as it is settled."""
        answer = exchange.answer
        try:
            for chunk in answer.form.opening(len(exchange.requests)):
                yield _event(chunk)
            async for piece in self._pieces(exchange):
                yield _event(answer.form.chunk(piece))
            if exchange.body.stream_options is not None and exchange.body.stream_options.include_usage:
                yield _event(answer.form.usage_chunk(answer.usage))
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body())
        finally:
            leaving.cancel()
            exchange.cancel()

    async def _pieces(self, exchange: Exchange) -> AsyncIterator[Piece]:
        """The pieces of all texts until each is finished.

        Raises:
            ApiError: if the model fails, or the time is up.
        """
        end = None if self.options.timeout is None else time.monotonic() + self.options.timeout
        while exchange.answer.num_open > 0:
            try:
                remaining = None if end is None else max(0.0, end - time.monotonic())
                piece = await asyncio.wait_for(exchange.pieces.get(), remaining)
            except asyncio.TimeoutError as error:
                exchange.cancel()
                raise ApiError(504, f"The request took longer than {self.options.timeout:g} seconds.") from error
            if piece.error is not None:
                exchange.cancel()
                logger.error("Request %s failed.", exchange.request_id, exc_info=piece.error)
                raise ApiError(500, f"The server failed on request {exchange.request_id}.")
            exchange.answer.add(piece)
            yield piece


async def _cancel_when_gone(http: Request, exchange: Exchange):
    """Returns when the client has hung up, after which nothing more is written for him."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    exchange.cancel()


def _event(data: dict) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
