"""`illada serve`: the server of `transformers serve`, with the models of this package.

The server, its endpoints and its options are Transformers'. At its edge it is told what it cannot know of these
models, and its answers to bad requests are made 4xx:

- It finds a class outside its own tables as an attribute of `transformers`, and lists the models of the Hub's cache
  alone: here one model is served, by its name.
- It gives every request without a budget 1,024 tokens, whatever the model's context: here, the checkpoint's budget.
- It answers 500 to what `generate` and the chat template refuse, or 200 and an error inside the stream: here they are
  asked first, and their reason comes with a 400.
- It finishes a plain answer whose client has gone: here the generation ends at its next step.

Needs the extra `serve`; import this module when a server is wanted.
"""

import asyncio
import threading
import time
from pathlib import Path
from typing import Annotated, Literal

import transformers
import typer
from fastapi import HTTPException
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from pydantic import BaseModel, Field, ValidationError
from transformers.cli.serve import Serve
from transformers.cli.serving import chat_completion, completion, model_manager, response, server, utils

from . import ILLaDAForCausalLM, LLaDAModelLM
from .text.loading import locate

_BUDGETS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "generation_config")


def run_server(arguments: list[str]):
    """Serves until interrupted. `arguments` are those of `transformers serve`, and may leave the model out.

    Raises:
        ValueError: if the model is neither a folder nor a Hub id.
    """
    context = server_context(arguments)
    for model_class in (ILLaDAForCausalLM, LLaDAModelLM):
        setattr(transformers, model_class.__name__, model_class)
    # `Serve` looks its parts up in these modules when it is called.
    chat_completion.ChatCompletionHandler = ChatHandler
    completion.CompletionHandler = CompletionHandler
    response.ResponseHandler = ResponseHandler
    model_manager.ModelManager = OneModelManager
    utils.GenerateManager = CheckedGenerateManager
    server.build_server = build_server
    context.command.invoke(context)


def server_context(arguments: list[str]):
    """The parsed arguments of `transformers serve`, as its command's context, with a model in any case."""
    app = typer.Typer(add_completion=False)
    app.command(name="illada serve")(Serve)
    context = typer.main.get_command(app).make_context("illada serve", list(arguments))
    context.params["force_model"] = locate(context.params["force_model"])
    return context


class OneModelManager(model_manager.ModelManager):
    """Serves one model, whose name is that of its folder, or its Hub id."""

    @property
    def name(self) -> str:
        folder = Path(self.force_model)
        return folder.resolve().name if folder.is_dir() else self.force_model

    def get_gen_models(self) -> list[dict]:
        owner = self.name.rpartition("/")[0]
        return [{"id": self.name, "object": "model", "created": int(time.time()), "owned_by": owner}]


class _TextPart(BaseModel):
    type: Literal["text", "input_text", "output_text"]
    text: str


class _Message(BaseModel):
    role: str
    content: str | list[_TextPart] | None = None


class _Conversation(BaseModel):
    messages: Annotated[list[_Message], Field(min_length=1)]


class _Handler:
    """Answers 4xx and the reason, in OpenAI's form, to what the handler, the chat template or `generate` refuses."""

    async def handle_request(self, body: dict, request_id: str):
        try:
            return await super().handle_request(body, request_id)
        except HTTPException as error:
            status, reason = error.status_code, error.detail
        except LookupError as error:
            status, reason = 400, f"The request has no {error}."
        except (ValueError, TypeError, TemplateError) as error:
            status, reason = 400, str(error)
        return JSONResponse({"error": {"message": reason, "type": "invalid_request_error"}}, status)

    def _resolve_model(self, body: dict):
        name = self.model_manager.name
        if body.get("model") not in (None, name, self.model_manager.force_model):
            raise HTTPException(404, detail=f"This server has the model {name!r}, got {body['model']!r}.")
        body["model"] = self.model_manager.force_model
        _, model, processor = super()._resolve_model(body)
        return name, model, processor

    def _build_generation_config(self, body: dict, model_generation_config, use_cb: bool = False):
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        if all(body.get(name) is None for name in _BUDGETS):
            config.max_new_tokens = model_generation_config.max_new_tokens
        if body.get("temperature"):
            config.do_sample = True
        return config


class ChatHandler(_Handler, chat_completion.ChatCompletionHandler):
    def _validate_request(self, body: dict):
        super()._validate_request(body)
        try:
            _Conversation.model_validate(body)
        except ValidationError as error:
            reasons = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            raise ValueError("; ".join(reasons)) from error


class CompletionHandler(_Handler, completion.CompletionHandler):
    pass


class ResponseHandler(_Handler, response.ResponseHandler):
    pass


class _Settled(Exception):
    """Ends a call of `generate` whose arguments have passed its checks."""


class _Abandoned(Exception):
    """Ends a call of `generate` whose answer nobody waits for."""


class _StopAtPrompt:
    def put(self, value):
        raise _Settled

    end = put


def check_arguments(model, **arguments):
    """Raises what `generate` raises for these arguments before it hands the prompt to its streamer."""
    try:
        model.generate(**arguments, streamer=_StopAtPrompt())
    except _Settled:
        pass


class CheckedGenerateManager(utils.GenerateManager):
    """Checks a request before its answer begins, and ends the work on answers that nobody waits for."""

    def generate_streaming(self, model, processor, inputs, gen_config, *arguments, **named):
        check_arguments(model, **inputs, generation_config=gen_config, tokenizer=processor)
        return super().generate_streaming(model, processor, inputs, gen_config, *arguments, **named)

    async def generate_non_streaming(self, model, processor, inputs, gen_config, *arguments, **named):
        check_arguments(model, **inputs, generation_config=gen_config, tokenizer=processor)
        abandoned = threading.Event()

        def stop_if_abandoned(step):
            if abandoned.is_set():
                raise _Abandoned

        inputs = {**inputs, "on_step": stop_if_abandoned}
        answer = asyncio.ensure_future(
            super().generate_non_streaming(model, processor, inputs, gen_config, *arguments, **named)
        )
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            abandoned.set()
            answer.add_done_callback(lambda done: done.exception())  # or else it is logged as lost
            raise


class CancelOnDisconnect:
    """ASGI middleware that cancels the work on a request whose client has gone."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        messages: asyncio.Queue = asyncio.Queue()

        async def watch():
            while True:
                message = await receive()
                messages.put_nowait(message)
                if message["type"] == "http.disconnect":
                    return

        work = asyncio.ensure_future(self.app(scope, messages.get, send))
        watcher = asyncio.ensure_future(watch())
        await asyncio.wait([work, watcher], return_when=asyncio.FIRST_COMPLETED)
        watcher.cancel()
        if not work.done():
            work.cancel()
        try:
            await work
        except asyncio.CancelledError:
            pass  # nobody is left to answer


_build_server = server.build_server


def build_server(*arguments, **named):
    """The server's app, which cancels the work on requests whose client has gone."""
    app = _build_server(*arguments, **named)
    app.add_middleware(CancelOnDisconnect)
    return app
