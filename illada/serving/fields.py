"""The fields of requests that are this package's own settings, and the types that several bodies share."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model, model_validator
from transformers.generation import GenerationConfig

from ..generation_config import MaskedDiffusionGenerationConfig
from ..standard_fields import READ

MAX_FIELDS = 256
"""Of an object; each that is unknown is a fault of its own."""
MAX_ITEMS = 4096
"""Of a list or a table of settings."""


class Body(BaseModel):
    """An object of a request: a name that is no field is refused, and so is a value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _is_of_sensible_size(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > MAX_FIELDS:
            raise ValueError(f"must have at most {MAX_FIELDS} fields, got {len(data)}")
        return data


def _is_encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(f"must be Unicode text, without halves of characters such as {half!r}") from error
    return text


Text = Annotated[str, AfterValidator(_is_encodable)]
"""A string that a tokenizer can read: JSON can also spell half a surrogate pair."""


def unsupported(*harmless):
    """The type of a field of OpenAI's interface that this server does not honour: only `harmless` values may pass."""

    def refuse(value):
        if value is not None and not any(value == each and type(value) is type(each) for each in harmless):
            allowed = " or ".join(["left out", *map(repr, harmless)])
            raise ValueError(f"must be {allowed}, since this server does not support it")
        return value

    return Annotated[Any, AfterValidator(refuse)]


NARROWING = ("top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Settings that say from which tokens to sample."""

_NAMED_OTHERWISE = {
    "max_new_tokens",
    "max_length",
    "do_sample",
    "stop_strings",
    "sequence_bias",
    "num_return_sequences",
}
_OF_THE_SERVER = {
    *("mask_token_id", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("compile", "compile_config", "max_time", "remove_invalid_values"),
    *("return_dict_in_generate", "output_trace", "min_length"),
}
_OWN = MaskedDiffusionGenerationConfig.field_names() - vars(GenerationConfig()).keys()
SETTINGS = frozenset((_OWN | READ) - _NAMED_OTHERWISE - _OF_THE_SERVER - {"temperature", "seed", *NARROWING})
"""Fields of [`MaskedDiffusionGenerationConfig`] that a request may set under the same name: all that are read, but for
those that OpenAI's interface names otherwise (`max_tokens` ...) and those that are the server's concern."""


def _not_beyond_reach(value: Any) -> Any:
    if isinstance(value, (list, dict)) and len(value) > MAX_ITEMS:
        raise ValueError(f"must have at most {MAX_ITEMS} items, and has {len(value)}")
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, (int, float)) and abs(number) >= 2**31:
            raise ValueError("must have numbers between -2**31 and 2**31")
    return value


# `generate` checks the values, and its messages name the field.
_Setting = Annotated[Any, AfterValidator(_not_beyond_reach)]
DecodingFields = create_model(
    "DecodingFields",
    __base__=Body,
    __module__=__name__,
    __doc__="This package's own settings, as further fields of a request.",
    preset=(str | None, None),
    **{name: (_Setting, None) for name in sorted({*SETTINGS, *NARROWING} - {"top_p"})},
)


class WritingFields(DecodingFields):
    """What all requests have in common by which something is written."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_ITEMS)] | None = (
        None
    )
    user: str | None = None  # an end user's name, which has no meaning here

    @property
    def decoding_settings(self) -> dict:
        """Arguments of `generate` that are fields under the same name."""
        return {name: getattr(self, name) for name in ("preset", *sorted(SETTINGS)) if getattr(self, name) is not None}

    def sampling_settings(self, samples_by_default: bool) -> dict:
        """Arguments of `generate`. Without a temperature the checkpoint decides whether to sample.

        Raises:
            ValueError: if the request narrows a sampling that would not take place.
        """
        narrowing = {name: getattr(self, name) for name in NARROWING if getattr(self, name) is not None}
        seed = {} if self.seed is None else {"seed": self.seed % 2**63}
        if self.temperature == 0:
            return seed | {"do_sample": False}  # the likeliest token is within every narrowing
        if self.temperature is not None:
            return seed | {"do_sample": True, "temperature": self.temperature, **narrowing}
        for name, value in narrowing.items():
            if not samples_by_default and (name, value) != ("top_p", 1):
                raise ValueError(
                    f"`{name}`={value} must come with a `temperature`: without one this model does not sample."
                )
        return seed | (narrowing if samples_by_default else {})
