"""`illada demo`: serves the web page."""

import os
from pathlib import Path
from typing import Annotated

import typer


def demo(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Checkpoint folder or Hub id.", show_default="the embedded model"),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 serves the whole network.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Port to listen on.", min=1, max=65535, show_default="the first free from 7860")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Device, such as cpu, cuda or mps.", show_default="cuda if present")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Weights' dtype: auto, float32, bfloat16 or float16.")] = "auto",
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
):
    """Serve a web page: chat, fill blanks, revise, and watch each token settle. It works offline.

    Example: `illada demo --open`
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read by Gradio on import
    try:
        from .page import CSS, THEME, build_page
    except ModuleNotFoundError as error:
        raise ValueError(f"`illada demo` needs Gradio: pip install 'illada[demo]' ({error}).") from error
    from .. import EMBEDDED_MODEL
    from ..cli import _load

    loaded, tokenizer = _load(model, device, dtype)
    is_embedded = model is None or Path(model).resolve() == EMBEDDED_MODEL
    page = build_page(loaded, tokenizer, EMBEDDED_MODEL.name if is_embedded else model, is_embedded)
    page.launch(
        server_name=host,
        server_port=port,
        inbrowser=open_browser,
        share=False,
        ssr_mode=False,
        footer_links=[],
        theme=THEME,
        css=CSS,
    )
