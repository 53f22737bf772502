"""Checkpoints as they lie on disk or in a model: what they hold is known first, tensors are read one at a time."""

import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from ..text.loading import locate
from ..text.whole_models import CheckpointError, read_json

FLOATING_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
ROWS_AT_ONCE = 4096
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
)
# What travels with the weights. Code does not: the formats written here need none, or bring their own.
CARRIED_FILES = (*TOKENIZER_FILES, "generation_config.json", "README.md", "LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it; `dtype` is a `str` if it is no floating type that is handled."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    file: Path | None = None


class ModelTensors:
    """The parameters of a model in memory, read like a checkpoint."""

    def __init__(self, model: PreTrainedModel):
        self.name = type(model).__name__
        self._state = model.state_dict()
        on_meta = [name for name, tensor in self._state.items() if tensor.is_meta]
        if on_meta:
            raise CheckpointError(self.name, {"offloaded, not in memory": on_meta})
        self.infos = {
            name: TensorInfo(tuple(tensor.shape), _known_dtype(tensor.dtype)) for name, tensor in self._state.items()
        }

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        return {name: self._state[name].detach().cpu().contiguous() for name in names}

    def equal(self, first: str, second: str) -> bool:
        return torch.equal(self._state[first], self._state[second])


class CheckpointTensors:
    """The tensors of a checkpoint folder. Opening it reads file headers alone and checks them against the index.

    Args:
        folder (`Path`): holds `model.safetensors`, or shards and `model.safetensors.index.json`.
        allow_pickle (`bool`): whether `pytorch_model.bin` is read, with `weights_only=True`, if there is nothing else.

    Raises:
        CheckpointError: if a tensor is not where the index says, is in two files, or in none of the listed ones.
        ValueError: if the index names a file outside the folder, or a file is damaged.
        FileNotFoundError: if there are no weights, or if a shard is missing.
    """

    def __init__(self, folder: Path, allow_pickle: bool = False):
        self.name = str(folder)
        self.infos: dict[str, TensorInfo] = {}
        files, weight_map = _locate_weights(folder, allow_pickle)
        duplicates = []
        for file in files:
            for name, info in _read_header(file).items():
                duplicates += [name] if name in self.infos else []
                self.infos[name] = info
        if weight_map is not None:
            stored = {name: info.file.name for name, info in self.infos.items()}
            problems = {
                "missing": [name for name in weight_map if name not in stored],
                "extra, not in the index": [name for name in stored if name not in weight_map],
                "duplicate": duplicates,
                "not in the file that the index names": [
                    name for name, file in stored.items() if weight_map.get(name, file) != file
                ],
            }
            if any(problems.values()):
                raise CheckpointError(self.name, problems)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors, on the CPU. Each file is opened once, and closed again."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.infos[name].file, []).append(name)
        tensors = {}
        for file, stored in by_file.items():
            with _open_weights(file) as weights:
                tensors.update({name: weights.get_tensor(name) for name in stored})
        return tensors

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors have the same shape, dtype and values, comparing a few rows at a time."""
        infos = [self.infos[first], self.infos[second]]
        if infos[0].shape != infos[1].shape or infos[0].dtype != infos[1].dtype:
            return False
        with _open_weights(infos[0].file) as one, _open_weights(infos[1].file) as other:
            rows = one.get_slice(first), other.get_slice(second)
            starts = range(0, infos[0].shape[0], ROWS_AT_ONCE)
            return all(torch.equal(*(tensor[start : start + ROWS_AT_ONCE] for tensor in rows)) for start in starts)


def locate_checkpoint(
    source: str | Path, revision: str | None = None, allow_pickle: bool = False, argument: str = "source"
) -> Path:
    """The folder of a checkpoint: `source` itself, the embedded model's, or the local copy of a repository on the Hub.

    Args:
        argument (`str`): what errors call `source`.

    Raises:
        ValueError: if `source` is neither a folder nor the form of a Hub id.
        OSError: if the repository cannot be reached, and is not in the local cache.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    place = locate(source, argument)
    if Path(place).is_dir():
        return Path(place)
    wanted = ["*.json", "*.safetensors", *CARRIED_FILES, *(["*.bin"] if allow_pickle else [])]
    try:
        return Path(snapshot_download(place, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"`{argument}` {str(source)!r} is no folder here and could not be downloaded: {reason}"
        ) from error


def _locate_weights(folder: Path, allow_pickle: bool) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files, and the index (tensor to file) if there is one. Safetensors win over pickles."""
    for stem, allowed in (("model.safetensors", True), ("pytorch_model.bin", allow_pickle)):
        single, index = folder / stem, folder / f"{stem}.index.json"
        if not allowed and (single.exists() or index.exists()):
            raise ValueError(
                f"{folder} holds pickled weights alone ({stem}): pass `allow_pickle` to read them, as tensors only."
            )
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            return _indexed_files(index, weight_map), weight_map
        if single.exists():
            return [single], None
    raise FileNotFoundError(f"{folder} holds no weights: neither model.safetensors nor model.safetensors.index.json.")


def _indexed_files(index: Path, weight_map: Any) -> list[Path]:
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"`weight_map` in {index} must map tensor names to file names.")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if name in ("", ".", "..") or "/" in name or "\\" in name]
    if outside:
        raise ValueError(f"{index} must name files of its own folder, got {', '.join(map(repr, outside))}.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names files that are missing: {', '.join(missing)}.")
    return [index.parent / name for name in names]


@contextmanager
def _open_weights(file: Path) -> Iterator[Any]:
    """A weight file as an object with `keys()`, `get_tensor(name)` and `get_slice(name)[start:end]`, all lazy."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as handle:
                yield handle
        else:
            yield _PickledWeights(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}.") from error


class _PickledWeights:
    def __init__(self, file: Path):
        try:
            self._tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{file} is damaged or holds more than tensors: {reason}") from error
        if not isinstance(self._tensors, dict) or not all(torch.is_tensor(value) for value in self._tensors.values()):
            raise ValueError(f"{file} must hold a flat dictionary of tensors.")

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name].contiguous()

    get_slice = get_tensor


def _read_header(file: Path) -> dict[str, TensorInfo]:
    with _open_weights(file) as weights:
        return {name: _info(weights.get_slice(name), file) for name in weights.keys()}


def _info(tensor: Any, file: Path) -> TensorInfo:
    """Of a tensor, or of the slice that stands for one in a safetensors file."""
    if torch.is_tensor(tensor):
        return TensorInfo(tuple(tensor.shape), _known_dtype(tensor.dtype), file)
    return TensorInfo(tuple(tensor.get_shape()), FLOATING_DTYPES.get(tensor.get_dtype(), tensor.get_dtype()), file)


def _known_dtype(dtype: torch.dtype) -> torch.dtype | str:
    return dtype if dtype in FLOATING_DTYPES.values() else str(dtype).removeprefix("torch.")
