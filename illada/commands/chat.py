"""`illada chat`."""

from typing import Annotated

import typer

from ..generation_config import MaskedDiffusionGenerationConfig
from .conversation import Conversation
from .live import is_live
from .options import DecodingOptions, LiveFlag, ModelOptions, ResponseOptions, SamplingOptions, expand_options


@expand_options
def chat(
    checkpoint: ModelOptions,
    response: ResponseOptions,
    decoding: DecodingOptions,
    sampling: SamplingOptions,
    system: Annotated[str | None, typer.Option(help="System message.", show_default="none")] = None,
    live: LiveFlag = None,
):
    """Talk with a model; /help lists what can be typed. End of input (Ctrl-D) leaves.

    Example: `illada chat --max-new-tokens 100 --preset fast`
    """
    settings = response.settings() | decoding.settings() | sampling.settings()
    model, tokenizer = checkpoint.load()
    MaskedDiffusionGenerationConfig.merged(model.generation_config, None, **settings)  # refuses bad ones at once
    settings["generator"] = sampling.generator(model.device)
    Conversation(model, tokenizer, settings, live=is_live(live), system=system).run()
