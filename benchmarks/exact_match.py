"""Exact match of a model on held-out examples of each family: `python benchmarks/exact_match.py [MODEL]`.

Every example is judged by a program (`Example.is_correct`). The prompts of one family go through `generate_batch`; the
blanks of plain documents are filled in place.
"""

from collections.abc import Iterator
from typing import Annotated

import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig

from illada import EMBEDDED_MODEL
from illada.text.prompts import encode_prompt
from illada.tiny.corpus import FAMILIES, Example, held_out_examples


def prompt_ids(tokenizer, example: Example) -> list[int]:
    """The chat prompt, or the document with a [MASK] for each token that a blank hides."""
    if example.prompt:
        return encode_prompt(tokenizer, example.prompt)
    encoding = tokenizer(example.text, return_offsets_mapping=True, add_special_tokens=False)
    ids = [
        tokenizer.mask_token_id if any(start < e and s < end for s, e in example.blanks) else token
        for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"])
    ]
    return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]


def evaluate_family(model, tokenizer, family: str, count: int, rows: int, **settings) -> dict[str, float]:
    """Share of right answers and mean tokens per forward over `count` held-out examples."""
    return evaluate_examples(model, tokenizer, held_out_examples(family, count), rows, **settings)


def evaluate_examples(model, tokenizer, examples: list[Example], rows: int, **settings) -> dict[str, float]:
    """Share of right answers and mean tokens per forward over examples of one family, `rows` at a time."""
    is_document = not examples[0].prompt
    results = model.generate_batch(
        [prompt_ids(tokenizer, example) for example in examples],
        continuous_batching_config=ContinuousBatchingConfig(max_requests_per_batch=rows),
        max_new_tokens=0 if is_document else 64,
        **settings,
    ).values()
    correct, tokens_per_forward = 0, 0.0
    for example, result in zip(examples, results):
        if result.exception is not None:
            raise result.exception
        tokens = result.prompt_ids if is_document else result.generated_tokens
        correct += example.is_correct(tokenizer.decode(tokens, skip_special_tokens=True))
        tokens_per_forward += result.tokens_per_forward
    return {"exact_match": correct / len(examples), "tokens_per_forward": tokens_per_forward / len(examples)}


def markdown_table(model, tokenizer, count: int, rows: int) -> Iterator[str]:
    """The lines of a table of exact match and tokens per forward, a family each."""
    yield f"| family | exact match of {count} | tokens per forward |"
    yield "| --- | --- | --- |"
    for family in FAMILIES:
        figures = evaluate_family(model, tokenizer, family, count, rows)
        yield "| {} | {exact_match:.1%} | {tokens_per_forward:.2f} |".format(family, **figures)


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint folder.")] = str(EMBEDDED_MODEL),
    count: Annotated[int, typer.Option(help="Held-out examples of each family.")] = 200,
    rows: Annotated[int, typer.Option(help="Texts that are written at a time.")] = 50,
):
    """Print a table of exact match and tokens per forward for each family."""
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    for line in markdown_table(loaded, AutoTokenizer.from_pretrained(model), count, rows):
        print(line, flush=True)


if __name__ == "__main__":
    typer.run(main)
