"""The `illada` command."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated

import huggingface_hub
import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from . import EMBEDDED_MODEL
from .blanks import encode_with_blanks
from .conversion.cli import convert, export
from .demo.cli import demo
from .evaluation.cli import CONTEXT_SETTINGS, evaluate
from .generation import MaskedDiffusionGenerationMixin
from .live import LiveDenoising
from .trace import check_trace_path, write_trace
from .training.cli import train

app = typer.Typer(
    name="illada",
    help="Masked diffusion language models: generate, fill blanks, revise, convert, export, train, evaluate.",
    epilog="Exit codes: 0 done, 1 the work failed, 2 wrong usage, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

MODEL = Annotated[
    str | None, typer.Option("--model", "-m", help="Checkpoint folder or Hub id.", show_default="the embedded model")
]
DEVICE = Annotated[str | None, typer.Option(help="Device, such as cpu, cuda or mps.", show_default="cuda if present")]
DTYPE = Annotated[str, typer.Option(help="Weights' dtype: auto, float32, bfloat16 or float16.")]
JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
LIVE = Annotated[
    bool | None, typer.Option("--live/--no-live", help="Show the denoising.", show_default="on a terminal")
]
TRACE = Annotated[
    Path | None,
    typer.Option(help="Write a page (.html) that plays the denoising, or a picture (.png).", show_default="off"),
]
SEED = Annotated[int | None, typer.Option(help="Seed of the noise.", show_default="random")]
PRESET = Annotated[str | None, typer.Option(help="exact or fast; other options override it.", show_default="none")]
BLOCK_LENGTH = Annotated[int | None, typer.Option(help="Tokens decoded together.", show_default="the checkpoint's")]
STEPS = Annotated[int | None, typer.Option(help="Denoising steps per block.", show_default="one per token")]
REMASKING = Annotated[
    str | None,
    typer.Option(help="Ranking: low_confidence, random, margin or entropy.", show_default="low_confidence"),
]
THRESHOLD = Annotated[
    float | None, typer.Option(help="Also commit every token of at least this confidence.", show_default="off")
]
FACTOR = Annotated[
    float | None, typer.Option(help="Also commit n tokens while (n + 1)(1 - c_n) < factor.", show_default="off")
]
ENTROPY_BOUND = Annotated[
    float | None, typer.Option(help="Also commit tokens up to this sum of entropies, in nats.", show_default="off")
]
TEMPERATURE = Annotated[float, typer.Option(help="Sample at this temperature; 0 is greedy.", min=0.0)]
TOP_P = Annotated[float | None, typer.Option(help="Nucleus of the sampling.", show_default="off")]
TOP_K = Annotated[int | None, typer.Option(help="Candidates of the sampling.", show_default="off")]


def _load(model: str | None, device: str | None, dtype: str):
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    source = str(EMBEDDED_MODEL) if model is None else model
    is_hub_id = not Path(source).exists() and re.fullmatch(r"[\w.-]*\w(/[\w.-]+)?", source)
    if not is_hub_id and not Path(source, "config.json").exists():
        raise ValueError(f"`--model` must be a checkpoint folder or a Hub id, got {source!r}: no config.json there.")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"`--dtype` must be auto, float32, bfloat16 or float16, got {dtype!r}.")
    try:
        loaded = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except SafetensorError as error:
        raise ValueError(f"A safetensors file of {source!r} is damaged: {error}.") from error
    if not isinstance(loaded, MaskedDiffusionGenerationMixin):
        raise ValueError(f"`--model` must be a masked diffusion model, got {source!r}: {type(loaded).__name__}.")
    tokenizer = AutoTokenizer.from_pretrained(source)
    return loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer


def _set(**settings) -> dict:
    """The settings that were given."""
    return {name: value for name, value in settings.items() if value is not None}


def _sampling(temperature: float, top_p: float | None, top_k: int | None) -> dict:
    if temperature == 0:
        if top_p is not None or top_k is not None:
            raise ValueError(f"`--top-p` and `--top-k` need a `--temperature` above 0, got {temperature:g}: greedy.")
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, **_set(top_p=top_p, top_k=top_k)}


def _denoise(
    model, tokenizer, input_ids: list[int], live: bool | None, as_json: bool, seed: int | None, settings: dict
):
    """Runs `generate` on one prompt, shown live if asked, and returns its output."""
    generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
    call = {
        "input_ids": torch.tensor([input_ids], device=model.device),
        "generator": generator,
        "tokenizer": tokenizer,
        "return_dict_in_generate": True,
        **settings,
    }
    if live is None:
        live = sys.stdout.isatty() and not as_json
    if live:
        eos_token_ids = model.generation_config.eos_token_ids
        with LiveDenoising(tokenizer, len(input_ids), eos_token_ids) as show:
            return model.generate(on_step=show, **call)
    return model.generate(**call)


def _print_result(text: str, output, as_json: bool):
    if not as_json:
        print(text)
        return
    figures = {
        "text": text,
        "num_forward_passes": int(output.num_forward_passes[0]),
        "tokens_per_forward": round(float(output.tokens_per_forward[0]), 3),
    }
    print(json.dumps(figures, ensure_ascii=False))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The message or the text to continue; - reads standard input.")],
    model: MODEL = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Budget of the answer, in tokens.", show_default="the checkpoint's")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the chat template.", show_default="if the checkpoint has one"),
    ] = None,
    canvas: Annotated[
        str | None, typer.Option(help="growing (iLLaDA) or fixed (LLaDA).", show_default="the checkpoint's")
    ] = None,
    preset: PRESET = None,
    block_length: BLOCK_LENGTH = None,
    steps: STEPS = None,
    remasking: REMASKING = None,
    confidence_threshold: THRESHOLD = None,
    confidence_factor: FACTOR = None,
    entropy_bound: ENTROPY_BOUND = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; 1 is none.", show_default="off")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; repeatable.")] = None,
    temperature: TEMPERATURE = 0.0,
    top_p: TOP_P = None,
    top_k: TOP_K = None,
    seed: SEED = None,
    device: DEVICE = None,
    dtype: DTYPE = "auto",
    live: LIVE = None,
    trace: TRACE = None,
    as_json: JSON = False,
):
    """Answer a prompt, or continue a text, by iterative denoising.

    Example: `illada generate "Tom has 7 apples. He buys 5 more. How many apples does Tom have now?"`
    """
    check_trace_path(trace)
    prompt = sys.stdin.read() if prompt == "-" else prompt
    if not prompt.strip():
        raise ValueError(f"PROMPT must hold some text, got {prompt!r}.")
    loaded, tokenizer = _load(model, device, dtype)
    if chat if chat is not None else tokenizer.chat_template is not None:
        if tokenizer.chat_template is None:
            raise ValueError("`--chat` needs a checkpoint with a chat template, and this one has none.")
        messages = [{"role": "user", "content": prompt}]
        input_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    else:
        input_ids = tokenizer(prompt)["input_ids"]
    settings = _set(
        preset=preset,
        max_new_tokens=max_new_tokens,
        canvas=canvas,
        block_length=block_length,
        max_denoising_steps=steps,
        remasking=remasking,
        confidence_threshold=confidence_threshold,
        confidence_factor=confidence_factor,
        entropy_bound=entropy_bound,
        guidance_scale=guidance_scale,
        stop_strings=stop or None,
        output_trace=trace is not None,
    )
    settings |= _sampling(temperature, top_p, top_k)
    output = _denoise(loaded, tokenizer, input_ids, live, as_json, seed, settings)
    if trace is not None:
        write_trace(trace, tokenizer, output, first_column=len(input_ids))
    text = tokenizer.decode(output.sequences[0, len(input_ids) :], skip_special_tokens=True)
    _print_result(text.strip(), output, as_json)


@app.command()
def infill(
    text: Annotated[str, typer.Argument(help="Text with blanks: <[MASK]> is one token, <[MASK]*4> four.")],
    model: MODEL = None,
    preset: PRESET = None,
    block_length: BLOCK_LENGTH = None,
    steps: STEPS = None,
    remasking: REMASKING = None,
    confidence_threshold: THRESHOLD = None,
    confidence_factor: FACTOR = None,
    entropy_bound: ENTROPY_BOUND = None,
    temperature: TEMPERATURE = 0.0,
    top_p: TOP_P = None,
    top_k: TOP_K = None,
    seed: SEED = None,
    device: DEVICE = None,
    dtype: DTYPE = "auto",
    live: LIVE = None,
    trace: TRACE = None,
    as_json: JSON = False,
):
    """Fill the blanks of a text in place; the rest of it never changes.

    Example: `illada infill "Tom has 3 pears and<[MASK]> cups. 3 + 4 = 7, so Tom has 7 things in all."`
    """
    check_trace_path(trace)
    loaded, tokenizer = _load(model, device, dtype)
    input_ids = encode_with_blanks(tokenizer, text, loaded.generation_config.mask_token_id)
    settings = _set(
        preset=preset,
        max_new_tokens=0,
        block_length=block_length,
        max_denoising_steps=steps,
        remasking=remasking,
        confidence_threshold=confidence_threshold,
        confidence_factor=confidence_factor,
        entropy_bound=entropy_bound,
        output_trace=trace is not None,
    )
    settings |= _sampling(temperature, top_p, top_k)
    output = _denoise(loaded, tokenizer, input_ids, live, as_json, seed, settings)
    if trace is not None:
        write_trace(trace, tokenizer, output, first_column=0)
    _print_result(tokenizer.decode(output.sequences[0], skip_special_tokens=True), output, as_json)


@app.command()
def revise(
    text: Annotated[str, typer.Argument(help="Finished text; - reads standard input.")],
    model: MODEL = None,
    fraction: Annotated[
        float | None, typer.Option(help="Share of the tokens to write anew.", show_default="0.1 without --threshold")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Or: write anew every token less likely than this.", show_default="off")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of reading and writing anew.", min=1)] = 1,
    seed: SEED = None,
    temperature: TEMPERATURE = 0.0,
    top_p: TOP_P = None,
    top_k: TOP_K = None,
    device: DEVICE = None,
    dtype: DTYPE = "auto",
    as_json: JSON = False,
):
    """Write anew the tokens of a text that the model finds least likely in their context.

    Example: `illada revise "Tom has 3 pears and 4 cups. 3 + 4 = 9, so Tom has 7 things in all." --threshold 0.02`
    """
    text = sys.stdin.read() if text == "-" else text
    if not text.strip():
        raise ValueError(f"TEXT must hold some text, got {text!r}.")
    loaded, tokenizer = _load(model, device, dtype)
    output = loaded.revise(
        torch.tensor([tokenizer(text)["input_ids"]], device=loaded.device),
        fraction=0.1 if fraction is None and threshold is None else fraction,
        threshold=threshold,
        num_rounds=rounds,
        generator=None if seed is None else torch.Generator(loaded.device).manual_seed(seed),
        **_sampling(temperature, top_p, top_k),
    )
    revised = tokenizer.decode(output.sequences[0], skip_special_tokens=True)
    changes = [
        {"position": position, "to": tokenizer.decode(output.sequences[0, position])}
        for position in output.changed[0].nonzero().squeeze(-1).tolist()
    ]
    print(json.dumps({"text": revised, "changes": changes}, ensure_ascii=False) if as_json else revised)


@app.command()
def info(model: MODEL = None, as_json: JSON = False):
    """Describe a checkpoint: architecture, parameters, special ids, generation defaults.

    Example: `illada info --model ./my-checkpoint --json`
    """
    loaded, tokenizer = _load(model, "cpu", "auto")
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


app.command()(convert)
app.command()(export)
app.command()(train)
app.command("eval", context_settings=CONTEXT_SETTINGS)(evaluate)
app.command()(demo)


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
