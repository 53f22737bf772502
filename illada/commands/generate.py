"""`illada generate`."""

import sys
from typing import Annotated

import typer

from ..text.blanks import spell_blanks
from ..text.prompts import encode_prompt
from ..text.trace import check_trace_path, write_trace
from .live import is_live, run_generate
from .options import (
    DecodingOptions,
    JsonFlag,
    LiveFlag,
    ModelOptions,
    ResponseOptions,
    SamplingOptions,
    TraceOption,
    expand_options,
)
from .results import print_result


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
    input_ids = encode_prompt(tokenizer, text, chat)
    settings |= {"output_trace": trace is not None, "generator": sampling.generator(model.device)}
    live = is_live(live) and not (as_json and live is None)
    output = run_generate(model, tokenizer, input_ids, live, **settings)
    if trace is not None:
        write_trace(trace, tokenizer, output, first_column=len(input_ids))
    written = tokenizer.batch_decode(
        [output.sequences[0, : len(input_ids)], output.sequences[0, len(input_ids) :]], skip_special_tokens=True
    )
    filled = {"prompt": written[0]} if text != prompt or model.generation_config.mask_token_id in input_ids else {}
    print_result({"text": written[1].strip(), **filled}, output, as_json)
