"""`illada batch`."""

import sys
from collections.abc import Generator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from ..generation_config import MaskedDiffusionGenerationConfig
from ..text.loading import Checkpoint
from .errors import WrongUsage
from .options import DecodingOptions, EngineOptions, ModelOptions, check_settings, expand_options


@expand_options
def batch(
    input: Annotated[Path, typer.Argument(help="File of requests, one JSON object a line.")],
    output: Annotated[Path, typer.Argument(help="File of answers; one that a killed run has left is continued.")],
    source: ModelOptions,
    decoding: DecodingOptions,
    engine: EngineOptions,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Longest answer in tokens, if a line does not say.", min=1, show_default="the checkpoint's"),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="What `model` must be in lines that have it.", show_default="the folder's name, or Hub id"),
    ] = None,
    in_order: Annotated[
        bool, typer.Option("--in-order", help="Write answers in the order of INPUT, not as they are finished.")
    ] = False,
):
    """Answer a file of requests, in OpenAI's batch format or as plain prompts and messages.

    Example: `illada batch requests.jsonl answers.jsonl --preset fast`

    The same command continues a run that was interrupted or killed; each line is answered once. The decoding options
    are what lines begin with, which may set each of them.
    """
    _check_paths(input, output)
    try:
        from ..batch.lines import read_lines
        from ..batch.output import OutputFile
    except ModuleNotFoundError as error:
        raise ValueError(f"`illada batch` needs the extra: pip install 'illada[serve]' ({error}).") from error
    settings = decoding.settings() | ({} if max_new_tokens is None else {"max_new_tokens": max_new_tokens})
    check_settings(settings)
    checkpoint = source.open()
    check_settings(settings, checkpoint)
    place = Path(checkpoint.adapter or checkpoint.place)
    place = str(place.resolve()) if place.is_dir() else str(place)
    begun_with = {"model": place, "dtype": source.dtype, "name": name, "in_order": in_order, **settings}
    with OutputFile(output, begun_with) as answers:
        total = answers.check_lines(read_lines(input))
        lines = (line for line in read_lines(input) if not answers.has(line))
        if answers.num_done < total:
            records = _answer(lines, source, checkpoint, settings, name or checkpoint.name, engine, in_order)
            _write(answers, records, total)
    print(f"illada: {answers.num_done} lines in {output}, {answers.num_failed} with an error.", file=sys.stderr)


def _answer(
    lines, source: ModelOptions, checkpoint: Checkpoint, settings: dict, name: str, engine: EngineOptions, in_order
):
    """The records of lines."""
    from ..batch.answering import answer_lines
    from ..batch.application import Application

    model = source.load(checkpoint)
    model.generation_config = MaskedDiffusionGenerationConfig.merged(model.generation_config, None, **settings)
    make_application = partial(Application, model, checkpoint.tokenizer, name, engine.max_rows, engine.max_tokens)
    return answer_lines(lines, make_application, in_order)


def _check_paths(input: Path, output: Path):
    if not input.is_file():
        reason = "it is no file" if input.exists() else "no such file"
        raise WrongUsage(f"`input` must be a file that can be read twice, got {str(input)!r}: {reason}.")
    if output.exists() and not output.is_file():
        raise WrongUsage(f"`output` must be a file, got {str(output)!r}, which is none.")
    if output.exists() and output.samefile(input):
        raise WrongUsage(f"`output` must be another file than `input`, got {str(output)!r}.")
    if not output.absolute().parent.is_dir():
        raise WrongUsage(f"`output` must be in a folder that exists, got {str(output)!r}.")


class _Rate(ProgressColumn):
    """Lines per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.2f} lines/s")


def _write(answers, records: Generator[dict, None, None], total: int):
    """Writes the records as they come, counted by a bar if standard error is a terminal."""
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, disable=not console.is_terminal, speed_estimate_period=300)
    try:
        with closing(records), bar:
            task = bar.add_task("", total=total, completed=answers.num_done)
            for record in records:
                answers.write(record)
                bar.advance(task)
    except KeyboardInterrupt:
        print(f"illada: interrupted; the same command continues {answers.path}.", file=sys.stderr)
        raise
