"""Requests and tokens per second of mixed traffic: `python benchmarks/throughput.py`.

Prompts of 16 to 512 tokens and answers of 8 to 256, under several settings; a fixed seed draws them. Three ways to
write the same requests are run in turn, one round after the other, and figures are medians over rounds:

- `engine`: `generate_batch` with 8 rows, in which a row is free for the next request as soon as a text is done;
- `batches`: `generate` in batches of 8 in order of arrival, requests of like settings together, whose rows retire when
  they reach their own end;
- `one at a time`: `generate` for each request.

The model has random weights, since time does not depend on them. EOS is switched off, and a request ends after its
own budget: in `batches` a stopping criterion ends each row there.
"""

import json
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated

import matplotlib
import torch
import transformers
import typer
from matplotlib import pyplot as plt
from speed import SHAPES, Shape
from transformers import ContinuousBatchingConfig
from transformers.utils import logging

from illada import ILLaDAConfig, ILLaDAForCausalLM

matplotlib.use("Agg")
logging.set_verbosity_error()

DOCS = Path(__file__).parents[1] / "docs"
ROWS = 8
KINDS: list[dict] = [
    {"block_length": 8},  # short answers of 8, 16 or 24 tokens
    {"block_length": 32},
    {"block_length": 32},
    {"block_length": 32},
    {"block_length": 32, "max_denoising_steps": 8},  # four tokens a pass
    {"block_length": 32, "remasking": "margin"},
]
"""What requests ask for, in turn."""


