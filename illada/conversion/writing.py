"""Files that appear whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..text.whole_models import CheckpointError
from .planning import Plan
from .reading import CheckpointTensors, ModelTensors


@contextmanager
def atomic_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block ends well and vanishes when it does not.

    The files are written beside `out`, flushed to the disk, and renamed in one step. A process that is killed leaves
    at most a hidden `.<name>.partial` folder, which the next run removes.

    Args:
        out (`Path`): must not exist, or be an empty folder; with `overwrite` any folder, which is replaced at the end.

    Raises:
        FileExistsError: if `out` is a file, or a folder with content and `overwrite` is off.
        OSError: if another run is writing to `out`, or the disk is full.
    """
    out = out.expanduser().resolve()
    partial, previous, lock = (out.parent / f".{out.name}.{suffix}" for suffix in ("partial", "previous", "lock"))
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            try:
                _clear(partial, previous, out)  # what a killed run left
                _refuse_occupied(out, overwrite)
                partial.mkdir()
                yield partial
                _flush(partial)
                if out.exists():
                    out.rename(previous)
                partial.rename(out)
                _flush_entry(out.parent)
            finally:
                _clear(partial, previous, out)
                lock.unlink(missing_ok=True)
    except Timeout:
        raise OSError(f"`out` {out} is being written by another run.") from None


def refuse_overlap(source: Path, out: str | Path) -> None:
    """Raises `ValueError` if one of the two folders holds the other, for then `out` could replace `source`."""
    source, out = source.resolve(), Path(out).expanduser().resolve()
    if out == source or out in source.parents or source in out.parents:
        raise ValueError(f"`out` must lie apart from `source`, got {out} and {source}.")


def write_weights(folder: Path, plan: Plan, source: CheckpointTensors | ModelTensors) -> None:
    """Writes the shards of the plan, holding one at a time in memory, and the index if there are several.

    Raises:
        CheckpointError: if a tensor holds NaN or Inf, or would in the dtype asked for.
        OSError: if the disk is full.
    """
    free = shutil.disk_usage(folder).free
    if free < plan.num_bytes:
        raise OSError(f"{folder.parent} must have {plan.num_bytes:,} bytes free, and has {free:,}.")
    with tqdm(total=plan.num_bytes, unit="B", unit_scale=True, desc="Converting") as progress:
        for file, names in plan.split.filename_to_tensors.items():
            shard = {}
            for name in names:
                # One by one, so that a tensor in another precision is let go as soon as it is cast.
                (tensor,) = source.read([plan.sources[name]]).values()
                shard[name] = tensor.to(plan.dtype)
                if not _is_finite(shard[name]):
                    kind = "not finite" if not _is_finite(tensor) else f"not finite in {plan.dtype}"
                    raise CheckpointError(source.name, {kind: [plan.sources[name]]})
                progress.update(shard[name].nbytes)
            _save_shard(shard, folder / file)
    if plan.split.is_sharded:
        index = {"metadata": plan.split.metadata, "weight_map": plan.split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _save_shard(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path.name} could not be written: {error}.") from error


def _is_finite(tensor: torch.Tensor) -> bool:
    # The extremes are NaN if any value is, and cost no memory, unlike `isfinite`.
    return all(torch.isfinite(extreme) for extreme in tensor.aminmax())


def _refuse_occupied(out: Path, overwrite: bool) -> None:
    if out.exists() and (not out.is_dir() or os.path.ismount(out)):
        raise FileExistsError(f"`out` must be a new folder, got {out}, which is a file or a mount point.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"`out` must be a new or an empty folder, got {out}; `overwrite` replaces it.")


def _clear(partial: Path, previous: Path, out: Path) -> None:
    if previous.exists() and not out.exists():  # stopped between the two renames
        previous.rename(out)
    for leftover in (partial, previous):
        shutil.rmtree(leftover, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush_entry(path)


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
