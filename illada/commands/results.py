"""What a command prints when it is done."""

import json
import sys

from ..generation import MaskedDiffusionGenerationOutput


def print_result(result: dict, output: MaskedDiffusionGenerationOutput, as_json: bool):
    """Prints the text of a result, or all of it and the figures of the denoising as a JSON object."""
    if not as_json:
        print(result["text"])
        return
    figures = {
        "num_forward_passes": int(output.num_forward_passes[0]),
        "tokens_per_forward": round(float(output.tokens_per_forward[0]), 3),
    }
    print(json.dumps(result | figures, ensure_ascii=False))


def finish_reason(
    output: MaskedDiffusionGenerationOutput,
    prompt_length: int,
    eos_token_ids: list[int],
    answer: str,
    stop: list[str] | None,
) -> str:
    """`stop` if the answer ends with an EOS or a stop string, `length` if its budget was used up."""
    ends = not set(eos_token_ids).isdisjoint(output.sequences[0, prompt_length:].tolist())
    return "stop" if ends or any(string in answer for string in stop or []) else "length"


def tell_if_cut(reason: str):
    """Says on standard error that an answer was cut."""
    if reason == "length":
        print("illada: the answer was cut at its maximum number of tokens (--max-new-tokens).", file=sys.stderr)
