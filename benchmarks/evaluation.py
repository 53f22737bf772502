"""Pairs per second of the scores, batched against one pair at a time: `python benchmarks/evaluation.py`.

64 multiple-choice items with 4 candidates of 5 to 40 tokens each, on a model with random weights. The ways are timed
in turn within each round, and each figure is the median over the rounds:

- batched: all pairs in one call;
- one at a time: the same function, one pair a call (and one mask a forward);
- released: one pair at a time as the released script does it, with the logits of every position in every forward.

One pair at a time is timed on a sample of the pairs that is spread evenly over the lengths, and the rate is scaled by
the forwards that the rest would take; `--sampled 256` times them all.

GFLOP/s counts the matrix products of the linear layers over real tokens, without padding and attention. Beside them
stands what the same layers reach with nothing between them, at one sequence and at a batch: the ceiling.
"""

import functools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from illada import ILLaDAConfig, ILLaDAForCausalLM
from illada.evaluation import confidence_score, monte_carlo_log_likelihood

SHAPES = {
    "30m": {
        "hidden_size": 256,
        "num_hidden_layers": 32,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 896,
        "vocab_size": 9696,
    },
    "8b": {},
}


def make_pairs(num_items: int, vocab_size: int) -> list[tuple[list[int], list[int]]]:
    """Four candidates of 5 to 40 tokens after each question of 8 to 24, all random."""
    generator = torch.Generator().manual_seed(0)

    def text(shortest: int, longest: int) -> list[int]:
        length = int(torch.randint(shortest, longest + 1, (), generator=generator))
        return torch.randint(6, vocab_size, (length,), generator=generator).tolist()

    contexts = [text(8, 24) for _ in range(num_items)]
    return [(context, text(5, 40)) for context in contexts for _ in range(4)]


@torch.no_grad()
def released_confidence_score(model, context: list[int], candidate: list[int]) -> float:
    """The published algorithm in its plain form: batch 1, all logits, a softmax over all of them."""
    tokens = torch.tensor([context + candidate], device=model.device)
    masked = torch.zeros_like(tokens, dtype=torch.bool)
    masked[:, len(context) :] = True
    score = 0.0
    while masked.any():
        logits = model(tokens.masked_fill(masked, model.config.mask_token_id)).logits
        log_probs = logits.float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        best = log_probs.masked_fill(~masked, -torch.inf).argmax()
        score += log_probs[0, best].item()
        masked[0, best] = False
    return score


def trunk_layers(model) -> list[torch.nn.Linear]:
    return [module for module in model.model.modules() if isinstance(module, torch.nn.Linear)]


def operations(model, num_tokens: int, num_logits: int) -> int:
    """Floating-point operations of the linear layers: tokens pass the trunk, and some of them the head."""
    trunk = sum(layer.weight.numel() for layer in trunk_layers(model))
    return 2 * (trunk * num_tokens + model.lm_head.weight.numel() * num_logits)


@torch.no_grad()
def run_trunk_layers(model, rows: int, width: int):
    """All linear layers of the trunk, one after the other: no attention and nothing elementwise."""
    inputs: dict[int, torch.Tensor] = {}
    for layer in trunk_layers(model):
        if layer.in_features not in inputs:
            inputs[layer.in_features] = layer.weight.new_ones(rows, width, layer.in_features)
        layer(inputs[layer.in_features])


def seconds(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "30m",
    items: Annotated[int, typer.Option(help="Multiple-choice items of 4 candidates.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Pairs in a forward.")] = 32,
    sampled: Annotated[int, typer.Option(help="Pairs that are timed one at a time.")] = 16,
    rounds: Annotated[int, typer.Option(help="Rounds, of which the medians are printed.")] = 3,
    device: Annotated[str, typer.Option(help="Device, such as cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
):
    """Print pairs per second of each way, and its ratio to one pair at a time."""
    torch.manual_seed(0)
    with torch.device(device):
        model = ILLaDAForCausalLM(ILLaDAConfig(**SHAPES[shape])).to(getattr(torch, dtype)).eval()
    pairs = make_pairs(items, model.config.vocab_size)
    by_length = sorted(pairs, key=lambda pair: len(pair[1]))
    stride = max(1, len(pairs) // sampled)
    sample = by_length[stride // 2 :: stride]
    work = sum(len(candidate) for _, candidate in pairs) / sum(len(candidate) for _, candidate in sample)

    # A candidate of L tokens in a canvas of T takes L forwards with L, L - 1, ... 1 masks; or 4 with (L + 1) / 2 on
    # average.
    lengths = [(len(candidate), len(context) + len(candidate)) for context, candidate in pairs]
    num_operations = {
        "confidence score": operations(
            model, sum(length * width for length, width in lengths), sum(n * (n + 1) // 2 for n, _ in lengths)
        ),
        "likelihood of 4 masks": operations(
            model, sum(4 * width for _, width in lengths), sum(2 * (length + 1) for length, _ in lengths)
        ),
    }
    mean_width = sum(length * width for length, width in lengths) // sum(length for length, _ in lengths)

    def likelihoods(pairs, batch_size):
        return monte_carlo_log_likelihood(model, pairs, num_samples=4, sampling="stratified", batch_size=batch_size)

    ways: dict[str, tuple[Callable[[], object], float]] = {
        "confidence score, batched": (lambda: confidence_score(model, pairs, batch_size=batch_size), 1),
        "confidence score, one at a time": (lambda: [confidence_score(model, [pair]) for pair in sample], work),
        "confidence score, released": (lambda: [released_confidence_score(model, *pair) for pair in sample], work),
        "likelihood of 4 masks, batched": (lambda: likelihoods(pairs, batch_size), 1),
        "likelihood of 4 masks, one at a time": (
            lambda: [likelihoods([pair], 1) for pair in sample],
            len(pairs) / len(sample),
        ),
    }
    layers = {f"{rows} x {mean_width} tokens": rows for rows in (1, batch_size)}
    likelihoods(pairs[:batch_size], batch_size)  # warm up
    times: dict[str, list[float]] = {name: [] for name in [*ways, *layers]}
    for _ in range(rounds):
        for name, (run, scale) in ways.items():
            times[name].append(seconds(run) * scale)
        for name, rows in layers.items():
            run = functools.partial(run_trunk_layers, model, rows, mean_width)
            times[name] += [seconds(run) for _ in range(5)]

    medians = {name: statistics.median(values) for name, values in times.items()}
    table = {}
    for name in ways:
        score = name.rpartition(",")[0]
        table[name] = {
            "pairs_per_second": len(pairs) / medians[name],
            "gflops": num_operations[score] / medians[name] / 1e9,
            "ratio": medians[f"{score}, one at a time"] / medians[name],
        }
    ceilings = {name: operations(model, rows * mean_width, 0) / medians[name] / 1e9 for name, rows in layers.items()}
    print("| score | pairs/s | GFLOP/s | times one at a time |\n| --- | --- | --- | --- |")
    for name, row in table.items():
        print(f"| {name} | {row['pairs_per_second']:.2f} | {row['gflops']:.0f} | {row['ratio']:.2f} |")
    for name, gflops in ceilings.items():
        print(f"| linear layers alone, {name} | | {gflops:.0f} | |")
    if output is not None:
        device_name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
        setting = {
            "shape": shape,
            "pairs": len(pairs),
            "sampled": len(sample),
            "batch_size": batch_size,
            "rounds": rounds,
            "dtype": dtype,
            "device": f"{device}, {device_name}, {platform.machine()}",
            "torch": torch.__version__,
        }
        figures = {"setting": setting, "results": table, "linear_layers_gflops": ceilings}
        output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
