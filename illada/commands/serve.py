"""`illada serve`."""

import gc
import math
import signal
import sys
from typing import Annotated

import typer

from ..generation_config import MaskedDiffusionGenerationConfig
from .address import bind, drop_who_does_not_read
from .options import DecodingOptions, EngineOptions, ModelOptions, check_settings, expand_options


@expand_options
def serve(
    source: ModelOptions,
    decoding: DecodingOptions,
    engine: EngineOptions,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Longest answer in tokens, if a request does not say.", min=1, show_default="the checkpoint's"
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 serves the whole network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    name: Annotated[
        str | None, typer.Option(help="The model's name for clients.", show_default="its folder's, or its Hub id")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="Key that clients must send.", envvar="ILLADA_API_KEY", show_default="none"),
    ] = None,
    max_waiting: Annotated[int, typer.Option(help="Texts that may wait; further ones get a 429.", min=1)] = 256,
    max_cached_tokens: Annotated[
        int,
        typer.Option(
            help="Tokens of finished texts whose keys and values are kept for later turns, with a frozen cache.", min=1
        ),
    ] = 16384,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(help="Longest prompt in tokens; a longer one gets a 400.", min=1, show_default="the model's"),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds after which a request is given up.", min=0.1, show_default="none")
    ] = None,
    max_body_kib: Annotated[int, typer.Option("--max-body-kib", help="Largest request, in KiB.", min=1)] = 1024,
    stop_timeout: Annotated[
        float, typer.Option(help="Seconds that running requests may take to finish once the server is to end.", min=0)
    ] = 300,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin whose pages may call the server (CORS); repeatable.", show_default="none"),
    ] = None,
):
    """Serve a model by OpenAI's HTTP interface (chat, completions, responses, decisions), with infilling and revision.

    The decoding options are the defaults of requests, which may set each of them.

    Example: `illada serve --port 8000 --preset fast`
    """
    try:
        import uvicorn

        from ..serving.app import build_app
        from ..serving.service import PATIENCE, ServerOptions
        from ..serving.worker import Worker
    except ModuleNotFoundError as error:
        raise ValueError(f"`illada serve` needs the extra: pip install 'illada[serve]' ({error}).") from error
    settings = decoding.settings()
    if max_new_tokens is not None:
        settings["max_new_tokens"] = max_new_tokens
    check_settings(settings)
    checkpoint = source.open()
    check_settings(settings, checkpoint)
    listener = bind(host, port)
    drop_who_does_not_read(listener, timeout or PATIENCE)
    model = source.load(checkpoint)
    model.generation_config = MaskedDiffusionGenerationConfig.merged(model.generation_config, None, **settings)
    options = ServerOptions(api_key, timeout, max_body_kib * 1024, allow_origin or [], max_prompt_tokens)
    name = name or checkpoint.name
    worker = Worker(model, engine.max_rows, engine.max_tokens, max_waiting, max_cached_tokens)
    app = build_app(worker, checkpoint.tokenizer, name, options)
    print(f"Serving {name} at http://{host}:{port}/v1 (Ctrl-C ends it).", flush=True)
    config = uvicorn.Config(app, lifespan="off", timeout_graceful_shutdown=math.ceil(stop_timeout))
    gc.collect()
    gc.freeze()  # a full collection would walk through all that was imported, and hold up every request meanwhile
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises the signal again once all is finished
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        worker.close()
