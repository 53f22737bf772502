"""From one format of the family to another, shard by shard."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub.serialization._base import parse_size_to_int

from ..configuration_illada import ILLaDAConfig
from ..configuration_llada import LLaDAConfig
from ..modeling_illada import ILLaDAForCausalLM
from ..modeling_llada import LLaDAModelLM
from ..text.whole_models import is_adapter, read_json
from .accompanying import carry_over, declare_mask_token, write_generation_config
from .formats import Format, find_format, read_config, standard_config
from .planning import DTYPES, Plan, make_plan
from .reading import CheckpointTensors, ModelTensors, locate_checkpoint
from .verifying import verify_logits, verify_tensors
from .writing import atomic_folder, refuse_overlap, write_json, write_weights

MAX_SHARD_SIZE = "5GB"
MIN_LOGITS_BYTES = 100_000_000  # a model up to this is compared whole, however small its shards


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote and checked.

    Attributes:
        out (`Path`): the folder.
        num_tensors (`int`), num_bytes (`int`), num_shards (`int`): in the output.
        dtype (`torch.dtype`): of every tensor.
        tied (`bool`): whether the LM head is the embedding.
        untied_by_tensors (`bool`): whether the source called the head tied and yet stored a different one.
        num_layers_compared (`int`): leading layers whose logits were found equal on random tokens.
    """

    out: Path
    num_tensors: int
    num_bytes: int
    num_shards: int
    dtype: torch.dtype
    tied: bool
    untied_by_tensors: bool
    num_layers_compared: int


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: str = "standard",
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    overwrite: bool = False,
    revision: str | None = None,
    allow_pickle: bool = False,
) -> Conversion:
    """Converts a checkpoint of the family, from either release's format or the standard one.

    Peak memory is about one output shard. `out` appears when everything is written and verified, and not before.

    Args:
        source (`str` or `Path`): a folder, or an id on the Hub.
        out (`str` or `Path`): the folder to make.
        to (`str`, defaults to `"standard"`):
            `"standard"` (what this package saves), or a release's own form: `"illada"` or `"llada"`.
        dtype (`str` or `torch.dtype`, *optional*):
            `"bfloat16"`, `"float16"`, `"float32"` or `"float64"`; that of the source if absent.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): of a weight file, in bytes.
        overwrite (`bool`, defaults to `False`): whether a non-empty `out` is replaced.
        revision (`str`, *optional*): branch, tag or commit of a repository on the Hub.
        allow_pickle (`bool`, defaults to `False`):
            Whether pickled weights are read, with `weights_only=True`, if there is no safetensors file.

    Raises:
        CheckpointError: lists tensors that are missing, extra, misshapen, duplicate, of a wrong dtype or not finite.
        ValueError, OSError: if an argument or a file is not as it must be, or the disk is full.
    """
    target, dtype, max_shard_size = find_format(to), parse_dtype(dtype), parse_size(max_shard_size)
    checkpoint = locate_checkpoint(source, revision, allow_pickle)
    if is_adapter(checkpoint):
        raise ValueError(
            f"`source` must be a checkpoint, got the adapter {str(source)!r}: `convert_adapter` gives it other names, "
            "`export_to_hub_folder` merges it into its base."
        )
    refuse_overlap(checkpoint, out)
    config = read_config(read_json(checkpoint / "config.json"), str(checkpoint / "config.json"))
    with atomic_folder(Path(out), overwrite) as folder:
        # What is small comes first, so that what is wrong with it is said before weights are written.
        carry_over(checkpoint, folder)
        complete(folder, config)
        conversion = convert_weights(folder, checkpoint, config, target, dtype, max_shard_size, allow_pickle)
    return replace(conversion, out=Path(out))


def convert_weights(
    folder: Path,
    source: Path,
    config: ILLaDAConfig,
    target: Format,
    dtype: torch.dtype | None,
    max_shard_size: int,
    allow_pickle: bool = False,
) -> Conversion:
    """Writes the weights and `config.json` of one folder into another, and verifies them. Sizes are in bytes."""
    plan = write_model(folder, CheckpointTensors(source, allow_pickle), config, target, dtype, max_shard_size)
    num_layers = verify_logits(source, folder, config, plan, max(max_shard_size, MIN_LOGITS_BYTES))
    return Conversion(
        out=folder,
        num_tensors=len(plan.sources),
        num_bytes=plan.num_bytes,
        num_shards=len(plan.split.filename_to_tensors),
        dtype=plan.dtype,
        tied=plan.tied,
        untied_by_tensors=config.tie_word_embeddings and not plan.tied,
        num_layers_compared=num_layers,
    )


def write_model(
    folder: Path,
    tensors: CheckpointTensors | ModelTensors,
    config: ILLaDAConfig,
    target: Format,
    dtype: torch.dtype | None,
    max_shard_size: int,
) -> Plan:
    """Writes weights and `config.json`, and verifies every tensor."""
    plan = make_plan(tensors, config, target, dtype, max_shard_size)
    fields = target.config_fields(standard_config(config, plan.dtype, plan.tied))
    write_weights(folder, plan, tensors)
    write_json(folder / "config.json", fields)
    verify_tensors(folder, plan, tensors)
    return plan


def complete(folder: Path, config: ILLaDAConfig) -> None:
    """Fills in what the tokenizer and the generation settings of a release leave unsaid."""
    model_class = LLaDAModelLM if isinstance(config, LLaDAConfig) else ILLaDAForCausalLM
    declare_mask_token(folder, config)
    write_generation_config(folder, config, canvas=model_class.default_canvas)


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Raises `ValueError` unless `dtype` is the name of a floating type that can be written, that type, or `None`."""
    if dtype is None or dtype in DTYPES.values():
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(map(repr, DTYPES))}, got {dtype!r}.")
    return DTYPES[dtype]


def parse_size(size: int | str) -> int:
    """Bytes, from a number of them or a string such as `"5GB"`. Raises `ValueError` if not positive or not a size."""
    try:
        num_bytes = parse_size_to_int(size) if isinstance(size, str) else size
    except ValueError:
        num_bytes = 0
    if num_bytes <= 0:
        raise ValueError(f'`max_shard_size` must be positive, in bytes or such as "5GB" or "500MB", got {size!r}.')
    return num_bytes
