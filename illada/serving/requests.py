"""What the endpoints accept. A field that is not here is refused, and so is one that could not be honoured."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .fields import MAX_ITEMS, Body, Text, WritingFields, unsupported


class StreamOptions(Body):
    include_usage: bool | None = None
    include_drafts: bool | None = None
    include_obfuscation: unsupported(False) = None


StopString = Annotated[str, Field(min_length=1, max_length=1000)]


class TextBody(WritingFields):
    """What chat completions and completions have in common."""

    n: int = Field(1, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    max_tokens: int | None = Field(None, ge=0)

    frequency_penalty: unsupported(0, 0.0) = None
    presence_penalty: unsupported(0, 0.0) = None

    @model_validator(mode="after")
    def _check_together(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` must come with `stream`: true")
        return self

    @property
    def budget(self) -> tuple[str, int | None]:
        """The longest answer in tokens, and the field that says so."""
        return "max_tokens", self.max_tokens

    @property
    def has_drafts(self) -> bool:
        """Whether each pass is an event of the stream."""
        return bool(self.stream_options and self.stream_options.include_drafts)

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class TextPart(Body):
    type: Literal["text", "input_text", "output_text"]
    text: Text


class Message(Body):
    """A message; what an answer of this server has beside its text may be sent back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_ITEMS, fail_fast=True)] | None = None
    reasoning_content: Text | None = None
    name: unsupported() = None
    refusal: unsupported() = None
    annotations: unsupported([]) = None
    audio: unsupported() = None
    function_call: unsupported() = None
    tool_calls: unsupported([]) = None

    @model_validator(mode="after")
    def _has_content(self):
        if self.content is None:
            raise ValueError("`content` of a message must be text, got none")
        return self

    def for_template(self) -> dict:
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        thought = {"reasoning_content": self.reasoning_content} if self.reasoning_content else {}
        return {"role": "system" if self.role == "developer" else self.role, "content": text, **thought}


class ChatBody(TextBody):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=0)

    logprobs: bool | None = None
    top_logprobs: unsupported(0) = None
    response_format: unsupported({"type": "text"}) = None
    tools: unsupported([]) = None
    tool_choice: unsupported("none", "auto") = None
    parallel_tool_calls: unsupported(True, False) = None  # says how to call tools, of which there are none
    functions: unsupported([]) = None
    function_call: unsupported("none", "auto") = None
    modalities: unsupported(["text"]) = None
    audio: unsupported() = None
    prediction: unsupported() = None
    reasoning_effort: unsupported("none") = None
    service_tier: unsupported("auto", "default") = None
    store: unsupported(False) = None
    metadata: unsupported({}) = None
    verbosity: unsupported() = None
    web_search_options: unsupported() = None

    @model_validator(mode="after")
    def _check_budgets(self):
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError(
                "`max_tokens` and `max_completion_tokens` must not differ, "
                f"got {self.max_tokens} and {self.max_completion_tokens}"
            )
        return self

    @property
    def has_logprobs(self) -> bool:
        """Whether tokens are shown, each with its probability."""
        return bool(self.logprobs)

    @property
    def budget(self) -> tuple[str, int | None]:
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return name, getattr(self, name)


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
Prompts = Annotated[list[Text], Field(fail_fast=True)] | Annotated[list[TokenIds], Field(fail_fast=True)]


class CompletionBody(TextBody):
    """The body of `POST /v1/completions`."""

    prompt: Text | TokenIds | Annotated[Prompts, Field(min_length=1, max_length=128)]
    suffix: Text | None = None
    echo: bool | None = None

    logprobs: unsupported(0) = None  # of the token itself, and of no others
    best_of: unsupported(1) = None

    @model_validator(mode="after")
    def _check_suffix(self):
        if self.suffix and not self.max_tokens:
            raise ValueError("`suffix` must come with a `max_tokens` above 0, the length of what stands between")
        return self

    @property
    def has_logprobs(self) -> bool:
        """Whether tokens are shown, each with its probability."""
        return self.logprobs is not None

    @property
    def prompts(self) -> list[str | list[int]]:
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_one else self.prompt
