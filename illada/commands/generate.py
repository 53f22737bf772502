"""`illada generate`."""

from typing import Annotated

import typer

from ..text.blanks import spell_blanks
from ..text.prompts import encode_prompt
from ..text.trace import check_trace_path, write_trace
from .live import run_generate
from .options import (
    DecodingOptions,
    JsonFlag,
    LiveOptions,
    ModelOptions,
    ResponseOptions,
    SamplingOptions,
    TraceOption,
    check_settings,
    expand_options,
    read_text,
)
from .results import finish_reason, print_result, tell_if_cut


@expand_options
def generate(
    prompt: Annotated[
        str, typer.Argument(help="The message or the text to continue; - reads standard input. May contain blanks.")
    ],
    source: ModelOptions,
    response: ResponseOptions,
    decoding: DecodingOptions,
    sampling: SamplingOptions,
    view: LiveOptions,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the chat template.", show_default="if the checkpoint has one"),
    ] = None,
    trace: TraceOption = None,
    as_json: JsonFlag = False,
):
    """Answer a prompt, or continue a text, by iterative denoising.

    Example: `illada generate "Tom has 7 apples. He buys 5 more. How many apples does Tom have now?"`

    Blanks of the prompt, written as for `illada infill`, are filled first; `--json` shows the filled prompt. With
    `--max-new-tokens 0` nothing is appended, and the filled prompt is the text.
    """
    prompt = read_text(prompt, "prompt")
    check_trace_path(trace)
    settings = decoding.settings() | response.settings() | sampling.settings()
    check_settings(settings)

    checkpoint = source.open()
    tokenizer, mask_token_id = checkpoint.tokenizer, checkpoint.generation_config.mask_token_id
    text = spell_blanks(prompt, tokenizer.convert_ids_to_tokens(mask_token_id))
    input_ids = encode_prompt(tokenizer, text, chat)
    check_settings(settings, checkpoint, len(input_ids))

    model = source.load(checkpoint)
    settings |= {"output_trace": trace is not None, "generator": sampling.generator(model.device)}
    output = run_generate(model, tokenizer, input_ids, view.seconds(as_json), **settings)
    if trace is not None:
        write_trace(trace, tokenizer, output, first_column=len(input_ids))
    filled, answer = tokenizer.batch_decode(
        [output.sequences[0, : len(input_ids)], output.sequences[0, len(input_ids) :]], skip_special_tokens=True
    )
    reason = finish_reason(output, len(input_ids), checkpoint.generation_config.eos_token_ids, answer, response.stop)
    result = {"text": answer.strip(), "finish_reason": reason}
    if settings.get("max_new_tokens") == 0:
        result, reason = {"text": filled, "finish_reason": "stop"}, "stop"
    print_result(result | ({"prompt": filled} if mask_token_id in input_ids else {}), output, as_json)
    if not as_json:
        tell_if_cut(reason)
