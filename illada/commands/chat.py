"""`illada chat`."""

from typing import Annotated

import typer

from .conversation import Conversation
from .options import (
    DecodingOptions,
    LiveOptions,
    ModelOptions,
    ResponseOptions,
    SamplingOptions,
    check_settings,
    expand_options,
)


@expand_options
def chat(
    source: ModelOptions,
    response: ResponseOptions,
    decoding: DecodingOptions,
    sampling: SamplingOptions,
    view: LiveOptions,
    system: Annotated[str | None, typer.Option(help="System message.", show_default="none")] = None,
):
    """Talk with a model; /help lists what can be typed. End of input (Ctrl-D) leaves.

    Example: `illada chat --max-new-tokens 100 --preset fast`
    """
    settings = response.settings() | decoding.settings() | sampling.settings()
    check_settings(settings)
    checkpoint = source.open()
    check_settings(settings, checkpoint)
    conversation = Conversation(checkpoint, settings, pause=view.seconds(), system=system)
    model = source.load(checkpoint)
    conversation.run(model, sampling.generator(model.device))
