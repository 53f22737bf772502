"""A folder that is a complete repository on the Hub, and its upload."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from ..modeling_illada import ILLaDAForCausalLM
from .accompanying import carry_over
from .card import write_card
from .converting import MAX_SHARD_SIZE, complete, convert_into, parse_dtype, parse_size, refuse_overlap, write_model
from .formats import FORMATS, read_config
from .loading import load_whole_model
from .reading import CARRIED_FILES, TOKENIZER_FILES, ModelTensors, locate_checkpoint, read_json
from .writing import atomic_folder, write_json

if TYPE_CHECKING:
    from peft import PeftModel

# As the release has it: both model entries name the class with the LM head.
AUTO_MAP = {
    "AutoConfig": "configuration_illada.ILLaDAConfig",
    "AutoModel": "modeling_illada.ILLaDAForCausalLM",
    "AutoModelForCausalLM": "modeling_illada.ILLaDAForCausalLM",
    "AutoModelForMaskedLM": "modeling_illada.ILLaDAForCausalLM",
}


def export_to_hub_folder(
    source: "str | Path | PreTrainedModel | PeftModel",
    out: str | Path,
    *,
    adapter: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    license: str | None = None,
    base_model: str | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    overwrite: bool = False,
    revision: str | None = None,
    allow_pickle: bool = False,
) -> Path:
    """Writes a repository that loads anywhere: weights, config, code, tokenizer, generation config and model card.

    The weights are in the standard format. The code makes the repository load with `trust_remote_code=True` where this
    package is not installed. `out` appears when everything is written and verified, and not before.

    Args:
        source (`str`, `Path`, `PreTrainedModel` or `PeftModel`):
            A checkpoint in any format that [`convert`] reads, as a folder or an id on the Hub; the output folder of a
            training run (its last checkpoint, if it holds nothing else); a folder with a LoRA adapter, which names its
            base; or a model in memory, which stays as it is.
        out (`str` or `Path`): the folder to make.
        adapter (`str` or `Path`, *optional*):
            Folder or Hub id of a LoRA adapter to merge into the weights. Merging needs the whole model in memory;
            without it, memory is that of [`convert`].
        tokenizer (`PreTrainedTokenizerBase`, `str` or `Path`, *optional*):
            In place of the one that lies beside the weights. A model in memory has no other.
        license (`str`, *optional*):
            Identifier of the Hub, such as `"apache-2.0"`; if absent that of the source's model card, or `"unknown"`.
        base_model (`str`, *optional*): id on the Hub of the model from which this one derives; taken from `source` or
            the adapter where they name one.
        dtype, max_shard_size, overwrite, revision, allow_pickle: as in [`convert`].

    Returns:
        `Path`: the folder.

    Raises:
        CheckpointError: lists tensors that are missing, extra, misshapen, duplicate, of a wrong dtype or not finite.
        ValueError, OSError: if an argument or a file is not as it must be, or the disk is full.
        ImportError: if an adapter is to be merged and `peft` is not installed.
    """
    out, dtype, max_shard_size = Path(out), parse_dtype(dtype), parse_size(max_shard_size)
    model = None if isinstance(source, (str, Path)) else source
    checkpoint = None
    if model is None:
        checkpoint, adapter = _locate(source, adapter, revision, allow_pickle)
        refuse_overlap(checkpoint, out)
        base_model = base_model or _hub_id(source)
    elif adapter is not None:
        adapter = locate_checkpoint(adapter)
    if adapter is not None:
        refuse_overlap(adapter, out)
        base_model = base_model or _hub_id(_base_of(adapter))
    merges = adapter is not None or hasattr(model, "merge_and_unload")

    with atomic_folder(out, overwrite) as folder:
        if model is None and not merges:
            convert_into(folder, checkpoint, FORMATS["standard"], dtype, max_shard_size, allow_pickle)
            config = read_config(read_json(checkpoint / "config.json"), str(checkpoint))
        else:
            if model is None:
                model = load_whole_model(checkpoint, dtype="auto")
            elif merges:
                model = copy.deepcopy(model)  # the caller's stays as it is
            model = _merge(model, adapter, allow_pickle) if merges else model
            base_model = base_model or _hub_id(model.name_or_path)
            config = read_config(model.config.to_dict(), type(model).__name__)
            write_model(folder, ModelTensors(model), config, FORMATS["standard"], dtype, max_shard_size)
            model.generation_config.to_json_file(folder / "generation_config.json")
            if checkpoint is not None:  # its card does not describe the merged model
                carry_over(checkpoint, folder, [pattern for pattern in CARRIED_FILES if pattern != "README.md"])
        if adapter is not None:
            carry_over(adapter, folder, TOKENIZER_FILES)
        _save_tokenizer(tokenizer, folder)
        complete(folder, config)

        custom_object_save(ILLaDAForCausalLM, folder)
        write_json(folder / "config.json", read_json(folder / "config.json") | {"auto_map": AUTO_MAP})
        license = license or (checkpoint and _license_of(checkpoint)) or "unknown"
        write_card(folder, license=license, base_model=base_model, merged=merges)
    return out


def push_to_hub(folder: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Uploads a folder as a model repository, which is made if it does not exist.

    Returns:
        `str`: the address of the commit.

    Raises:
        ValueError: if `repo_id` is not the form of one.
        OSError: if there is no token, or the Hub refuses.
    """
    check_upload(repo_id)
    api = HfApi(library_name="illada")
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message="Upload by illada export")
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[-1]
        raise OSError(f"`push` {repo_id!r} failed, and {folder} stays as it is: {reason}") from error
    return commit.commit_url


