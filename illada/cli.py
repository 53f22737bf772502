"""The `illada` command."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from . import __version__
from .blanks import encode_with_blanks, spell_blanks
from .chat import Chat
from .conversion.cli import convert, export
from .demo.cli import demo
from .evaluation.cli import CONTEXT_SETTINGS, evaluate
from .generation_config import MaskedDiffusionGenerationConfig
from .live import is_live, run_generate
from .options import (
    DecodingOptions,
    JsonFlag,
    LiveFlag,
    ModelOption,
    ModelOptions,
    ResponseOptions,
    SamplingOptions,
    expand_options,
)
from .trace import check_trace_path, write_trace
from .training.cli import train

EXIT_CODES = "Exit codes: 0 done, 1 the work failed, 2 wrong usage, 130 interrupted."

app = typer.Typer(
    name="illada",
    help="Masked diffusion language models: generate, chat, fill blanks, revise, serve, train, evaluate, convert.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

TraceOption = Annotated[
    Path | None,
    typer.Option(help="Write a page (.html) that plays the denoising, or a picture (.png).", show_default="off"),
]


def _print_version(asked: bool):
    if asked:
        print(f"illada {__version__}")
        raise typer.Exit


@app.callback()
def illada(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
):
    pass


def _print_result(result: dict, output, as_json: bool):
    if not as_json:
        print(result["text"])
        return
    figures = {
        "num_forward_passes": int(output.num_forward_passes[0]),
        "tokens_per_forward": round(float(output.tokens_per_forward[0]), 3),
    }
    print(json.dumps(result | figures, ensure_ascii=False))


@app.command()
@expand_options
def generate(
    prompt: Annotated[
        str, typer.Argument(help="The message or the text to continue; - reads standard input. May hold blanks.")
    ],
    checkpoint: ModelOptions,
    response: ResponseOptions,
    decoding: DecodingOptions,
    sampling: SamplingOptions,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the chat template.", show_default="if the checkpoint has one"),
    ] = None,
    live: LiveFlag = None,
    trace: TraceOption = None,
    as_json: JsonFlag = False,
):
    """Answer a prompt, or continue a text, by iterative denoising.

    Example: `illada generate "Tom has 7 apples. He buys 5 more. How many apples does Tom have now?"`

    Blanks of the prompt, written as for `illada infill`, are filled first; `--json` shows the filled prompt.
    """
    check_trace_path(trace)
    settings = decoding.settings() | response.settings() | sampling.settings()
    prompt = sys.stdin.read() if prompt == "-" else prompt
    if not prompt.strip():
        raise ValueError(f"PROMPT must hold some text, got {prompt!r}.")
    model, tokenizer = checkpoint.load()
    text = spell_blanks(prompt, tokenizer.convert_ids_to_tokens(model.generation_config.mask_token_id))
    if chat if chat is not None else tokenizer.chat_template is not None:
        if tokenizer.chat_template is None:
            raise ValueError("`--chat` needs a checkpoint with a chat template, and this one has none.")
        messages = [{"role": "user", "content": text}]
        input_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    else:
        input_ids = tokenizer(text)["input_ids"]
    settings |= {"output_trace": trace is not None, "generator": sampling.generator(model.device)}
    live = is_live(live) and not (as_json and live is None)
    output = run_generate(model, tokenizer, input_ids, live, **settings)
    if trace is not None:
        write_trace(trace, tokenizer, output, first_column=len(input_ids))
    written = tokenizer.batch_decode(
        [output.sequences[0, : len(input_ids)], output.sequences[0, len(input_ids) :]], skip_special_tokens=True
    )
    filled = {"prompt": written[0]} if text != prompt or model.generation_config.mask_token_id in input_ids else {}
    _print_result({"text": written[1].strip(), **filled}, output, as_json)


@app.command()
@expand_options
def infill(
    text: Annotated[str, typer.Argument(help="Text with blanks: <[MASK]> is one token, <[MASK]*4> four.")],
    checkpoint: ModelOptions,
    decoding: DecodingOptions,
    sampling: SamplingOptions,
    live: LiveFlag = None,
    trace: TraceOption = None,
    as_json: JsonFlag = False,
):
    """Fill the blanks of a text in place; the rest of it never changes.

    Example: `illada infill "Today Tom has 3 pears and<[MASK]> cups. 3 + 4 = 7, so Tom has 7 things in all."`
    """
    check_trace_path(trace)
    settings = decoding.settings() | sampling.settings() | {"max_new_tokens": 0}
    model, tokenizer = checkpoint.load()
    input_ids = encode_with_blanks(tokenizer, text, model.generation_config.mask_token_id)
    settings |= {"output_trace": trace is not None, "generator": sampling.generator(model.device)}
    live = is_live(live) and not (as_json and live is None)
    output = run_generate(model, tokenizer, input_ids, live, **settings)
    if trace is not None:
        write_trace(trace, tokenizer, output, first_column=0)
    _print_result({"text": tokenizer.decode(output.sequences[0], skip_special_tokens=True)}, output, as_json)


@app.command()
@expand_options
def revise(
    text: Annotated[str, typer.Argument(help="Finished text; - reads standard input.")],
    checkpoint: ModelOptions,
    sampling: SamplingOptions,
    fraction: Annotated[
        float | None, typer.Option(help="Share of the tokens to write anew.", show_default="0.1 without --threshold")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Or: write anew every token less likely than this.", show_default="off")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of reading and writing anew.", min=1)] = 1,
    as_json: JsonFlag = False,
):
    """Write anew the tokens of a text that the model finds least likely in their context.

    Example: `illada revise "Today Tom has 3 pears and 4 cups. 3 + 4 = 9, so Tom has 7 things in all." --threshold 0.1`
    """
    text = sys.stdin.read() if text == "-" else text
    if not text.strip():
        raise ValueError(f"TEXT must hold some text, got {text!r}.")
    model, tokenizer = checkpoint.load()
    output = model.revise(
        torch.tensor([tokenizer(text)["input_ids"]], device=model.device),
        fraction=0.1 if fraction is None and threshold is None else fraction,
        threshold=threshold,
        num_rounds=rounds,
        generator=sampling.generator(model.device),
        **sampling.settings(),
    )
    revised = tokenizer.decode(output.sequences[0], skip_special_tokens=True)
    changes = [
        {"position": position, "to": tokenizer.decode(output.sequences[0, position])}
        for position in output.changed[0].nonzero().squeeze(-1).tolist()
    ]
    print(json.dumps({"text": revised, "changes": changes}, ensure_ascii=False) if as_json else revised)


@app.command()
def info(model: ModelOption = None, as_json: JsonFlag = False):
    """Describe a checkpoint: architecture, parameters, special ids, generation defaults.

    Example: `illada info --model ./my-checkpoint --json`
    """
    loaded, tokenizer = ModelOptions(model, device="cpu").load()
    config = loaded.config
    parameters = sum(parameter.numel() for parameter in loaded.parameters())
    facts = {
        "architecture": type(loaded).__name__,
        "parameters": parameters,
        "parameters without embedding": parameters - loaded.get_input_embeddings().weight.numel(),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "layers": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "attention heads": f"{config.num_attention_heads} ({config.num_key_value_heads} key-value)",
        "feed-forward size": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "tied embeddings": config.tie_word_embeddings,
        "special ids": {name: getattr(config, f"{name}_token_id") for name in ("bos", "pad", "eos", "mask")},
        "chat template": tokenizer.chat_template is not None,
        "generation": loaded.generation_config.to_diff_dict(),
    }
    if as_json:
        print(json.dumps(facts))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        table.add_row(name, f"{value:,}" if type(value) is int else str(value))
    Console().print(table)


@app.command()
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
    Chat(model, tokenizer, settings, live=is_live(live), system=system).run()


@app.command(context_settings=CONTEXT_SETTINGS)
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
        from .serving import run_server
    except ImportError as error:
        raise ValueError(f"`illada serve` needs the extra: pip install 'illada[serve]' ({error}).") from error
    # Of options that are not known here the first may have been taken for the model.
    run_server([model, *context.args] if model is not None else context.args)


app.command()(convert)
app.command()(export)
app.command()(train)
app.command("eval", context_settings=CONTEXT_SETTINGS)(evaluate)
app.command()(demo)

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
        sys.exit(1)


if __name__ == "__main__":
    main()
