"""`/v1/chat/completions` and `/v1/completions`: texts in OpenAI's form, whole or as they settle."""

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from .answers import Answer, ChatForm, CompletionForm
from .choices import Piece
from .errors import ApiError
from .requests import ChatBody, CompletionBody, TextBody
from .service import Service, client_has_gone, log_failure
from .worker import TextRequest


def routes(service: Service) -> APIRouter:
    """The two endpoints."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat(body: ChatBody, http: Request) -> Response:
        return await answer(service, body, http, ChatForm)

    @router.post("/v1/completions")
    async def complete(body: CompletionBody, http: Request) -> Response:
        return await answer(service, body, http, CompletionForm)

    return router


class Mailbox:
    """The pieces that wait for a client. One that does not read for a while finds the rest joined, text by text."""

    MAX_APART = 256

    def __init__(self):
        self._pieces: deque[Piece] = deque()
        self._last: dict[int, Piece] = {}  # by the text's index, those that wait
        self._arrival = asyncio.Event()

    def put(self, piece: Piece):
        last = self._last.get(piece.index)
        if last is not None and len(self._pieces) >= self.MAX_APART:
            return last.extend(piece)
        self._pieces.append(piece)
        self._last[piece.index] = piece
        self._arrival.set()

    async def get(self) -> Piece:
        while not self._pieces:
            self._arrival.clear()
            await self._arrival.wait()
        piece = self._pieces.popleft()
        if self._last[piece.index] is piece:
            del self._last[piece.index]
        return piece


@dataclass
class Exchange:
    """An HTTP request that is being answered: its texts, and where their pieces arrive."""

    service: Service
    body: TextBody
    requests: list[TextRequest]
    pieces: Mailbox
    answer: Answer
    request_id: str

    def cancel(self):
        for request in self.requests:
            request.cancel()

    async def arriving(self) -> AsyncIterator[Piece]:
        """The pieces of all texts until each is finished.

        Raises:
            ApiError: if the model fails, or the time is up.
        """
        service, begun, timeout = self.service, time.monotonic(), self.service.options.timeout
        has_text = False
        while self.answer.num_open > 0:
            try:
                remaining = None if timeout is None else max(0.0, begun + timeout - time.monotonic())
                piece = await asyncio.wait_for(self.pieces.get(), remaining)
            except asyncio.TimeoutError as error:
                raise service.time_is_up() from error
            if piece.error is not None:
                raise log_failure(self.request_id, piece.error)
            if not has_text and (piece.text or piece.thought):
                has_text = True
                service.metrics.first_text_seconds.observe(time.monotonic() - begun)
            self.answer.add(piece)
            yield piece
        usage = self.answer.usage
        service.metrics.count_answer(usage.prompt_tokens, usage.completion_tokens, usage.forward_passes)

    async def whole(self) -> dict:
        """The answer, once all of it is there."""
        try:
            async for _ in self.arriving():
                pass
        finally:
            self.cancel()
        return self.answer.whole()

    async def events(self, leaving: asyncio.Task) -> AsyncIterator[str]:
        """Server-sent events: each piece as soon as it is settled."""
        form, options = self.answer.form, self.body.stream_options
        try:
            for chunk in form.opening(len(self.requests)):
                yield _event(chunk)
            async for piece in self.arriving():
                for chunk in form.chunks(piece):
                    yield _event(chunk)
            for chunk in form.closing(self.answer.usage, bool(options and options.include_usage)):
                yield _event(chunk)
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body())
        finally:
            leaving.cancel()
            self.cancel()


async def answer(service: Service, body: TextBody, http: Request, form_class: type[CompletionForm]) -> Response:
    """Has the texts written that a request asks for, and answers with them, in a form of answers."""
    service.check_model(body.model)
    loop = asyncio.get_running_loop()
    pieces = Mailbox()

    def post(piece: Piece):
        loop.call_soon_threadsafe(pieces.put, piece)

    prompts, requests = await service.encode(service.composer.compose, body, post)
    request_id = http.state.request_id
    form = form_class(request_id, service.name, body.has_logprobs)
    exchange = Exchange(service, body, requests, pieces, Answer(form, prompts, len(requests)), request_id)
    service.submit(requests)
    if not body.stream:
        return JSONResponse(await service.until_gone(http, asyncio.create_task(exchange.whole())))
    leaving = asyncio.create_task(_cancel_when_gone(http, exchange))
    return StreamingResponse(exchange.events(leaving), media_type="text/event-stream")


async def _cancel_when_gone(http: Request, exchange: Exchange):
    """Frees the rows when the client hangs up, or when the time is up, of which one that does not read never hears."""
    try:
        await asyncio.wait_for(client_has_gone(http), exchange.service.options.timeout)
    except asyncio.TimeoutError:
        pass
    exchange.cancel()


def _event(data: dict) -> str:
    name = f"event: {data['type']}\n" if "type" in data else ""
    return f"{name}data: {json.dumps(data, ensure_ascii=False)}\n\n"
