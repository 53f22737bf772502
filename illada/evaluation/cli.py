"""`illada eval`: lm-eval with the model `illada`, the offline tasks and the published presets."""

import argparse
import contextlib
import io
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..commands.errors import WrongUsage
from .presets import PRESETS, select_presets

TASK_FOLDER = Path(__file__).parent / "tasks"
CONTEXT_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Settings of the command, with which it takes the harness's arguments besides its own."""


def evaluate(
    context: typer.Context,
    preset: Annotated[
        str | None, typer.Option(help="Published settings, by row or by table; other arguments win over them.")
    ] = None,
    list_presets: Annotated[bool, typer.Option("--list-presets", help="Print the presets and stop.")] = False,
):
    """Evaluate a model with lm-eval. All arguments of `lm-eval run` are understood (see `lm-eval run --help`).

    Example: `illada eval --preset base-mmlu --batch_size 16`
    """
    if list_presets:
        for name, row in PRESETS.items():
            typer.echo(" ".join([name, *row.arguments()]))
        return
    if preset is None and not context.args:
        raise WrongUsage("`illada eval` needs `--preset NAME` or arguments of `lm-eval run`, such as `--tasks`.")
    names_tasks = any(argument.partition("=")[0] in ("--tasks", "-t") for argument in context.args)
    for run in select_presets(preset).values() if preset else [None]:
        from_preset = run.arguments(with_tasks=not names_tasks) if run else []
        run_harness(["--model", "illada", "--include_path", str(TASK_FOLDER), *from_preset, *context.args])


def run_harness(arguments: list[str]):
    """Runs the harness's own command line in this process, with the model `illada` registered.

    lm-eval finds tasks of other packages by `--include_path`, and has no such mechanism for models: importing the
    module is the registration.

    Raises:
        ValueError: if lm-eval is not installed.
        WrongUsage: if lm-eval or the model `illada` does not know an argument, or cannot honour it.
    """
    try:
        from lm_eval.__main__ import HarnessCLI, setup_logging
    except ModuleNotFoundError as error:
        raise ValueError(f"`illada eval` needs lm-eval: pip install 'illada[eval]' ({error}).") from error
    from . import harness  # noqa: F401
    from .harness_arguments import WrongArgument

    command_line, sys.argv = sys.argv, ["lm-eval", "run", *arguments]
    try:
        setup_logging(logging.WARNING)  # LMEVAL_LOG_LEVEL=INFO brings the rest back
        command = HarnessCLI()
        command.execute(_parse(command))
    except ValueError as error:
        if isinstance(error, WrongArgument) or str(error).startswith("Tasks not found"):
            raise WrongUsage(str(error)) from error
        raise
    finally:
        sys.argv = command_line


def _parse(command) -> argparse.Namespace:
    """The harness's parser on `sys.argv`, with one sentence instead of its usage lines."""
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            return command.parse_args()
        except SystemExit as error:
            if error.code != 2:
                raise
            reason = errors.getvalue().strip().rpartition("error: ")[2]
            message = f"`illada eval` cannot read its arguments: {reason} (see `lm-eval run --help`)."
            raise WrongUsage(message) from None
