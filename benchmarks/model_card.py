"""Measures a checkpoint and writes its model card, MODEL/README.md: `python benchmarks/model_card.py [MODEL]`."""

import itertools
import json
import random
from pathlib import Path
from typing import Annotated

import matplotlib
import typer
from exact_match import markdown_table
from huggingface_hub import ModelCard, ModelCardData
from matplotlib import pyplot as plt
from transformers import AutoModelForCausalLM, AutoTokenizer

from illada import EMBEDDED_MODEL
from illada.tiny.corpus import DIFFICULTIES, FAMILIES, held_out_examples, training_examples
from illada.training.settings import read_settings

matplotlib.use("Agg")

OPENING = read_settings("illada-tiny")[1].corpus_opening

CARD = """# illada-tiny

A masked diffusion language model of {parameters:,} parameters, trained from scratch as a diffusion model. It comes
with the package `illada`, so that everything there can be tried offline; it knows nothing but the five kinds of text
below.

| family | prompt | what it writes |
| --- | --- | --- |
{examples}

## Figures

Greedy, one token per forward pass, on held-out examples that training never saw
(`python benchmarks/model_card.py`). A word problem counts if its final number is right, a grid if the puzzle is
solved, all else if the text is equal. Tokens per forward fall below 1 where passes go to tokens behind the end of the
answer.

{table}

No held-out prompt or document is in the training text. The split is what sees to that: of {drawn:,} examples drawn
freely from each family, these shares had their like among {trained:,} training examples: {overlap}.

## Training

`illada train illada-tiny output_dir=FOLDER` repeats it, with the settings of
`illada/training/recipes/illada-tiny.yaml`: {steps:,} steps of 16 windows of 64 tokens of synthetic text
({tokens:.1f} million tokens), AdamW, seed 0, in fp32, about an hour on one CPU core. Examples are concatenated and
windows end anywhere, so that the end of a canvas does not give the length of an answer away. The prompt at the
beginning of a window stays visible, everything behind it may be masked. {opening}
come before the mixture of the families: the copying that they teach is hardly ever learnt in the mixture from the
start.

![Training loss](loss.png)

Special ids are iLLaDA's: bos 0, pad 1, eos 2, [MASK] 5. Text is English, of a vocabulary of about a hundred words;
anything else can be encoded, and is not understood. Numbers stay within 0 and 20, lists have three or four of them,
and four people stand in a line.
"""


def free_overlap(drawn: int, trained: int) -> str:
    """Shares of freely drawn examples of each family whose content is among the first `trained` training examples."""
    stream = training_examples(seed=0, opening=OPENING)
    seen = {example.content for example in itertools.islice(stream, trained)}
    shares = []
    for family, (generate_example, _) in FAMILIES.items():
        rng = random.Random(family)
        examples = [generate_example(rng, DIFFICULTIES["easy"]) for _ in range(drawn)]
        shares.append(f"{family} {sum(example.content in seen for example in examples) / drawn:.1%}")
    return ", ".join(shares)


def write_card(folder: Path, table: str, parameters: int, drawn: int = 1000, trained: int = 100_000):
    """Writes the model card and the picture of the training loss from the checkpoint's own files."""
    log = json.loads((folder / "training_log.json").read_text())
    examples = []
    for family in FAMILIES:
        example = held_out_examples(family, 1)[0]
        examples.append(f"| {family} | {example.prompt or example.with_blanks('░')} | {example.text} |")
    steps = log[-1]["step"]
    content = CARD.format(
        parameters=parameters,
        examples="\n".join(examples),
        table=table,
        drawn=drawn,
        trained=trained,
        overlap=free_overlap(drawn, trained),
        steps=steps,
        opening=" and ".join(f"{count:,} examples of `{family}`" for family, count in OPENING.items()),
        tokens=steps * 16 * 64 / 1e6,
    )
    data = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["masked-diffusion", "illada"],
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{content}").save(folder / "README.md")

    points = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.plot(*zip(*points))
    axes.set(xlabel="step", ylabel="loss in nats per token", title="illada-tiny: training loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(folder / "loss.png", dpi=100)


def main(
    model: Annotated[Path, typer.Argument(help="Checkpoint folder with its training_log.json.")] = EMBEDDED_MODEL,
    count: Annotated[int, typer.Option(help="Held-out examples of each family.")] = 200,
    rows: Annotated[int, typer.Option(help="Texts that are written at a time.")] = 50,
):
    """Measure exact match for each family and write the model card and the loss curve."""
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    table = "\n".join(markdown_table(loaded, AutoTokenizer.from_pretrained(model), count, rows))
    print(table)
    write_card(model, table, sum(parameter.numel() for parameter in loaded.parameters()))


if __name__ == "__main__":
    typer.run(main)
