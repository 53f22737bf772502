"""Peak memory of `illada convert` on a synthetic LLaDA checkpoint.

    python benchmarks/conversion_memory.py --gigabytes 2 --max-shard-size 250MB

Writes a random bf16 checkpoint in the LLaDA release's form to a temporary folder, converts it in a process of its own,
and prints the peak of that process beyond what it held before the conversion began: anonymous memory, which no one can
take back, and resident memory, which also counts pages of the mapped weight files that the system may drop at will.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH, FFN, VOCABULARY, HEADS = 2048, 6144, 32000, 16


def resident_bytes() -> tuple[int, int]:
    """(anonymous, all) resident memory of this process, in bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anonymous, everything = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS"))
    return anonymous, everything


def write_checkpoint(folder: Path, num_bytes: int, num_files: int) -> int:
    """Returns the size of the weights that were written, in bytes, at least `num_bytes`."""
    shapes = {name: (VOCABULARY, WIDTH) for name in ("wte", "ff_out")} | {"ln_f": (WIDTH,)}
    block = {name: (WIDTH, WIDTH) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
    block |= {"ff_proj": (FFN, WIDTH), "up_proj": (FFN, WIDTH), "ff_out": (WIDTH, FFN)}
    block |= {"attn_norm": (WIDTH,), "ff_norm": (WIDTH,)}
    num_layers = 0
    while sum(2 * torch.Size(shape).numel() for shape in shapes.values()) < num_bytes:
        shapes |= {f"blocks.{num_layers}.{name}": shape for name, shape in block.items()}
        num_layers += 1

    names = list(shapes)
    files = [f"model-{index + 1:05d}-of-{num_files:05d}.safetensors" for index in range(num_files)]
    weight_map = {}
    for index, file in enumerate(files):
        tensors = {
            f"model.transformer.{name}.weight": torch.randn(shapes[name], dtype=torch.bfloat16) * 0.02
            for name in names[index::num_files]
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"model_type": "llada", "d_model": WIDTH, "n_heads": HEADS, "n_layers": num_layers, "mask_token_id": 5}
    config |= {"mlp_hidden_size": FFN, "vocab_size": VOCABULARY, "embedding_size": VOCABULARY, "weight_tying": False}
    (folder / "config.json").write_text(json.dumps(config))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def convert_and_watch(source: str, out: str, max_shard_size: str, dtype: str | None) -> None:
    """Converts, and prints the figures as JSON. Runs in a process of its own."""
    from illada.conversion import convert

    before, peaks, done = resident_bytes(), [0, 0], threading.Event()

    def watch():
        while not done.wait(0.01):
            peaks[:] = map(max, peaks, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    conversion = convert(source, out, max_shard_size=max_shard_size, dtype=dtype)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    anonymous, everything = (peak - held for peak, held in zip(peaks, before, strict=True))
    largest = max(file.stat().st_size for file in conversion.out.glob("*.safetensors"))
    figures = {"anonymous": anonymous, "resident": everything, "largest_shard": largest, "seconds": seconds}
    print(json.dumps(figures | {"layers_compared": conversion.num_layers_compared}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint, 10^9 bytes")
    parser.add_argument("--files", type=int, default=2, help="files that the source's weights are in")
    parser.add_argument("--max-shard-size", default="250MB", help="of the output")
    parser.add_argument("--dtype", default=None, help="of the output; bfloat16, as in the source, if absent")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "source"), Path(folder, "out")
        source.mkdir()
        size = write_checkpoint(source, int(arguments.gigabytes * 1e9), arguments.files)
        call = [str(source), str(out), arguments.max_shard_size, arguments.dtype]
        script = f"from conversion_memory import convert_and_watch; convert_and_watch(*{call!r})"
        command = [sys.executable, "-c", script]
        output = subprocess.run(command, cwd=Path(__file__).parent, check=True, stdout=subprocess.PIPE, text=True)
        figures = json.loads(output.stdout.splitlines()[-1])
    print(f"checkpoint {size / 1e6:,.0f} MB in {arguments.files} files, written as {arguments.dtype or 'bfloat16'}")
    for name in ("largest_shard", "anonymous", "resident"):
        print(f"{name:>14} {figures[name] / 1e6:8,.0f} MB")
    print(f"{'seconds':>14} {figures['seconds']:8.0f}\n{'layers compared':>15} {figures['layers_compared']:7d}")


if __name__ == "__main__":
    main()
