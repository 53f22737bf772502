"""Exact match of a model on held-out examples of each family: `python benchmarks/exact_match.py [MODEL]`.

Every example is judged by a program (`Example.is_correct`). The prompts of one family go through `generate` in
left-padded batches; the blanks of plain documents are filled in place.
"""

from collections.abc import Iterator
from typing import Annotated

import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

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


def evaluate_family(model, tokenizer, family: str, count: int, batch_size: int, **settings) -> dict[str, float]:
    """Share of right answers and mean tokens per forward over `count` held-out examples."""
    return evaluate_examples(model, tokenizer, held_out_examples(family, count), batch_size, **settings)


def evaluate_examples(model, tokenizer, examples: list[Example], batch_size: int, **settings) -> dict[str, float]:
    """Share of right answers and mean tokens per forward over examples of one family."""
    correct, tokens_per_forward = 0, 0.0
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        inputs = tokenizer.pad({"input_ids": [prompt_ids(tokenizer, e) for e in batch]}, return_tensors="pt")
        length = 0 if not batch[0].prompt else inputs["input_ids"].shape[1]
        new = {"max_new_tokens": 64 if batch[0].prompt else 0}
        output = model.generate(**inputs.to(model.device), return_dict_in_generate=True, **new, **settings)
        texts = tokenizer.batch_decode(output.sequences[:, length:], skip_special_tokens=True)
        correct += sum(example.is_correct(text) for example, text in zip(batch, texts))
        tokens_per_forward += output.tokens_per_forward.sum().item()
    return {"exact_match": correct / len(examples), "tokens_per_forward": tokens_per_forward / len(examples)}


def markdown_table(model, tokenizer, count: int, batch_size: int) -> Iterator[str]:
    """The lines of a table of exact match and tokens per forward, a family each."""
    yield f"| family | exact match of {count} | tokens per forward |"
    yield "| --- | --- | --- |"
    for family in FAMILIES:
        figures = evaluate_family(model, tokenizer, family, count, batch_size)
        yield "| {} | {exact_match:.1%} | {tokens_per_forward:.2f} |".format(family, **figures)


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint folder.")] = str(EMBEDDED_MODEL),
    count: Annotated[int, typer.Option(help="Held-out examples of each family.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Prompts in a batch.")] = 50,
):
    """Print a table of exact match and tokens per forward for each family."""
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    for line in markdown_table(loaded, AutoTokenizer.from_pretrained(model), count, batch_size):
        print(line, flush=True)


if __name__ == "__main__":
    typer.run(main)
