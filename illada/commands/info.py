"""`illada info`."""

import json
import math
from pathlib import Path

from huggingface_hub import get_safetensors_metadata, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, OfflineModeIsEnabled
from rich.console import Console
from rich.table import Table
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from ..conversion.formats import EMBEDDING, HEAD
from ..conversion.planning import match_tensors
from ..conversion.reading import FLOATING_DTYPES, CheckpointTensors, TensorInfo
from ..text.loading import Checkpoint
from ..text.whole_models import CheckpointError
from .options import JsonFlag, ModelOption, ModelOptions


def info(model: ModelOption = None, as_json: JsonFlag = False):
    """Describe a checkpoint: architecture, parameters, special ids, generation defaults. No weights are read.

    Example: `illada info --model ./my-checkpoint --json`
    """
    facts = describe(ModelOptions(model, device="cpu").open())
    if as_json:
        print(json.dumps(facts))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        table.add_row(name, f"{value:,}" if type(value) is int else str(value))
    Console().print(table)


def describe(checkpoint: Checkpoint) -> dict:
    """Facts about a checkpoint, from its small files and the headers of its weight files.

    Raises:
        CheckpointError: if a tensor is missing, unexpected or of another shape than the config says.
    """
    config = checkpoint.config
    tensors = _tensors(checkpoint.place, config)
    parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()]
    return {
        "architecture": MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__,
        **({} if checkpoint.adapter is None else {"adapter": checkpoint.adapter, "base model": checkpoint.place}),
        "parameters": parameters,
        "parameters without embedding": parameters - config.vocab_size * config.hidden_size,
        "dtype": max(set(dtypes), key=dtypes.count),
        "layers": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "attention heads": f"{config.num_attention_heads} ({config.num_key_value_heads} key-value)",
        "feed-forward size": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "tied embeddings": config.tie_word_embeddings,
        "special ids": {name: getattr(config, f"{name}_token_id") for name in ("bos", "pad", "eos", "mask")},
        "chat template": checkpoint.tokenizer.chat_template is not None,
        "conversations": not config.single_turn,
        "generation": checkpoint.generation_config.to_diff_dict(),
    }


def _tensors(place: str, config) -> dict[str, TensorInfo]:
    """The parameters by standard name; a stored copy of a tied LM head is left out."""
    infos = _read_headers(place)
    if getattr(config, "quantization_config", None) is not None:
        return infos  # a quantiser has names and shapes of its own
    stored, problems = match_tensors(infos, config)
    if any(problems.values()):
        raise CheckpointError(place, problems)
    if config.tie_word_embeddings and EMBEDDING in stored:
        stored.pop(HEAD, None)
    return {name: infos[source] for name, source in stored.items()}


def _read_headers(place: str) -> dict[str, TensorInfo]:
    if Path(place).is_dir():
        return CheckpointTensors(Path(place), allow_pickle=True).infos
    try:
        files = get_safetensors_metadata(place).files_metadata.values()
    except (OfflineModeIsEnabled, NotASafetensorsRepoError, HfHubHTTPError, ConnectionError):
        # What was downloaded before can be read offline.
        return CheckpointTensors(Path(snapshot_download(place, local_files_only=True)), allow_pickle=True).infos
    return {
        name: TensorInfo(tuple(tensor.shape), FLOATING_DTYPES.get(tensor.dtype, tensor.dtype))
        for file in files
        for name, tensor in file.tensors.items()
    }
