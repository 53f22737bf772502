"""Trains and compares a diffusion model and an autoregressive Llama of the same shape on the same text.

    python benchmarks/diffusion_vs_autoregressive.py train autoregressive OUTPUT
    python benchmarks/diffusion_vs_autoregressive.py train diffusion OUTPUT --examples 1000 max_steps=6000
    python benchmarks/diffusion_vs_autoregressive.py compare FOLDER ...

Both read the same windows of the same tokenizer in the same number of steps, with the optimiser and the schedule of
the embedded model's recipe; further settings of the recipe can be given as `name=value`. With `--examples` the corpus
is limited to its first examples, read again, in another order, in every epoch. The autoregressive model learns the
next token at every place. It has no [MASK]: it fills a blank from what stands to its left, all that it can read.
"""

import itertools
import json
import random
import time
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated

import matplotlib
import torch
import typer
from exact_match import evaluate_examples, prompt_ids
from matplotlib import pyplot as plt
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, set_seed

from illada import ILLaDAConfig
from illada.tiny.corpus import FAMILIES, Example, held_out_examples, training_examples
from illada.training.data import CorpusWindows, Encoded, encode, windows
from illada.training.recipe import build_trainer, load_tokenizer
from illada.training.settings import read_settings

matplotlib.use("Agg")

app = typer.Typer(add_completion=False)


class Kind(str, Enum):
    diffusion = "diffusion"
    autoregressive = "autoregressive"


class RepeatedWindows(IterableDataset):
    """Windows over the first `count` training examples, again and again, shuffled in every epoch.

    The opening draws its examples from the same ones.
    """

    def __init__(self, tokenizer, length: int, seed: int, difficulty: str, opening: dict[str, int], count: int):
        self.examples = list(itertools.islice(training_examples(seed, difficulty), count))
        self.encoded = encode(tokenizer, self.examples)
        self.length, self.seed, self.opening = length, seed, opening

    def __iter__(self) -> Iterator[dict[str, list]]:
        rng = random.Random(self.seed)
        openings = (rng.choices(self._of(family), k=count) for family, count in self.opening.items())
        epochs = (rng.sample(self.encoded, len(self.encoded)) for _ in itertools.count())
        return windows(itertools.chain.from_iterable(itertools.chain(openings, epochs)), self.length)

    def _of(self, family: str) -> list[Encoded]:
        return [encoded for encoded, example in zip(self.encoded, self.examples) if example.family == family]


def causal_collator(features: list[dict[str, list]]) -> dict[str, torch.Tensor]:
    """Next-token prediction everywhere in the window."""
    input_ids = torch.tensor([feature["input_ids"] for feature in features])
    return {"input_ids": input_ids, "labels": input_ids.clone()}


@app.command()
def train(
    kind: Kind,
    output: Path,
    settings: Annotated[list[str] | None, typer.Argument(help="Settings of the recipe, name=value.")] = None,
    examples: Annotated[int | None, typer.Option(help="Size of the limited corpus; endless if absent.")] = None,
):
    """Train one of the two models by the embedded model's recipe."""
    overrides = [f"output_dir={output}/checkpoints", *(settings or ())]
    model_settings, data, arguments = read_settings("illada-tiny", overrides)
    corpus = (data.length, arguments.seed, data.corpus_difficulty, data.corpus_opening)
    if kind is Kind.diffusion:
        trainer = build_trainer(model_settings, data, arguments)
        tokenizer = trainer.processing_class
    else:
        set_seed(arguments.seed)
        tokenizer = load_tokenizer(model_settings)
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "pad_token_id", "eos_token_id")}
        tied = {"tie_word_embeddings": ILLaDAConfig().tie_word_embeddings}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **special, **tied, **model_settings.config))
        text = CorpusWindows(tokenizer, *corpus)
        trainer = Trainer(model=model, args=arguments, train_dataset=text, data_collator=causal_collator)
    if examples:
        trainer.train_dataset = RepeatedWindows(tokenizer, *corpus, examples)
    trainer.train()
    trainer.model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "training_log.json").write_text(json.dumps(trainer.state.log_history))


