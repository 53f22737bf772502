"""LoRA adapters: merged into a model, or written under the other names of its parameters."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..adapter_loading import fit_vocabulary, homeless_tensors, rename_adapter
from ..llada_names import llada_name, standard_name
from ..text.whole_models import ADAPTER_CONFIG, BASE_FIELD, CheckpointError, read_json
from .accompanying import carry_over
from .reading import locate_checkpoint
from .writing import atomic_folder, refuse_overlap, write_json

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS, PICKLED_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"


def convert_adapter(
    source: str | Path,
    out: str | Path,
    *,
    to: str = "standard",
    overwrite: bool = False,
    revision: str | None = None,
    allow_pickle: bool = False,
) -> Path:
    """Writes an adapter under the names of another code: this package's, or LLaDA's released one.

    PEFT puts an adapter where the names in its configuration match, so that one that was trained on LLaDA's released
    code does not act on this package's models until it is converted. Its matrices stay as they are.

    Args:
        source (`str` or `Path`): folder or Hub id of the adapter.
        out (`str` or `Path`): the folder to make.
        to (`str`, defaults to `"standard"`): `"standard"` or `"illada"`, whose names are the same, or `"llada"`.
        overwrite, revision, allow_pickle: as in [`convert`].

    Returns:
        `Path`: the folder.

    Raises:
        ValueError, OSError: if an argument or a file is not as it must be, or the disk is full.
    """
    renamings = {"standard": standard_name, "illada": standard_name, "llada": llada_name}
    if to not in renamings:
        raise ValueError(f"`to` must be one of {', '.join(map(repr, renamings))}, got {to!r}.")
    source = locate_checkpoint(source, revision, allow_pickle)
    refuse_overlap(source, out)
    config, tensors = read_adapter(source, allow_pickle)
    changes, new_names = rename_adapter(config, tensors, renamings[to])
    with atomic_folder(Path(out), overwrite) as folder:
        renamed = {new_names[name]: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(renamed, folder / WEIGHTS, metadata={"format": "pt"})
        write_json(folder / ADAPTER_CONFIG, config | changes)
        carry_over(source, folder)
    return Path(out)


def read_adapter(folder: Path, allow_pickle: bool = False) -> tuple[dict, dict[str, torch.Tensor]]:
    """The configuration and the tensors of the adapter in `folder`.

    Raises:
        FileNotFoundError: if a file is missing, or if the weights are pickled and `allow_pickle` is off.
        ValueError: if a file is damaged.
    """
    check_adapter(folder, allow_pickle)
    config = read_json(folder / ADAPTER_CONFIG)
    if not (folder / WEIGHTS).exists():
        return config, torch.load(folder / PICKLED_WEIGHTS, map_location="cpu", weights_only=True)
    try:
        return config, load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged or no safetensors file: {error}.") from error


def check_adapter(folder: Path, allow_pickle: bool) -> None:
    """Raises what [`read_adapter`] and a merge raise, as far as that can be known without reading tensors."""
    if not (folder / ADAPTER_CONFIG).exists():
        raise FileNotFoundError(f"`adapter` {str(folder)!r} contains no adapter: it has no {ADAPTER_CONFIG}.")
    read_json(folder / ADAPTER_CONFIG)
    if not (folder / WEIGHTS).exists() and not (allow_pickle and (folder / PICKLED_WEIGHTS).exists()):
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS}; `allow_pickle` reads pickled ones.")


def require_peft() -> None:
    """Raises `ImportError` if `peft`, an optional dependency, is not installed."""
    if find_spec("peft") is None:
        raise ImportError("Merging an adapter needs peft: `pip install peft`.")


def with_adapter(model: PreTrainedModel, folder: Path, allow_pickle: bool = False) -> "PeftModel":
    """`model`, which is changed in place, with the adapter in `folder`, under whichever names it was saved.

    Raises:
        CheckpointError: lists the adapter's tensors that are missing, extra (with no place in the model) or misshapen.
        FileNotFoundError, ValueError: as [`read_adapter`], and if it acts on prompts and not in layers.
    """
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    config, tensors = read_adapter(folder, allow_pickle)
    if PeftConfig.from_peft_type(**config).is_prompt_learning:
        kind = config["peft_type"]
        raise ValueError(f"`peft_type` in {folder} must be that of an adapter of layers, such as LORA, got {kind!r}.")
    changes, new_names = rename_adapter(config, tensors)
    tensors = {new_names[name]: tensor for name, tensor in tensors.items()}
    if homeless := homeless_tensors(model, tensors):
        old_names = {new: old for old, new in new_names.items()}
        raise CheckpointError(str(folder), {"extra": [old_names[name] for name in homeless]})
    fit_vocabulary(model, tensors)
    changes |= {"inference_mode": True, BASE_FIELD: model.name_or_path}
    adapted = get_peft_model(model, PeftConfig.from_peft_type(**config | changes))
    try:
        report = set_peft_model_state_dict(adapted, tensors)
    except RuntimeError as error:  # of PyTorch: sizes differ
        raise ValueError(f"The adapter {folder} does not fit the model: {' '.join(str(error).split())}") from None
    missing = [name for name in report.missing_keys if ".lora_" in name]
    if missing or report.unexpected_keys:
        raise CheckpointError(str(folder), {"missing": missing, "extra": report.unexpected_keys})
    return adapted
