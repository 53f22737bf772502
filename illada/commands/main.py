"""The `illada` command."""

import os
import sys
from typing import Annotated

import typer

from .. import __version__
from ..conversion.cli import convert, export
from ..demo.cli import demo
from ..evaluation.cli import CONTEXT_SETTINGS, evaluate
from ..training.cli import train
from .batch import batch
from .chat import chat
from .errors import Command
from .generate import generate
from .infill import infill
from .info import info
from .revise import revise
from .serve import serve

EXIT_CODES = "Exit codes: 0 done, 1 the work failed, 2 wrong usage, 130 interrupted."

app = typer.Typer(
    name="illada",
    help="Masked diffusion language models: generate, chat, fill blanks, revise, serve, train, evaluate, convert.",
    epilog=EXIT_CODES,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _print_version(asked: bool):
    if asked:
        print(f"illada {__version__}")
        raise typer.Exit


@app.callback()
def illada(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", "-V", help="Print the version and stop.", callback=_print_version, is_eager=True),
    ] = False,
):
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command("help", hidden=True)
def print_help(context: typer.Context):
    """Print what `illada --help` prints.

    Example: `illada help`
    """
    print(context.parent.get_help())


for _command in (generate, infill, revise, info, chat, convert, export, train, demo, serve, batch):
    app.command(cls=Command)(_command)
app.command("eval", cls=Command, context_settings=CONTEXT_SETTINGS)(evaluate)

for _registered in app.registered_commands:
    _registered.epilog = EXIT_CODES


def main():
    """Runs the command; an error is one line on standard error."""
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if format_message := getattr(error, "format_message", None):  # wrong usage
            print(f"illada: {format_message()} Try --help.", file=sys.stderr)
            sys.exit(2)
        if os.environ.get("ILLADA_TRACEBACK"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"illada: {message}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
