"""What the endpoints accept. A field that is not here is refused, and so is one that could not be honoured."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def unsupported(*harmless):
    """The type of a field of OpenAI's interface that this server does not honour: only `harmless` values may pass."""

    def refuse(value):
        if value is not None and not any(value == each and type(value) is type(each) for each in harmless):
            allowed = " or ".join(["left out", *map(repr, harmless)])
            raise ValueError(f"must be {allowed}, since this server does not support it")
        return value

    return Annotated[Any, AfterValidator(refuse)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: unsupported(False) = None


StopString = Annotated[str, Field(min_length=1, max_length=1000)]


class DecodingFields(Body):
    """This package's own settings, as further fields of a request. `generate` checks their values."""

    preset: str | None = None
    canvas: str | None = None
    block_length: int | None = None
    max_denoising_steps: int | None = None
    remasking: str | None = None
    confidence_threshold: float | None = None
    confidence_factor: float | None = None
    entropy_bound: float | None = None
    frechet_margin: float | None = None
    commit_rule: str | None = None
    defer_eos: bool | None = None
    block_cache: str | None = None
    cache_refresh_interval: int | None = None
    cache_refresh_entropy: float | None = None
    guidance_scale: float | None = None
    repetition_penalty: float | None = None
    min_new_tokens: int | None = None
    suppress_tokens: list[int] | None = None
    end_think_token_ids: list[int] | None = None
    end_think_boost: float | None = None
    end_think_power: float | None = None
    top_k: int | None = None
    min_p: float | None = None


class TextBody(DecodingFields):
    """What chat completions and completions have in common."""

    model: str | None = None
    n: int = Field(1, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None

    user: str | None = None  # an end user's name, which has no meaning here
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
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def decoding_settings(self) -> dict:
        """Arguments of `generate` that are fields under the same name."""
        names = DecodingFields.model_fields.keys() - {"top_k", "min_p"}
        return {name: getattr(self, name) for name in sorted(names) if getattr(self, name) is not None}

    def sampling_settings(self, samples_by_default: bool) -> dict:
        """Arguments of `generate`. Without a temperature the checkpoint decides whether to sample.

        Raises:
            ValueError: if the request narrows a sampling that would not take place.
        """
        narrowing = {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        narrowing = {name: value for name, value in narrowing.items() if value is not None}
        if self.temperature == 0:
            return {"do_sample": False}  # the likeliest token is within every narrowing
        if self.temperature is not None:
            return {"do_sample": True, "temperature": self.temperature, **narrowing}
        for name, value in narrowing.items():
            if not samples_by_default and (name, value) != ("top_p", 1):
                raise ValueError(
                    f"`{name}`={value} must come with a `temperature`: without one this model does not sample."
                )
        return narrowing if samples_by_default else {}


class TextPart(Body):
    type: Literal["text", "input_text", "output_text"]
    text: str


class Message(Body):
    """A message; what an answer of this server has beside its text may be sent back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
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
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(TextBody):
    """The body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0)

    logprobs: unsupported(False) = None
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
    def budget(self) -> tuple[str, int | None]:
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return name, getattr(self, name)


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionBody(TextBody):
    """The body of `POST /v1/completions`."""

    prompt: str | TokenIds | Annotated[list[str] | list[TokenIds], Field(min_length=1, max_length=128)]
    suffix: str | None = None
    echo: bool | None = None

    logprobs: unsupported() = None
    best_of: unsupported(1) = None

    @model_validator(mode="after")
    def _check_suffix(self):
        if self.suffix and not self.max_tokens:
            raise ValueError("`suffix` must come with a `max_tokens` above 0, the length of what stands between")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_one else self.prompt
