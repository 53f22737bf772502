"""`illada infill`."""

from typing import Annotated

import typer

from ..text.blanks import check_blanks, encode_with_blanks
from ..text.trace import check_trace_path, write_trace
from .live import run_generate
from .options import (
    DecodingOptions,
    JsonFlag,
    LiveOptions,
    ModelOptions,
    SamplingOptions,
    TraceOption,
    check_settings,
    expand_options,
    read_text,
)
from .results import print_result


@expand_options
def infill(
    text: Annotated[
        str, typer.Argument(help="Text with blanks: <[MASK]> is one token, <[MASK]*4> four; - reads standard input.")
    ],
    source: ModelOptions,
    decoding: DecodingOptions,
    sampling: SamplingOptions,
    view: LiveOptions,
    trace: TraceOption = None,
    as_json: JsonFlag = False,
):
    """Fill the blanks of a text in place; the rest of it never changes.

    Example: `illada infill "Today Tom has 3 pears and<[MASK]> cups. 3 + 4 = 7, so Tom has 7 things in all."`
    """
    text = read_text(text, "text")
    check_blanks(text)
    check_trace_path(trace)
    settings = decoding.settings() | sampling.settings() | {"max_new_tokens": 0}
    check_settings(settings)

    checkpoint = source.open()
    tokenizer = checkpoint.tokenizer
    input_ids = encode_with_blanks(tokenizer, text, checkpoint.generation_config.mask_token_id)
    check_settings(settings, checkpoint, len(input_ids))

    model = source.load(checkpoint)
    settings |= {"output_trace": trace is not None, "generator": sampling.generator(model.device)}
    output = run_generate(model, tokenizer, input_ids, view.seconds(as_json), **settings)
    if trace is not None:
        write_trace(trace, tokenizer, output, first_column=0)
    print_result({"text": tokenizer.decode(output.sequences[0], skip_special_tokens=True)}, output, as_json)
