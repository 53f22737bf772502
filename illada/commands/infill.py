"""`illada infill`."""

from typing import Annotated

import typer

from ..text.blanks import encode_with_blanks
from ..text.trace import check_trace_path, write_trace
from .live import is_live, run_generate
from .options import DecodingOptions, JsonFlag, LiveFlag, ModelOptions, SamplingOptions, TraceOption, expand_options
from .results import print_result


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
    print_result({"text": tokenizer.decode(output.sequences[0], skip_special_tokens=True)}, output, as_json)
