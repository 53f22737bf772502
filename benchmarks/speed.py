"""Seconds, forward passes and memory of every way of decoding, side by side: `python benchmarks/speed.py`.

All models have random weights, since time does not depend on them; EOS is switched off, so that every row writes all
its tokens. Each round runs every mode once, one after the other, and figures are medians over rounds. The baseline is
the published algorithm in its plain form: logits at every position in every step, no cache. Results go to a JSON file
(`--append` adds rounds to those that are there); a page with the tables and a plot are written beside it.
"""

import functools
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from statistics import median
from typing import Annotated

import matplotlib
import torch
import transformers
import typer
from matplotlib import pyplot as plt
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from illada import ILLaDAConfig, ILLaDAForCausalLM
from illada.commit_rules import Quota

matplotlib.use("Agg")
logging.set_verbosity_error()

DOCS = Path(__file__).parents[1] / "docs"

SHAPES: dict[str, dict] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    "30m": {"hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 32, "num_attention_heads": 8,
            "num_key_value_heads": 2, "vocab_size": 9696},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
           "num_key_value_heads": 4, "vocab_size": 32000},
    "8b": {},  # the configuration's defaults are those of iLLaDA-8B
}  # fmt: skip
"""What `--shape` may name."""

Shape = Enum("Shape", {name: name for name in SHAPES})

PARALLEL_STEPS = 4
"""Tokens per forward pass of the modes with a threshold. Random weights are never sure, so a threshold alone would
commit one token a step; four is what the embedded model reaches at 0.9 (docs/decoding_quality.md)."""

REFRESHED_SHARE = 0.25
"""Share of passes after which the mode with an adaptive refresh computes whole texts. Random weights are uncertain
everywhere: the bound in nats is put where so many of the tokens of a first block have more."""


@dataclass(frozen=True)
class Case:
    """One line of the comparison. Lengths in tokens."""

    prompt_length: int
    new_tokens: int
    block_length: int
    batch_size: int


def published(model: ILLaDAForCausalLM, input_ids: torch.LongTensor, case: Case, steps: int) -> torch.LongTensor:
    """The published sampler on a growing canvas: greedy, low-confidence remasking, one token per step."""
    mask_token_id = model.config.mask_token_id
    tokens = input_ids
    for _ in range(0, case.new_tokens, case.block_length):
        start = tokens.shape[1]
        tokens = torch.cat([tokens, tokens.new_full((len(tokens), case.block_length), mask_token_id)], dim=1)
        for _ in range(steps):
            is_mask = tokens == mask_token_id
            logits = model(tokens).logits
            logits[..., mask_token_id] = -torch.inf
            proposals = logits.argmax(-1)
            probability = logits.softmax(-1).gather(-1, proposals.unsqueeze(-1)).squeeze(-1)
            confidence = torch.where(is_mask, probability, -torch.inf)
            confidence[:, :start] = -torch.inf
            best = confidence.argmax(-1, keepdim=True)
            tokens = tokens.scatter(1, best, proposals.gather(1, best))
    return tokens


@functools.cache
def refresh_bound(model: ILLaDAForCausalLM, case: Case) -> float:
    """The entropy in nats that `REFRESHED_SHARE` of the tokens have when they are committed, in the first block."""
    entropies: list[float] = []

    class Noting(Quota):
        def __call__(self, step):
            decision = super().__call__(step)
            entropies.extend(step.entropy[decision.commit].tolist())
            return decision

    length = case.block_length
    model.generate(
        prompt(case, model.config.vocab_size, model.device)[:1],
        max_new_tokens=length,
        block_length=length,
        block_cache="prefix",
        commit_rule=Noting(),
        eos_token_id=None,
        pad_token_id=0,
    )
    return float(torch.tensor(entropies).quantile(1 - REFRESHED_SHARE))