def traffic(count: int, longest_prompt: int, longest_answer: int) -> list[dict]:
    """Requests as arguments of `add_request`, with lengths spread evenly over their logarithm.

    Answers are whole blocks, since `generate` asks at the end of a block whether a row stops.
    """
    generator = torch.Generator().manual_seed(0)

    def length(low: int, high: int) -> int:
        return round(low * (high / low) ** torch.rand((), generator=generator).item())

    requests = []
    for index in range(count):
        kind = KINDS[index % len(KINDS)]
        block = kind["block_length"]
        num_tokens = length(8, 24) if block == 8 else length(32, longest_answer)
        prompt = torch.randint(6, 500, (length(16, longest_prompt),), generator=generator).tolist()
        requests.append({"input_ids": prompt, "max_new_tokens": -(-num_tokens // block) * block, **kind})
    return requests


def one_at_a_time(model, requests: list[dict], shared: dict) -> tuple[int, float]:
    for request in requests:
        settings = {**request, **shared}
        model.generate(torch.tensor([settings.pop("input_ids")]), **settings)
    return sum(request["max_new_tokens"] for request in requests), 1.0


def in_batches(model, requests: list[dict], shared: dict) -> tuple[int, float]:
    """Static batches of requests with the same settings, in order of arrival."""
    useful = total = 0
    groups: dict[str, list[dict]] = {}
    for request in requests:
        own = {name: value for name, value in request.items() if name not in ("input_ids", "max_new_tokens")}
        groups.setdefault(json.dumps(own), []).append(request)
    for own, group in groups.items():
        for start in range(0, len(group), ROWS):
            batch = group[start : start + ROWS]
            width = max(len(request["input_ids"]) for request in batch)
            pads = [width - len(request["input_ids"]) for request in batch]
            ids = torch.tensor([[1] * pad + request["input_ids"] for pad, request in zip(pads, batch)])
            mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
            ends = {tuple(request["input_ids"]): request["max_new_tokens"] for request in batch}

            def is_done(text, scores, ends=ends) -> bool:
                tokens = tuple(text[0].tolist())
                return any(
                    tokens[: len(prompt)] == prompt and len(tokens) >= len(prompt) + n for prompt, n in ends.items()
                )

            output = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max(request["max_new_tokens"] for request in batch),
                stopping_criteria=[is_done],
                return_dict_in_generate=True,
                **json.loads(own),
                **shared,
            )
            passes = output.num_forward_passes
            useful, total = useful + int(passes.sum()), total + int(passes.max()) * len(batch)
    return sum(request["max_new_tokens"] for request in requests), useful / total


def through_the_engine(model, requests: list[dict], shared: dict) -> tuple[int, float]:
    """With the share of its rows that were in use, pass by pass."""
    config = ContinuousBatchingConfig(max_requests_per_batch=ROWS)
    manager = model.init_continuous_batching(continuous_batching_config=config)
    for request in requests:
        manager.add_request(**request, **shared)
    manager.run()
    engine = manager.engine
    share = engine.num_row_passes / (engine.num_passes * ROWS)
    manager.destroy()
    return sum(request["max_new_tokens"] for request in requests), share


WAYS: dict[str, Callable] = {"engine": through_the_engine, "batches": in_batches, "one at a time": one_at_a_time}


def measure(model, requests: list[dict], rounds: dict[str | None, int]) -> list[dict]:
    """A record for each way, cache and round."""
    records = []
    for number in range(max(rounds.values())):
        for block_cache in (cache for cache, count in rounds.items() if number < count):
            for way, run in WAYS.items():
                shared = {"block_cache": block_cache, "eos_token_id": None, "pad_token_id": 1}
                start = time.perf_counter()
                num_tokens, share = run(model, requests, shared)
                seconds = time.perf_counter() - start
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                record = {"way": way, "cache": block_cache, "round": number, "seconds": seconds, "tokens": num_tokens}
                records.append({**record, "requests": len(requests), "share": share, "peak_mib": peak})
                print(f"round {number}, cache {block_cache}, {way}: {seconds:.1f} s", flush=True)
    return records


def summary(records: list[dict]) -> list[dict]:
    """Medians over rounds for each cache and way, and the ratio of the engine to each way within a round."""
    lines = []
    for cache in dict.fromkeys(record["cache"] for record in records):
        seconds = {
            way: [record["seconds"] for record in records if (record["way"], record["cache"]) == (way, cache)]
            for way in WAYS
        }
        for way in WAYS:
            chosen = [record for record in records if (record["way"], record["cache"]) == (way, cache)]
            ratios = [other / own for other, own in zip(seconds[way], seconds["engine"])]
            lines.append(
                {
                    "cache": cache,
                    "way": way,
                    "requests_per_second": chosen[0]["requests"] / median(seconds[way]),
                    "tokens_per_second": chosen[0]["tokens"] / median(seconds[way]),
                    "engine_is_faster": median(ratios),
                    "ratios": ratios,
                    "share": median(record["share"] for record in chosen),
                }
            )
    return lines


def write_page(path: Path, results: dict):
    lines = summary(results["records"])
    rows = [
        f"| {line['cache'] or 'none (exact)'} | {line['way']} | {line['requests_per_second']:.2f} | "
        f"{line['tokens_per_second']:.1f} | {line['engine_is_faster']:.2f} | {line['share']:.0%} |"
        for line in lines
    ]
    spread = "; ".join(
        f"{line['cache'] or 'no cache'}, {line['way']}: {', '.join(f'{ratio:.2f}' for ratio in line['ratios'])}"
        for line in lines
        if line["way"] != "engine"
    )
    peak = max(record["peak_mib"] for record in results["records"])
    path.write_text(
        f"""# Throughput

What many requests cost through the engine (`generate_batch`, {ROWS} rows), in static batches of {ROWS}, and one at a
time. Made by `python benchmarks/throughput.py`; the docstring there says what is compared.

{results["requests"]} requests with prompts of 16 to {results["longest_prompt"]} tokens and answers of 8 to
{results["longest_answer"]}, shape `{results["shape"]}` with random weights; {results["machine"]}. Rounds:
{results["rounds"]} with the prefix cache, {results["exact_rounds"]} without a cache.

| block cache | way | requests/s | tokens/s | the engine is faster by | rows in use |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}

Ratios are taken within a round, and their median is given. Each round: {spread}.

"Rows in use" is the share of the rows that did useful work, pass by pass: what is missing in the engine's is its end,
when fewer requests than rows are left. The peak of resident memory over all of it was {peak:,.0f} MiB.

![Tokens per second](throughput.png)
""",
        encoding="utf-8",
    )
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    labels = [f"{line['cache'] or 'no cache'}\n{line['way']}" for line in lines]
    colours = ["#2a6f97" if line["way"] == "engine" else "#a9b4c2" for line in lines]
    bars = axes.bar(labels, [line["tokens_per_second"] for line in lines], color=colours)
    axes.bar_label(bars, fmt="%.0f")
    axes.set(ylabel="tokens per second", title=f"Mixed traffic, shape {results['shape']}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path.with_suffix(".png"), dpi=120)


def main(
    shape: Annotated[Shape, typer.Option(help="Model.")] = Shape["30m"],
    requests: Annotated[int, typer.Option(help="Number of requests; 48 fill every static batch.", min=1)] = 48,
    longest_prompt: Annotated[int, typer.Option(help="In tokens.", min=16)] = 512,
    longest_answer: Annotated[int, typer.Option(help="In tokens.", min=8)] = 256,
    rounds: Annotated[int, typer.Option(help="Rounds with the prefix cache.", min=1)] = 3,
    exact_rounds: Annotated[int, typer.Option(help="Rounds without a cache.", min=0)] = 1,
    threads: Annotated[int, typer.Option(help="Threads of torch; 0 is its default.")] = 0,
    page: Annotated[Path, typer.Option(help="Page to write, with a plot beside it.")] = DOCS / "throughput.md",
):
    """Measures, prints, and writes a page with a table and a plot."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = ILLaDAForCausalLM(ILLaDAConfig(**SHAPES[shape.value])).eval()
    asked = traffic(requests, longest_prompt, longest_answer)
    measure(model, asked[:2], {"prefix": 1})  # warm up
    results = {
        "shape": shape.value,
        "requests": requests,
        "longest_prompt": longest_prompt,
        "longest_answer": longest_answer,
        "rounds": rounds,
        "exact_rounds": exact_rounds,
        "machine": f"{torch.get_num_threads()} threads on {platform.machine()}, torch {torch.__version__}, "
        f"Transformers {transformers.__version__}",
        "records": measure(model, asked, {"prefix": rounds, None: exact_rounds}),
    }
    for line in summary(results["records"]):
        print(line)
    write_page(page, results)


if __name__ == "__main__":
    typer.run(main)
