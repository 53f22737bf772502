"""A folder that is a complete repository on the Hub, and its upload."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from ..modeling_illada import ILLaDAForCausalLM
from ..text.whole_models import ADAPTER_CONFIG, BASE_FIELD, base_of, is_adapter, load_whole_model, read_json
from .accompanying import carry_over, write_decision_template
from .adapters import check_adapter, require_peft, with_adapter
from .card import check_license, license_of, write_card
from .converting import MAX_SHARD_SIZE, complete, convert_weights, parse_dtype, parse_size, write_model
from .formats import FORMATS, read_config
from .reading import CARRIED_FILES, TOKENIZER_FILES, ModelTensors, locate_checkpoint
from .writing import atomic_folder, refuse_overlap, write_json

if TYPE_CHECKING:
    from peft import PeftModel

# As the release has it: both model entries name the class with the LM head. `AutoModelForDecision` is what
# `transformers serve` tries first, from Transformers 5.24 on.
AUTO_MAP = {
    "AutoConfig": "configuration_illada.ILLaDAConfig",
    "AutoModel": "modeling_illada.ILLaDAForCausalLM",
    "AutoModelForCausalLM": "modeling_illada.ILLaDAForCausalLM",
    "AutoModelForMaskedLM": "modeling_illada.ILLaDAForCausalLM",
    "AutoModelForDecision": "modeling_illada.ILLaDAForCausalLM",
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
        config = read_config(read_json(checkpoint / "config.json"), str(checkpoint / "config.json"))
    else:
        adapter = None if adapter is None else locate_checkpoint(adapter, argument="adapter")
        config = read_config(model.config.to_dict(), type(model).__name__)
        base_model = base_model or _hub_id(model.name_or_path)
    if adapter is not None:
        require_peft()
        check_adapter(adapter, allow_pickle)
        refuse_overlap(adapter, out)
        base_model = base_model or _hub_id(base_of(adapter))
    merges = adapter is not None or hasattr(model, "peft_config")
    tokenizer = _find_tokenizer(tokenizer)
    license = check_license(license) or license_of(checkpoint) or "unknown"

    with atomic_folder(out, overwrite) as folder:
        # What is small comes first, so that what is wrong with it is said before weights are loaded or written.
        if checkpoint is None:
            model.generation_config.to_json_file(folder / "generation_config.json")
        else:  # the card of the source does not describe a merged model
            carry_over(checkpoint, folder, [name for name in CARRIED_FILES if not (merges and name == "README.md")])
        if adapter is not None:
            carry_over(adapter, folder, TOKENIZER_FILES)
        _save_tokenizer(tokenizer, folder)
        complete(folder, config)
        write_decision_template(folder, config)
        custom_object_save(ILLaDAForCausalLM, folder)

        if model is None and not merges:
            convert_weights(folder, checkpoint, config, FORMATS["standard"], dtype, max_shard_size, allow_pickle)
        else:
            model = load_whole_model(checkpoint, dtype="auto") if model is None else model
            model = _merge(model, adapter, allow_pickle, in_place=checkpoint is not None) if merges else model
            config = read_config(model.config.to_dict(), type(model).__name__)  # an adapter may bring more tokens
            write_model(folder, ModelTensors(model), config, FORMATS["standard"], dtype, max_shard_size)
        write_json(folder / "config.json", read_json(folder / "config.json") | {"auto_map": AUTO_MAP})
        write_card(folder, title=out.name, license=license, base_model=base_model, merged=merges)
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
        raise OSError(f"`repo_id` {repo_id!r} refused the upload, and {folder} stays as it is: {reason}") from error
    return commit.commit_url


def check_upload(repo_id: str) -> None:
    """Raises, before any work is done, what [`push_to_hub`] raises if the id is malformed or there is no token."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(f"`repo_id` must be an id on the Hub such as 'user/model', got {repo_id!r}.") from None
    if get_token() is None:
        raise OSError("There is no token for the Hub: log in with `hf auth login`, or set HF_TOKEN.")


def _locate(
    source: str | Path, adapter: str | Path | None, revision: str | None, allow_pickle: bool
) -> tuple[Path, Path | None]:
    """The folders of the checkpoint and of the adapter, where the source may be a training output or an adapter."""
    from transformers.trainer_utils import get_last_checkpoint  # slow to import, and seldom needed

    folder = locate_checkpoint(source, revision, allow_pickle)
    if not (folder / "config.json").exists() and not is_adapter(folder):
        if (last := get_last_checkpoint(folder)) is not None:
            return _locate(last, adapter, revision, allow_pickle)
        raise FileNotFoundError(
            f"`source` {str(source)!r} contains no checkpoint: neither config.json nor {ADAPTER_CONFIG}."
        )
    if is_adapter(folder) and adapter is None:
        return locate_checkpoint(base_of(folder), allow_pickle=allow_pickle, argument=BASE_FIELD), folder
    if is_adapter(folder):
        raise ValueError(f"`adapter` must be absent if `source` is an adapter itself, got {str(adapter)!r}.")
    return folder, None if adapter is None else locate_checkpoint(adapter, None, allow_pickle, argument="adapter")


def _merge(
    model: "PreTrainedModel | PeftModel", adapter: Path | None, allow_pickle: bool, in_place: bool
) -> PreTrainedModel:
    """The model with its own adapter, or the one in a folder, added to its weights.

    Args:
        in_place (`bool`): whether the model may be changed; the caller's stays as it is.
    """
    model = model if in_place else copy.deepcopy(model)
    if adapter is not None:
        model = with_adapter(model, adapter, allow_pickle)
    if not hasattr(model, "merge_and_unload"):
        kinds = ", ".join(sorted(str(config.peft_type.value) for config in model.peft_config.values()))
        raise ValueError(f"`source` must be a `PeftModel` whose adapter can be merged, got {kinds} in another form.")
    return model.merge_and_unload(safe_merge=True)


def _find_tokenizer(
    tokenizer: PreTrainedTokenizerBase | str | Path | None,
) -> PreTrainedTokenizerBase | Path | None:
    """The tokenizer, or the folder that contains it. Raises `ValueError` or `OSError` if there is none."""
    if tokenizer is None or isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    if not isinstance(tokenizer, (str, Path)):
        raise ValueError(f"`tokenizer` must be a tokenizer, a folder or a Hub id, got a {type(tokenizer).__name__}.")
    folder = locate_checkpoint(tokenizer, argument="tokenizer")
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ValueError(
            f"`tokenizer` must be a tokenizer's folder or Hub id, got {str(tokenizer)!r}, which has none."
        )
    return folder


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase | Path | None, folder: Path) -> None:
    if isinstance(tokenizer, Path):
        carry_over(tokenizer, folder, TOKENIZER_FILES)
    elif tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _hub_id(name: str | Path) -> str | None:
    """`name` if it has the form `user/model` and is no folder here, so that no path of this machine is published."""
    try:
        validate_repo_id(str(name))
    except HFValidationError:
        return None
    return str(name) if "/" in str(name) and not Path(name).exists() else None