def modes(
    model: ILLaDAForCausalLM, llama: LlamaForCausalLM, case: Case, steps: int | None = None
) -> dict[str, Callable]:
    """Functions from a prompt (B, S) to (sequences, forward passes), with `steps` per block, or one per token."""
    steps = steps or case.block_length
    common = {
        "max_new_tokens": case.new_tokens,
        "block_length": case.block_length,
        "max_denoising_steps": steps,
        "eos_token_id": None,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
    }
    bound = refresh_bound(model, case)
    parallel = {"confidence_threshold": 0.9, "max_denoising_steps": steps // PARALLEL_STEPS or 1}

    def diffusion(**settings) -> Callable:
        def decode(input_ids):
            output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **{**common, **settings})
            return output.sequences, int(output.num_forward_passes.max())

        return decode

    def autoregressive(input_ids):
        sequences = llama.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=case.new_tokens,
            min_new_tokens=case.new_tokens,
            do_sample=False,
        )
        return sequences, case.new_tokens

    return {
        "published": lambda input_ids: (published(model, input_ids, case, steps), case.new_tokens),
        "exact": diffusion(),
        "prefix": diffusion(block_cache="prefix"),
        "dual": diffusion(block_cache="dual"),
        "prefix, refreshed by entropy": diffusion(block_cache="prefix", cache_refresh_entropy=bound),
        "frozen": diffusion(block_cache="frozen"),
        "prefix, compiled": diffusion(block_cache="prefix", compile=True),
        "frozen, compiled": diffusion(block_cache="frozen", compile=True),
        "prefix, threshold": diffusion(block_cache="prefix", **parallel),
        "frozen, threshold": diffusion(block_cache="frozen", **parallel),
        "prefix, threshold, compiled": diffusion(block_cache="prefix", compile=True, **parallel),
        "frozen, threshold, compiled": diffusion(block_cache="frozen", compile=True, **parallel),
        "autoregressive": autoregressive,
    }


def timed(function: Callable, *arguments) -> tuple[float, object]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def peak_memory(function: Callable, *arguments) -> float:
    """The most memory in MiB that tensors made by the call hold at a time, weights and inputs not counted."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(*arguments)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function(*arguments)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def build(shape: str, device: str, dtype: torch.dtype) -> tuple[ILLaDAForCausalLM, LlamaForCausalLM]:
    """A masked diffusion model and an autoregressive Llama of one shape, with random weights."""
    config = ILLaDAConfig(**SHAPES[shape], max_position_embeddings=8192)
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")  # fmt: skip
    llama_config = LlamaConfig(**{name: getattr(config, name) for name in shared}, bos_token_id=0, eos_token_id=2)
    torch.manual_seed(0)
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return ILLaDAForCausalLM(config).eval(), LlamaForCausalLM(llama_config).eval()
    finally:
        torch.set_default_dtype(default_dtype)


def prompt(case: Case, vocab_size: int, device: str) -> torch.LongTensor:
    generator = torch.Generator().manual_seed(case.prompt_length)
    size = (case.batch_size, case.prompt_length)
    return torch.randint(6, vocab_size, size, generator=generator).to(device)


def compare(model, llama, case: Case, chosen: list[str], rounds: int, row: dict, device: str, save: Callable):
    """Adds seconds, forward passes, memory and agreement of each mode to `row`, and saves after each.

    Memory is that of a block in two steps, which is that of any.
    """
    functions = {name: function for name, function in modes(model, llama, case).items() if name in chosen}
    input_ids = prompt(case, model.config.vocab_size, device)
    one_block = Case(case.prompt_length, case.block_length, case.block_length, case.batch_size)
    short = modes(model, llama, one_block, steps=2)
    for name in functions:
        entry = row.setdefault(name, {"seconds": []})
        if "MiB" not in entry and "compiled" not in name:
            entry["MiB"] = peak_memory(short[name], input_ids)
        elif "compiled" in name:
            functions[name](input_ids)  # compiles
    for _ in range(rounds):
        sequences = {}
        for name, function in functions.items():
            seconds, (sequences[name], passes) = timed(function, input_ids)
            row[name]["seconds"].append(seconds)
            row[name]["forward_passes"] = passes
            print(f"  {name:28} {seconds:8.2f} s", flush=True)
            save()
        if "published" in sequences and "exact" in sequences:
            row["exact"]["same_tokens"] = bool(torch.equal(sequences["exact"], sequences["published"]))


def compare_ragged(model, case: Case, settings: dict, rounds: int, row: dict, device: str):
    """Adds the seconds of one call with ragged prompts, and of one call for each, to `row`."""
    lengths = torch.linspace(64, 512, case.batch_size).long().tolist()
    prompts = [prompt(Case(length, 0, 0, 1), model.config.vocab_size, device) for length in lengths]
    width = max(lengths)
    padded = {
        "input_ids": torch.cat([torch.nn.functional.pad(ids, (width - ids.shape[1], 0)) for ids in prompts]),
        "attention_mask": torch.cat(
            [torch.nn.functional.pad(torch.ones_like(ids), (width - ids.shape[1], 0)) for ids in prompts]
        ),
    }
    common = {"max_new_tokens": case.new_tokens, "block_length": case.block_length, "eos_token_id": None}
    common |= {"pad_token_id": 0, **settings}

    def one_by_one():
        return [model.generate(ids, attention_mask=torch.ones_like(ids), **common) for ids in prompts]

    row.setdefault("together", [])
    row.setdefault("one by one", [])
    for _ in range(rounds):
        seconds, together = timed(lambda: model.generate(**padded, **common))
        row["together"].append(seconds)
        seconds, alone = timed(one_by_one)
        row["one by one"].append(seconds)
        row["same_tokens"] = all(
            torch.equal(together[index, width:], sequence[0, length:])
            for index, (length, sequence) in enumerate(zip(lengths, alone))
        )
        print(f"  ragged {settings} {row['together'][-1]:.2f} s, one by one {seconds:.2f} s", flush=True)


def floor(model, device: str, block_length: int) -> dict:
    """What a step cannot be faster than, and how fast a step is: 512 cached columns, batch 1.

    Every weight is read once in a step, so the floor is their bytes over the measured copy bandwidth. The step is the
    difference between a block in `block_length` steps and one in a single step.
    """
    source = torch.ones(2**28 if torch.cuda.is_available() else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = min(timed(target.copy_, source)[0] for _ in range(10))
    bandwidth = 2 * source.numel() / copy
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    size = 2048
    square = torch.randn(size, size, dtype=model.dtype, device=device)
    operations = 2 * size**3 / min(timed(torch.mm, square, square)[0] for _ in range(5))
    figures = {"GB/s": bandwidth / 1e9, "floor": weights / bandwidth, "GFLOP/s": operations / 1e9}
    figures["GFLOP of a step"] = (
        2 * block_length * sum(weight.numel() for weight in model.model.layers.parameters()) / 1e9
    )
    input_ids = prompt(Case(512 - block_length, 0, 0, 1), model.config.vocab_size, device)
    for name, settings in (("eager", {}), ("compiled", {"compile": True})):

        def block(steps: int, settings: dict = settings):
            return model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                block_cache="prefix",
                max_new_tokens=block_length,
                block_length=block_length,
                max_denoising_steps=steps,
                eos_token_id=None,
                pad_token_id=0,
                **settings,
            )

        block(block_length)
        long = median(timed(block, block_length)[0] for _ in range(5))
        short = median(timed(block, 1)[0] for _ in range(5))
        figures[f"step, {name}"] = (long - short) / (block_length - 1)
    return figures


def machine(device: str) -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            name = line.split(":")[1].strip()
    return f"{name}, {torch.get_num_threads()} threads"


def ratio_of_rounds(base: list[float], other: list[float]) -> float:
    """Median ratio over the latest rounds in which both ran: a round's modes share what else the machine did."""
    return median(a / b for a, b in zip(reversed(base), reversed(other)))


