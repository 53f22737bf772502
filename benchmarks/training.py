"""Memory and speed of a training step: `python benchmarks/training.py`.

Each setting runs in a process of its own, which reports its own peak: of the GPU's allocator on a GPU, of the process
above what it held before training on a CPU. With "all logits" the loss gives every position a label and a weight,
so that the whole (B, S, V) tensor of logits is made, as the released training code does: what masked positions alone
save.
"""

import json
import resource
import subprocess
import sys
import time
from typing import Annotated

import torch
import typer

from illada import ILLaDAConfig, ILLaDAForCausalLM
from illada.training.trainer import Objective

MASK = 5


def measure(vocab_size: int, width: int, layers: int, batch_size: int, length: int, steps: int, settings: str) -> dict:
    """Peak memory in MiB and tokens per second of optimiser steps with AdamW; the first step is not timed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = ILLaDAConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=length,
        initializer_range=0.02,
    )
    model = ILLaDAForCausalLM(config).to(device).train()
    if "checkpointing" in settings:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters())
    clean = torch.randint(6, vocab_size, (batch_size, length))
    batch = {
        "input_ids": clean,
        "labels": clean,
        "position_ids": torch.arange(length).expand(batch_size, -1),
        "is_prompt": torch.zeros(batch_size, length, dtype=torch.bool),
    }
    objective = Objective(split_probability=0.0)
    before = peak_mib(device)
    for step in range(steps + 1):
        noisy = objective.add_noise(batch, MASK, 0, range(step * batch_size, (step + 1) * batch_size), batch_size)
        if "all logits" in settings:
            noisy["loss_weights"] = noisy["loss_weights"] + torch.finfo(torch.float32).tiny
        model(**{name: tensor.to(device) for name, tensor in noisy.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        if step == 0:
            start = time.perf_counter()
    seconds = time.perf_counter() - start
    return {"MiB": peak_mib(device) - before, "tokens/s": steps * batch_size * length / seconds}


def peak_mib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # KiB on Linux


def main(
    vocab_size: Annotated[int, typer.Option(help="Tokens in the vocabulary.")] = 32_768,
    width: Annotated[int, typer.Option(help="Hidden size, a multiple of 64.")] = 256,
    layers: Annotated[int, typer.Option(help="Layers.")] = 8,
    batch_size: Annotated[int, typer.Option(help="Rows in a step.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens in a row.")] = 512,
    steps: Annotated[int, typer.Option(help="Timed steps.")] = 4,
    settings: Annotated[str | None, typer.Option(hidden=True)] = None,
):
    """Print peak memory and tokens per second of a training step, with and without gradient checkpointing."""
    sizes = (vocab_size, width, layers, batch_size, length, steps)
    if settings is not None:
        print(json.dumps(measure(*sizes, settings)))
        return
    print("| step | peak memory, MiB | tokens per second |\n| --- | --- | --- |")
    for settings in ("plain", "checkpointing", "all logits", "all logits, checkpointing"):
        command = [sys.executable, __file__, "--settings", settings]
        for name, value in zip(("vocab-size", "width", "layers", "batch-size", "length", "steps"), sizes):
            command += [f"--{name}", str(value)]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"| {settings} | {result['MiB']:,.0f} | {result['tokens/s']:,.0f} |")


if __name__ == "__main__":
    typer.run(main)
