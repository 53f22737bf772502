"""`illada revise`."""

import json
from typing import Annotated

import torch
import typer

from ..revision import FILLING, check_revision
from .errors import WrongUsage
from .options import JsonFlag, ModelOptions, SamplingOptions, check_settings, expand_options, read_text


@expand_options
def revise(
    text: Annotated[str, typer.Argument(help="Finished text; - reads standard input.")],
    source: ModelOptions,
    sampling: SamplingOptions,
    fraction: Annotated[
        float | None, typer.Option(help="Share of the tokens to rewrite.", show_default="0.1 without --threshold")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Or: rewrite every token less likely than this.", show_default="off")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of scoring and rewriting.", min=1)] = 1,
    as_json: JsonFlag = False,
):
    """Rewrite the tokens of a text that the model finds least likely in their context.

    Example: `illada revise "Today Tom has 3 pears and 4 cups. 3 + 4 = 9, so Tom has 7 things in all." --threshold .02`
    """
    text = read_text(text, "text")
    fraction = 0.1 if fraction is None and threshold is None else fraction
    try:
        check_revision(fraction, threshold, rounds, None)
    except ValueError as error:
        raise WrongUsage(str(error)) from error
    settings = sampling.settings()
    check_settings(settings)

    checkpoint = source.open()
    tokenizer = checkpoint.tokenizer
    input_ids = tokenizer(text)["input_ids"]
    if checkpoint.generation_config.mask_token_id in input_ids:
        raise WrongUsage(f"`text` must be finished, got {text!r}: `illada infill` fills blanks.")
    check_settings(settings | FILLING, checkpoint, len(input_ids))

    model = source.load(checkpoint)
    output = model.revise(
        torch.tensor([input_ids], device=model.device),
        fraction=fraction,
        threshold=threshold,
        num_rounds=rounds,
        generator=sampling.generator(model.device),
        **settings,
    )
    revised = tokenizer.decode(output.sequences[0], skip_special_tokens=True)
    changes = [
        {"position": position, "to": tokenizer.decode(output.sequences[0, position])}
        for position in output.changed[0].nonzero().squeeze(-1).tolist()
    ]
    print(json.dumps({"text": revised, "changes": changes}, ensure_ascii=False) if as_json else revised)
