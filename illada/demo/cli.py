"""`illada demo`: serves the web page."""

import os
from typing import Annotated

import typer

from ..commands.address import bind
from ..commands.options import ModelOptions, expand_options


@expand_options
def demo(
    source: ModelOptions,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 serves the whole network.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Port to listen on.", min=1, max=65535, show_default="the first free from 7860")
    ] = None,
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
    checkpoint = source.open()
    bind(host, port or 0).close()
    model, tokenizer = source.load(checkpoint), checkpoint.tokenizer
    page = build_page(model, tokenizer, checkpoint.name, checkpoint.is_embedded)
    page.launch(
        server_name=host,
        server_port=port,
        inbrowser=open_browser,
        share=False,
        ssr_mode=False,
        footer_links=[],
        theme=THEME,
        css=CSS,
        quiet=True,  # or else it advertises a public link
        prevent_thread_lock=True,
    )
    print(f"The page is at {page.local_url} (Ctrl-C ends it).", flush=True)
    page.block_thread()