@torch.no_grad()
def fill_from_the_left(model, tokenizer, batch: list[Example]) -> list[str]:
    """Fills each blank with the likeliest token given all that stands to its left; given tokens are kept."""
    texts = []
    for example in batch:
        ids = torch.tensor([prompt_ids(tokenizer, example)])
        for position in (ids[0] == tokenizer.mask_token_id).nonzero().flatten().tolist():
            ids[0, position] = model(ids[:, :position], logits_to_keep=1).logits[0, -1].argmax()
        texts.append(tokenizer.decode(ids[0], skip_special_tokens=True))
    return texts


def continue_prompts(model, tokenizer, batch: list[Example]) -> list[str]:
    """Greedy answers by Transformers' own `generate`, with its key-value cache."""
    inputs = tokenizer.pad({"input_ids": [prompt_ids(tokenizer, e) for e in batch]}, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def exact_match_from_the_left(model, tokenizer, examples: list[Example], batch_size: int) -> float:
    """Share of right answers of an autoregressive model."""
    answer = continue_prompts if examples[0].prompt else fill_from_the_left
    batches = [examples[start : start + batch_size] for start in range(0, len(examples), batch_size)]
    answers = [text for batch in batches for text in answer(model, tokenizer, batch)]
    return sum(example.is_correct(text) for example, text in zip(examples, answers)) / len(examples)


def tests(count: int) -> dict[str, list[Example]]:
    """Held-out examples of each family; an ordering asked from the front and one asked from the back are two tests."""
    examples = {family: held_out_examples(family, count) for family in FAMILIES if family != "ordering"}
    orderings = held_out_examples("ordering", 2 * count)
    for name, end in (("ordering, forward", "front?"), ("ordering, reversed", "back?")):
        examples[name] = [example for example in orderings if example.prompt.endswith(end)]
    return examples


def measure(folder: Path, count: int, batch_size: int) -> list[dict]:
    """Exact match, tokens per forward and seconds of a checkpoint in each test; a diffusion model in both presets."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    is_diffusion = model.config.model_type == "illada"
    rows = []
    for preset in ("exact", "fast") if is_diffusion else (None,):
        for test, examples in tests(count).items():
            start = time.perf_counter()
            if is_diffusion:
                figures = evaluate_examples(model, tokenizer, examples, batch_size, preset=preset)
            else:
                exact_match = exact_match_from_the_left(model, tokenizer, examples, batch_size)
                figures = {"exact_match": exact_match, "tokens_per_forward": 1.0}
            seconds = time.perf_counter() - start
            rows.append({"model": folder.name, "preset": preset, "test": test, "seconds": seconds, **figures})
    return rows


def draw(results: dict[str, dict[str, dict]], path: Path):
    """Bars of exact match, a group for each test."""
    names = list(tests(1))
    width = 0.8 / len(results)
    figure, axes = plt.subplots(figsize=(10, 3.6), layout="constrained")
    for place, (model, by_test) in enumerate(results.items()):
        heights = [100 * by_test[test]["exact_match"] for test in names]
        axes.bar([group + width * (place + 0.5) - 0.4 for group in range(len(names))], heights, width, label=model)
    axes.set(xticks=range(len(names)), xticklabels=names, ylabel="exact match (%)", ylim=(0, 105))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    figure.savefig(path, dpi=110)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Trained models, by either kind.")],
    count: Annotated[int, typer.Option(help="Held-out examples of each test.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Prompts in a batch.")] = 50,
    picture: Annotated[Path | None, typer.Option(help="Where exact match is drawn.")] = None,
):
    """Print exact match, tokens per forward and seconds of each model in each test, a table each."""
    torch.set_num_threads(1)
    results: dict[str, dict[str, dict]] = {}
    for folder in folders:
        for row in measure(folder, count, batch_size):
            name = f"{row['model']}, {row['preset']}" if row["preset"] else row["model"]
            results.setdefault(name, {})[row["test"]] = row
    if picture is not None:
        draw(results, picture)
    for figure, form in (("exact_match", "{:.1%}"), ("tokens_per_forward", "{:.2f}"), ("seconds", "{:.1f}")):
        names = list(tests(1))
        typer.echo(f"\n| {figure.replace('_', ' ')} | {' | '.join(names)} |")
        typer.echo("| --- " * (len(names) + 1) + "|")
        for model, by_test in results.items():
            cells = " | ".join(form.format(by_test[test][figure]) for test in names)
            typer.echo(f"| {model} | {cells} |")


if __name__ == "__main__":
    app()
