"""`illada serve`."""

from typing import Annotated

import typer


def serve(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder or Hub id.", show_default="the embedded model")
    ] = None,
):
    """Serve a model by OpenAI's HTTP interface with `transformers serve`, whose options are understood (see its help).

    Example: `illada serve --host 127.0.0.1 --port 8000`
    """
    try:
        from ..serving import run_server
    except ImportError as error:
        raise ValueError(f"`illada serve` needs the extra: pip install 'illada[serve]' ({error}).") from error
    # Of options that are not known here the first may have been taken for the model.
    run_server([model, *context.args] if model is not None else context.args)