def check_upload(repo_id: str) -> None:
    """Raises, before any work is done, what [`push_to_hub`] raises if the id is malformed or there is no token."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(f"`push` must be an id on the Hub such as 'user/model', got {repo_id!r}.") from None
    if get_token() is None:
        raise OSError("There is no token for the Hub: log in with `hf auth login`, or set HF_TOKEN.")


def _locate(
    source: str | Path, adapter: str | Path | None, revision: str | None, allow_pickle: bool
) -> tuple[Path, Path | None]:
    """The folders of the checkpoint and of the adapter, where the source may be a training output or an adapter."""
    from transformers.trainer_utils import get_last_checkpoint  # slow to import, and seldom needed

    folder = locate_checkpoint(source, revision, allow_pickle)
    holds = {name for name in ("config.json", "adapter_config.json") if (folder / name).exists()}
    if not holds and (last := get_last_checkpoint(folder)) is not None:
        return _locate(last, adapter, revision, allow_pickle)
    if holds == {"adapter_config.json"} and adapter is None:
        return locate_checkpoint(_base_of(folder), allow_pickle=allow_pickle), folder
    return folder, None if adapter is None else locate_checkpoint(adapter, allow_pickle=allow_pickle)


def _base_of(adapter: Path) -> str:
    base = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise ValueError(f"`base_model_name_or_path` in {adapter / 'adapter_config.json'} must name the base model.")
    return base


def _merge(model: "PreTrainedModel | PeftModel", adapter: Path | None, allow_pickle: bool) -> PreTrainedModel:
    """Adds the model's own adapter, or the one in a folder, to its weights."""
    try:
        from peft import PeftModel
    except ImportError:
        raise ImportError("Merging an adapter needs peft: `pip install peft`.") from None
    if adapter is not None:
        if not (adapter / "adapter_model.safetensors").exists() and not allow_pickle:
            raise FileNotFoundError(
                f"{adapter} holds no adapter_model.safetensors; `allow_pickle` reads pickled ones."
            )
        model = PeftModel.from_pretrained(model, adapter)
    if not hasattr(model, "merge_and_unload"):
        raise ValueError(f"`adapter` must be one that merges, such as LoRA, got {model.active_peft_config.peft_type}.")
    return model.merge_and_unload(safe_merge=True)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase | str | Path | None, folder: Path) -> None:
    if isinstance(tokenizer, (str, Path)):
        carry_over(locate_checkpoint(tokenizer), folder, TOKENIZER_FILES)
    elif tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _license_of(checkpoint: Path) -> str | None:
    card = checkpoint / "README.md"
    return ModelCard.load(card).data.license if card.exists() else None


def _hub_id(name: str | Path) -> str | None:
    """`name` if it has the form `user/model` and is no folder here, so that no path of this machine is published."""
    try:
        validate_repo_id(str(name))
    except HFValidationError:
        return None
    return str(name) if "/" in str(name) and not Path(name).exists() else None
