"""Accuracy against tokens per forward of every way of decoding: `python benchmarks/decoding_quality.py`.

Runs the embedded model over the held-out examples of every family for each rule and several settings, on a growing and
on a fixed canvas, and writes docs/decoding_quality.md with a plot. Both figures are means over the families.
"""

from pathlib import Path
from typing import Annotated

import matplotlib
import typer
from exact_match import evaluate_family
from matplotlib import pyplot as plt
from transformers import AutoModelForCausalLM, AutoTokenizer

from illada import EMBEDDED_MODEL
from illada.tiny.corpus import FAMILIES

matplotlib.use("Agg")

DOCS = Path(__file__).parents[1] / "docs"

SETTINGS: dict[str, list[dict]] = {
    "quota, low confidence": [{"max_denoising_steps": steps} for steps in (32, 16, 8)],
    "quota, margin": [{"remasking": "margin", "max_denoising_steps": steps} for steps in (32, 8)],
    "quota, entropy": [{"remasking": "entropy", "max_denoising_steps": steps} for steps in (32, 8)],
    "quota, random": [{"remasking": "random", "max_denoising_steps": steps} for steps in (32, 8)],
    "confidence threshold": [{"confidence_threshold": value} for value in (0.99, 0.9, 0.7)],
    "confidence factor": [{"confidence_factor": value} for value in (0.1, 0.5)],
    "Fréchet margin": [{"frechet_margin": value} for value in (0.5, 0.25)],
    "KLASS": [{"commit_rule": "klass"}],
    "LocalLeap": [{"commit_rule": "local_leap"}],
    "credit decoding": [{"commit_rule": "credit_decoding"}],
    "T2M": [{"commit_rule": "t2m"}],
    "WINO": [{"commit_rule": "wino"}],
    "entropy bound": [{"entropy_bound": value} for value in (0.05, 0.3)],
    "block of 8": [{"block_length": 8}, {"block_length": 8, "confidence_threshold": 0.9}],
    "prefix cache": [
        {"block_cache": "prefix"},
        {"block_cache": "prefix", "cache_refresh_interval": 4},
        {"block_cache": "prefix", "cache_refresh_entropy": 0.5},
        {"block_cache": "prefix", "confidence_threshold": 0.9},
    ],
    "dual cache": [
        {"block_cache": "dual"},
        {"block_cache": "dual", "cache_refresh_interval": 4},
        {"block_cache": "dual", "cache_refresh_entropy": 0.5},
        {"block_cache": "dual", "confidence_threshold": 0.9},
    ],
    "frozen cache": [
        {"block_cache": "frozen"},
        {"block_cache": "frozen", "confidence_threshold": 0.9},
        {"block_cache": "frozen", "block_length": 8},
        {"block_cache": "frozen", "block_length": 8, "confidence_threshold": 0.9},
    ],
}
"""Rules and the settings of each; the first of all is the published one."""


def describe(setting: dict) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in setting.items())


def measure(model, tokenizer, count: int, **setting) -> dict[str, float]:
    """Exact match of each family, their mean, and mean tokens per forward."""
    families = {name: evaluate_family(model, tokenizer, name, count, count, **setting) for name in FAMILIES}
    row = {name: figures["exact_match"] for name, figures in families.items()}
    row["mean"] = sum(row.values()) / len(families)
    row["tokens per forward"] = sum(f["tokens_per_forward"] for f in families.values()) / len(families)
    return row


def plot(results: list[tuple[str, str, dict, dict]], path: Path):
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for axes, canvas in zip(panels, ("growing", "fixed")):
        for rule in SETTINGS:
            points = [
                (row["tokens per forward"], 100 * row["mean"]) for c, r, _, row in results if (c, r) == (canvas, rule)
            ]
            if points:
                axes.plot(*zip(*points), marker="o", label=rule)
        axes.set(title=f"{canvas} canvas", xlabel="tokens per forward")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("exact match, mean over families (%)")
    panels[1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def page(results: list[tuple[str, str, dict, dict]], count: int) -> str:
    lines = [
        "# Decoding quality",
        "",
        f"The embedded model on {count} held-out examples of each family, greedy: exact match in per cent, and tokens",
        "per forward, each the mean over the families. `python benchmarks/decoding_quality.py` writes this page.",
        f"The model is near its ceiling here, and one answer is {100 / count / len(FAMILIES):.1f} points of the mean:",
        "the table says more about the speed of a rule than about its price.",
        "",
        "![Accuracy against tokens per forward](decoding_quality.png)",
        "",
        f"| canvas | rule | setting | {' | '.join(FAMILIES)} | mean | tokens per forward |",
        "| --- | --- | --- |" + " --- |" * (len(FAMILIES) + 2),
    ]
    for canvas, rule, setting, row in results:
        shares = " | ".join(f"{100 * row[name]:.1f}" for name in (*FAMILIES, "mean"))
        lines.append(f"| {canvas} | {rule} | {describe(setting)} | {shares} | {row['tokens per forward']:.2f} |")
    return "\n".join(lines) + "\n"


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint folder.")] = str(EMBEDDED_MODEL),
    count: Annotated[int, typer.Option(help="Held-out examples of each family.")] = 50,
    output: Annotated[Path, typer.Option(help="Folder of the page and the plot.")] = DOCS,
):
    """Measure every rule and write decoding_quality.md and decoding_quality.png."""
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    results = []
    for canvas in ("growing", "fixed"):
        for rule, settings in SETTINGS.items():
            for setting in settings:
                if canvas == "fixed" and setting.get("block_cache") == "frozen":
                    continue  # it has a growing one only
                row = measure(loaded, tokenizer, count, canvas=canvas, **setting)
                results.append((canvas, rule, setting, row))
                print(
                    f"{canvas:8} {describe(setting):60} {100 * row['mean']:5.1f} % "
                    f"{row['tokens per forward']:.2f} tokens per forward",
                    flush=True,
                )
    plot(results, output / "decoding_quality.png")
    (output / "decoding_quality.md").write_text(page(results, count))


if __name__ == "__main__":
    typer.run(main)
