"""`illada revise`."""

import json
import sys
from typing import Annotated

import torch
import typer

from .options import JsonFlag, ModelOptions, SamplingOptions, expand_options


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
