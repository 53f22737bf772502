"""Options that several commands share, in groups: a group is a dataclass, and a parameter of that type is expanded."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import huggingface_hub
import torch
from transformers.utils import logging
from typer import Option

from ..text.loading import DTYPES, load

ModelOption = Annotated[
    str | None, Option("--model", "-m", help="Checkpoint folder or Hub id.", show_default="the embedded model")
]
JsonFlag = Annotated[bool, Option("--json", help="Print one JSON object instead of text.")]
LiveFlag = Annotated[bool | None, Option("--live/--no-live", help="Show the denoising.", show_default="on a terminal")]
TraceOption = Annotated[
    Path | None,
    Option(help="Write a page (.html) that plays the denoising, or a picture (.png).", show_default="off"),
]


def _given(**settings) -> dict:
    """The settings that were given."""
    return {name: value for name, value in settings.items() if value is not None}


@dataclasses.dataclass
class ModelOptions:
    """The checkpoint, and where it runs."""

    model: ModelOption = None
    device: Annotated[str | None, Option(help="Device, such as cpu, cuda or mps.", show_default="cuda if present")] = (
        None
    )
    dtype: Annotated[str, Option(help="Weights' dtype: auto, float32, bfloat16 or float16.")] = "auto"

    def load(self):
        """The model, ready to generate, and its tokenizer. Transformers keeps silent from here on.

        Raises:
            ValueError: names the option and what is allowed.
        """
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        huggingface_hub.utils.logging.set_verbosity_error()
        if self.dtype not in DTYPES:
            raise ValueError(f"`--dtype` must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {self.dtype!r}.")
        return load(self.model, self.dtype, self.device, argument="--model")


@dataclasses.dataclass
class DecodingOptions:
    """Which masks are decoded together, and which predictions are committed."""

    preset: Annotated[str | None, Option(help="exact or fast; other options override it.", show_default="none")] = None
    block_length: Annotated[int | None, Option(help="Tokens decoded together.", show_default="the checkpoint's")] = (
        None
    )
    steps: Annotated[int | None, Option(help="Denoising steps per block.", show_default="one per token")] = None
    remasking: Annotated[
        str | None,
        Option(help="Ranking: low_confidence, random, margin or entropy.", show_default="low_confidence"),
    ] = None
    confidence_threshold: Annotated[
        float | None, Option(help="Also commit every token of at least this confidence.", show_default="off")
    ] = None
    confidence_factor: Annotated[
        float | None, Option(help="Also commit n tokens while (n + 1)(1 - c_n) < factor.", show_default="off")
    ] = None
    entropy_bound: Annotated[
        float | None, Option(help="Also commit tokens up to this sum of entropies, in nats.", show_default="off")
    ] = None
    block_cache: Annotated[
        str | None,
        Option(help="Keep keys and values in a block: prefix or dual; approximate.", show_default="off"),
    ] = None

    def settings(self) -> dict:
        """Arguments of `generate`."""
        fields = dataclasses.asdict(self)
        return _given(max_denoising_steps=fields.pop("steps"), **fields)


@dataclasses.dataclass
class ResponseOptions:
    """What is written behind a prompt."""

    max_new_tokens: Annotated[
        int | None, Option(help="Budget of the answer, in tokens.", show_default="the checkpoint's")
    ] = None
    canvas: Annotated[
        str | None, Option(help="growing (iLLaDA) or fixed (LLaDA).", show_default="the checkpoint's")
    ] = None
    guidance_scale: Annotated[
        float | None, Option(help="Classifier-free guidance; 1 is none.", show_default="off")
    ] = None
    stop: Annotated[list[str] | None, Option(help="Text that ends the answer; repeatable.")] = None

    def settings(self) -> dict:
        """Arguments of `generate`."""
        fields = dataclasses.asdict(self)
        return _given(stop_strings=fields.pop("stop") or None, **fields)


@dataclasses.dataclass
class SamplingOptions:
    """The noise."""

    temperature: Annotated[float, Option(help="Sample at this temperature; 0 is greedy.", min=0.0)] = 0.0
    top_p: Annotated[float | None, Option(help="Nucleus of the sampling.", show_default="off")] = None
    top_k: Annotated[int | None, Option(help="Candidates of the sampling.", show_default="off")] = None
    seed: Annotated[int | None, Option(help="Seed of the noise.", show_default="random")] = None

    def settings(self) -> dict:
        """Arguments of `generate`, but for the generator."""
        if self.temperature == 0:
            if self.top_p is not None or self.top_k is not None:
                raise ValueError("`--top-p` and `--top-k` need a `--temperature` above 0, got 0: greedy.")
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, **_given(top_p=self.top_p, top_k=self.top_k)}

    def generator(self, device: torch.device) -> torch.Generator | None:
        """The seeded source of the noise; `None` is the global one."""
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)


def expand_options(command: Callable) -> Callable:
    """The command with each parameter whose type is a group replaced by the group's options, for typer to read."""
    parameters, groups = [], {}
    for parameter in inspect.signature(command).parameters.values():
        if not dataclasses.is_dataclass(parameter.annotation):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        fields = dataclasses.fields(parameter.annotation)
        groups[parameter.name] = parameter.annotation, [field.name for field in fields]
        parameters += [
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            for field in fields
        ]

    @functools.wraps(command)
    def with_groups(**values):
        for name, (group, fields) in groups.items():
            values[name] = group(**{field: values.pop(field) for field in fields})
        return command(**values)

    with_groups.__signature__ = inspect.Signature(parameters)
    with_groups.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_groups
