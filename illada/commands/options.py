"""Options that several commands share, in groups: a group is a dataclass, and a parameter of that type is expanded."""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import huggingface_hub
import torch
from rich.console import Console
from transformers.utils import logging
from typer import Option

from ..generation_config import MaskedDiffusionGenerationConfig
from ..text.blanks import spell_blanks
from ..text.loading import DTYPES, Checkpoint, open_checkpoint
from .errors import WrongUsage

ModelOption = Annotated[
    str | None, Option("--model", "-m", help="Checkpoint folder or Hub id.", show_default="the embedded model")
]


def read_text(text: str, argument: str) -> str:
    """What was typed, or standard input for `-`.

    Raises:
        WrongUsage: if it is empty, or a blank in it is.
    """
    text = sys.stdin.read() if text == "-" else text
    if not text.strip():
        raise WrongUsage(f"`{argument}` must contain some text, got {text!r}.")
    try:
        spell_blanks(text, "")
    except ValueError as error:
        raise WrongUsage(f"`{argument}` cannot be used: {error}") from error
    return text


JsonFlag = Annotated[bool, Option("--json", help="Print one JSON object instead of text.")]
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

    def open(self) -> Checkpoint:
        """The checkpoint, of which no weights are read yet. Transformers keeps silent from here on.

        Raises:
            ValueError: names the option and what is allowed.
        """
        if self.dtype not in DTYPES:
            raise ValueError(f"`dtype` must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {self.dtype!r}.")
        self.torch_device()
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        huggingface_hub.utils.logging.set_verbosity_error()
        return open_checkpoint(self.model)

    def load(self, checkpoint: Checkpoint):
        """The model of the checkpoint, where it is to run; on a terminal, a notice stands until it is there."""
        console = Console(stderr=True)
        with console.status(f"Loading {checkpoint.name} ...") if console.is_terminal else nullcontext():
            return checkpoint.load_model(self.torch_device(), dtype=self.dtype)

    def torch_device(self) -> torch.device:
        """Raises a `ValueError` if there is no such device here."""
        if self.device is None:
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        present = ["cpu"]
        if accelerator is not None:
            numbers = range(torch.accelerator.device_count())
            present += [accelerator.type, *(f"{accelerator.type}:{number}" for number in numbers)]
        if self.device not in present:
            raise ValueError(f"`device` must be one of those here, {', '.join(present)}, got {self.device!r}.")
        return torch.device(self.device)


@dataclasses.dataclass
class LiveOptions:
    """Whether the denoising is seen."""

    live: Annotated[
        bool | None, Option("--live/--no-live", help="Show the denoising.", show_default="on a terminal")
    ] = None
    pause: Annotated[float, Option(help="Seconds to wait after each step that is shown.", min=0.0, max=3600.0)] = 0.0

    def seconds(self, as_json: bool = False) -> float | None:
        """How long each step is shown beyond its own time; `None` if none is."""
        default = sys.stdout.isatty() and not as_json
        return self.pause if (default if self.live is None else self.live) else None


@dataclasses.dataclass
class EngineOptions:
    """How many texts are written at a time."""

    max_rows: Annotated[int, Option(help="Texts that are written at a time.", min=1)] = 8
    max_tokens: Annotated[
        int | None,
        Option(
            help="Limit on the tokens in flight: rows times the longest text, prompt included.",
            min=1,
            show_default="none",
        ),
    ] = None


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
    frechet_margin: Annotated[
        float | None,
        Option(help="Also commit n tokens provably likeliest together, by this margin.", show_default="off"),
    ] = None
    commit_rule: Annotated[
        str | None, Option(help="Rule: klass, local_leap, credit_decoding, t2m or wino.", show_default="off")
    ] = None
    num_drafts: Annotated[
        int | None,
        Option(help="Also predict this many guesses less one: the same text in fewer passes.", show_default="off"),
    ] = None
    block_cache: Annotated[
        str | None,
        Option(help="Keep keys and values: prefix, dual or frozen; approximate.", show_default="off"),
    ] = None

    cache_refresh_entropy: Annotated[
        float | None,
        Option(help="With a cache, see all of the text again after a token of more nats.", show_default="off"),
    ] = None

    def settings(self) -> dict:
        """Arguments of `generate`."""
        fields = dataclasses.asdict(self)
        return _given(max_denoising_steps=fields.pop("steps"), **fields)


@dataclasses.dataclass
class ResponseOptions:
    """The response that follows the prompt."""

    max_new_tokens: Annotated[
        int | None, Option(help="Maximum number of new tokens.", show_default="the checkpoint's")
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
    """How tokens are drawn."""

    temperature: Annotated[float, Option(help="Sample at this temperature; 0 is greedy.", min=0.0)] = 0.0
    top_p: Annotated[float | None, Option(help="Nucleus (top-p) sampling.", show_default="off")] = None
    top_k: Annotated[int | None, Option(help="Sample from this many candidates.", show_default="off")] = None
    seed: Annotated[int | None, Option(help="Random seed.", show_default="random", min=0, max=2**63 - 1)] = None

    def settings(self) -> dict:
        """Arguments of `generate`, but for the generator."""
        if self.temperature == 0:
            if self.top_p is not None or self.top_k is not None:
                raise WrongUsage("`--top-p` and `--top-k` need a `--temperature` above 0, got 0: greedy.")
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, **_given(top_p=self.top_p, top_k=self.top_k)}

    def generator(self, device: torch.device) -> torch.Generator | None:
        """The seeded source of the noise; `None` is the global one."""
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)


def check_settings(settings: dict, checkpoint: Checkpoint | None = None, prompt_length: int = 0):
    """Checks arguments of `generate` before any weights are read.

    Args:
        checkpoint (`Checkpoint`, *optional*): whose own settings and positions count as well.
        prompt_length (`int`): of the prompt, in tokens.

    Raises:
        WrongUsage: names the argument and what is allowed.
    """
    own = None if checkpoint is None else checkpoint.generation_config
    try:
        config = MaskedDiffusionGenerationConfig.merged(own, None, **settings)
    except ValueError as error:
        raise WrongUsage(str(error)) from error
    if checkpoint is None:
        return
    positions = checkpoint.config.max_position_embeddings
    room = positions - prompt_length
    if room < (config.max_new_tokens != 0):
        raise WrongUsage(f"The text must fit into the model's {positions} positions, got {prompt_length} tokens.")
    if (config.max_new_tokens or 0) > room:
        raise WrongUsage(
            f"`--max-new-tokens` must be at most {room}, got {config.max_new_tokens}: the model has {positions} "
            f"positions, and the prompt {prompt_length} tokens."
        )


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
