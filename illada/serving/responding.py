"""`/v1/responses`: one answer in the form of OpenAI's Responses API, whole or as events; nothing is stored."""

import itertools
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from .answers import CompletionForm, Usage
from .choices import Piece
from .errors import ApiError
from .fields import MAX_ITEMS, Body, Text, WritingFields, unsupported
from .requests import ChatBody, TextPart
from .service import Service
from .writing import answer


class Part(TextPart):
    type: Literal["input_text", "output_text"]
    annotations: unsupported([]) = None
    logprobs: unsupported([]) = None


class InputMessage(Body):
    """A message; what this server has answered may be sent back."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: unsupported() = None

    def as_chat(self) -> dict:
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class StreamOptions(Body):
    include_obfuscation: unsupported(False) = None


class TextOptions(Body):
    format: unsupported({"type": "text"}) = None
    verbosity: unsupported() = None


class ResponsesBody(WritingFields):
    """The body of `POST /v1/responses`."""

    input: Text | Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    text: TextOptions | None = None

    background: unsupported(False) = None
    context_management: unsupported([]) = None
    conversation: unsupported() = None
    include: unsupported([]) = None
    max_tool_calls: unsupported() = None
    metadata: unsupported({}) = None
    parallel_tool_calls: unsupported(True, False) = None  # says how to call tools, of which there are none
    previous_response_id: unsupported() = None
    prompt: unsupported() = None
    prompt_cache_key: unsupported() = None
    reasoning: unsupported({}) = None
    safety_identifier: str | None = None  # an end user's name, which has no meaning here
    service_tier: unsupported("auto", "default") = None
    store: unsupported(False) = None
    tool_choice: unsupported("none", "auto") = None
    tools: unsupported([]) = None
    top_logprobs: unsupported(0) = None
    truncation: unsupported("disabled") = None

    def as_chat(self) -> "AsChat":
        """The same request to chat completions."""
        messages = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        is_text = isinstance(self.input, str)
        messages += [{"role": "user", "content": self.input}] if is_text else [each.as_chat() for each in self.input]
        own = {name: getattr(self, name) for name in WritingFields.model_fields}
        return AsChat(messages=messages, max_tokens=self.max_output_tokens, stream=self.stream, **own)


class AsChat(ChatBody):
    """A request whose errors speak of the fields that it came from."""

    @property
    def budget(self) -> tuple[str, int | None]:
        return "max_output_tokens", self.max_tokens


class ResponseForm(CompletionForm):
    """The answer of `/v1/responses`: its output items are the thinking, where there is any, and one message."""

    prefix = "resp"
    kinds = {"message": "output_text", "reasoning": "reasoning_text"}

    def __init__(self, request_id: str, model: str, has_logprobs: bool):
        super().__init__(request_id, model, has_logprobs)
        self.request_id, self.items, self.numbers = request_id, [], itertools.count()
        self.finish_reason: str | None = None
        self.head = {
            "id": self.head["id"],
            "object": "response",
            "created_at": self.head["created"],
            "model": model,
            "error": None,
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
        }

    def whole(self, pieces: list[Piece], usage: Usage) -> dict:
        for piece in pieces:
            self.chunks(piece)
        return self._response(usage)

    def opening(self, num_choices: int) -> list[dict]:
        return [self._event(f"response.{name}", response=self._response()) for name in ("created", "in_progress")]

    def chunks(self, piece: Piece) -> list[dict]:
        events = []
        for kind, text in (("reasoning", piece.thought), ("message", piece.text)):
            if text or kind == "message" and piece.finish_reason and not self._is_open(kind):
                events += [] if self._is_open(kind) else self._end() + self._begin(kind)
                self.items[-1]["content"][0]["text"] += text
                events.append(self._on_part("delta", delta=text, **self._logprobs_of(kind)))
        if piece.finish_reason:
            self.finish_reason = piece.finish_reason
            events += self._end()
        return events

    def closing(self, usage: Usage, has_usage: bool) -> list[dict]:
        response = self._response(usage)
        return [self._event(f"response.{response['status']}", response=response)]

    def _response(self, usage: Usage | None = None) -> dict:
        status = {None: "in_progress", "stop": "completed", "length": "incomplete"}[self.finish_reason]
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        counts = None if usage is None else _counts(usage)
        return {**self.head, "status": status, "incomplete_details": reason, "output": self.items, "usage": counts}

    def _event(self, kind: str, **fields) -> dict:
        return {"type": kind, "sequence_number": next(self.numbers), **fields}

    def _is_open(self, kind: str) -> bool:
        return bool(self.items) and self.items[-1]["type"] == kind

    def _logprobs_of(self, kind: str) -> dict:
        return {"logprobs": []} if kind == "message" else {}

    def _on_part(self, what: str, **fields) -> dict:
        """An event about the text of the item that is being written."""
        kind, place = self.kinds[self.items[-1]["type"]], {"output_index": len(self.items) - 1, "content_index": 0}
        name = f"response.content_part.{what}" if "part" in fields else f"response.{kind}.{what}"
        return self._event(name, item_id=self.items[-1]["id"], **place, **fields)

    def _begin(self, kind: str) -> list[dict]:
        own = {"role": "assistant"} if kind == "message" else {"summary": []}
        item = {"id": f"{kind[:3]}-{self.request_id}", "type": kind, "status": "in_progress", **own, "content": []}
        part = {"type": self.kinds[kind], "text": ""}
        if kind == "message":
            part |= {"annotations": [], "logprobs": []}
        self.items.append({**item, "content": [part]})
        added = self._event("response.output_item.added", output_index=len(self.items) - 1, item=item)
        return [added, self._on_part("added", part=dict(part))]

    def _end(self) -> list[dict]:
        if not self.items:
            return []
        item = self.items[-1]
        item["status"] = "incomplete" if self.finish_reason == "length" else "completed"
        [part] = item["content"]
        text = self._on_part("done", text=part["text"], **self._logprobs_of(item["type"]))
        ended = self._on_part("done", part=part)
        return [text, ended, self._event("response.output_item.done", output_index=len(self.items) - 1, item=item)]


def _counts(usage: Usage) -> dict:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        **{name: usage.as_json()[name] for name in ("forward_passes", "tokens_per_forward")},
    }


def routes(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/responses")
    async def respond(body: ResponsesBody, http: Request) -> Response:
        try:
            return await answer(service, body.as_chat(), http, ResponseForm)
        except ApiError as error:
            if error.param == "messages":
                error.param, error.message = "input", error.message.replace("`messages`", "`input`")
            raise

    return router