def describe(results: dict) -> str:
    """The page's tables, in Markdown."""
    lines = []
    for key, measured in results["cases"].items():
        row = {name: entry for name, entry in measured.items() if entry["seconds"]}
        case, base = Case(**json.loads(key)), row.get("published")
        lines += [
            f"Prompt of {case.prompt_length}, {case.new_tokens} new tokens, block of {case.block_length}, batch of "
            f"{case.batch_size}:",
            "",
            "| mode | seconds | forward passes | tokens per second | ratio to published | peak extra memory, MiB |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for name, entry in row.items():
            seconds = median(entry["seconds"])
            ratio = f"{ratio_of_rounds(base['seconds'], entry['seconds']):.2f}" if base else ""
            memory = f"{entry['MiB']:.1f}" if "MiB" in entry else ""
            lines.append(
                f"| {name} | {seconds:.2f} | {entry['forward_passes']} | "
                f"{case.batch_size * case.new_tokens / seconds:.1f} | {ratio} | {memory} |"
            )
        lines.append("")
    if results["ragged"]:
        lines += [
            "Ragged prompts of 64 to 512 tokens in one call, against one call for each:",
            "",
            "| prompts | new tokens | mode | together, s | one by one, s | ratio |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for key, row in results["ragged"].items():
            name, case = json.loads(key)
            together, alone = median(row["together"]), median(row["one by one"])
            lines.append(
                f"| {case['batch_size']} | {case['new_tokens']} | {name} | {together:.2f} | {alone:.2f} | "
                f"{alone / together:.2f} |"
            )
        lines.append("")
    if figures := results.get("floor"):
        lines += [
            f"Copy bandwidth {figures['GB/s']:.1f} GB/s, so that reading all weights once takes "
            f"{1e3 * figures['floor']:.2f} ms; a matrix product runs at {figures['GFLOP/s']:.0f} GFLOP/s, and the "
            f"layers of a step need {figures['GFLOP of a step']:.2f} GFLOP. "
            f"A step takes {1e3 * figures['step, eager']:.2f} ms, compiled {1e3 * figures['step, compiled']:.2f} ms: "
            f"{figures['step, eager'] / figures['floor']:.2f} and {figures['step, compiled'] / figures['floor']:.2f} "
            "times the floor.",
            "",
        ]
    return "\n".join(lines)


def page(results: dict) -> str:
    versions = f"torch {results['torch']}, Transformers {results['transformers']}"
    head = [
        "# Speed",
        "",
        f"{results['machine']}; shape `{results['shape']}`, {results['dtype']}, random weights;",
        f"{versions}. Medians over rounds in which the modes take turns; a ratio is the",
        "median over the rounds in which both ran.",
        "`python benchmarks/speed.py` writes this page.",
        "",
        f"With a threshold, rows are given {PARALLEL_STEPS} tokens per pass. Peak extra memory is the most that",
        "tensors of a call hold at a time while one block is written: the cache counts, weights do not.",
        "",
        "",
    ]
    return "\n".join(head) + describe(results)


def plot(results: dict, path: Path):
    cases = [
        (Case(**json.loads(key)), {name: entry for name, entry in row.items() if entry["seconds"]})
        for key, row in results["cases"].items()
        if row.get("published", {}).get("seconds")
    ]
    names = list(dict.fromkeys(name for _, row in cases for name in row))
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    for index, name in enumerate(names):
        shown = [(i, row) for i, (_, row) in enumerate(cases) if name in row]
        ratios = [ratio_of_rounds(row["published"]["seconds"], row[name]["seconds"]) for _, row in shown]
        axes.bar([i + index / (len(names) + 1) for i, _ in shown], ratios, width=0.9 / (len(names) + 1), label=name)
    labels = [
        f"prompt {c.prompt_length}, new {c.new_tokens},\nblock {c.block_length}, batch {c.batch_size}"
        for c, _ in cases
    ]
    middles = [
        i + sum(names.index(name) for name in row) / len(row) / (len(names) + 1) for i, (_, row) in enumerate(cases)
    ]
    axes.set(xticks=middles, ylabel="times as fast as published", yscale="log")
    axes.set_xticklabels(labels, fontsize=8)
    axes.set_title(f"{results['machine']}, shape {results['shape']}, {results['dtype']}", fontsize=9)
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    device: Annotated[str, typer.Option()] = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 ...")] = "float32",
    shape: Annotated[Shape, typer.Option()] = Shape["30m"],
    prompt_length: Annotated[list[int], typer.Option()] = [256, 1024],  # noqa: B006
    new_tokens: Annotated[list[int], typer.Option()] = [128],  # noqa: B006
    block_length: Annotated[list[int], typer.Option()] = [32],  # noqa: B006
    batch_size: Annotated[list[int], typer.Option()] = [1],  # noqa: B006
    mode: Annotated[list[str] | None, typer.Option(help="Modes to run; all if absent.")] = None,
    ragged: Annotated[list[str] | None, typer.Option(help="exact, prefix or dual: 8 prompts, one call.")] = None,
    with_floor: Annotated[bool, typer.Option("--floor", help="Also measure the floor and a step.")] = False,
    rounds: Annotated[int, typer.Option()] = 3,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    append: Annotated[bool, typer.Option(help="Add to the rounds that are in the output.")] = False,
    output: Annotated[Path, typer.Option(help="JSON file; page and plot go beside it.")] = DOCS / "speed.json",
):
    """Measure, print and write the comparison."""
    if threads is not None:
        torch.set_num_threads(threads)
    if shape.name == "8b" and device == "cpu":
        raise typer.BadParameter("shape 8b is meant for a GPU.")
    results = {"cases": {}, "ragged": {}}
    if append and output.exists():
        results = json.loads(output.read_text())
    results |= {
        "machine": machine(device),
        "shape": shape.name,
        "dtype": dtype,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(f"{results['machine']}, shape {shape.name}, {dtype}")
    model, llama = build(shape.name, device, getattr(torch, dtype))

    def save():
        output.write_text(json.dumps(results, indent=1) + "\n")

    with torch.no_grad():
        if with_floor:
            results["floor"] = floor(model, device, block_length[0])
        for length in [] if mode == ["none"] else prompt_length:
            for new in new_tokens:
                for block in block_length:
                    for batch in batch_size:
                        case = Case(length, new, block, batch)
                        print(case, flush=True)
                        row = results["cases"].setdefault(json.dumps(case.__dict__), {})
                        chosen = mode or list(modes(model, llama, case))
                        compare(model, llama, case, chosen, rounds, row, device, save)
        for name in ragged or []:
            case = Case(512, new_tokens[0], block_length[0], 8)
            row = results["ragged"].setdefault(json.dumps([name, case.__dict__]), {})
            compare_ragged(model, case, {} if name == "exact" else {"block_cache": name}, rounds, row, device)
    save()
    plot(results, output.with_suffix(".png"))
    output.with_suffix(".md").write_text(page(results))
    print(describe(results))


if __name__ == "__main__":
    typer.run(main)
