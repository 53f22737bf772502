"""What will be written, decided and checked from names, shapes and dtypes before a single tensor is."""

from dataclasses import dataclass

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards

from ..configuration_illada import ILLaDAConfig
from ..llada_names import standard_name
from ..modeling_illada import ILLaDAForCausalLM
from ..text.whole_models import CheckpointError
from .formats import EMBEDDING, HEAD, Format
from .reading import FLOATING_DTYPES, CheckpointTensors, ModelTensors, TensorInfo

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATING_DTYPES.values()}


@dataclass(frozen=True)
class Plan:
    """What goes into which file of the output, and where it comes from.

    Attributes:
        sources (`dict[str, str]`): name of each tensor in the output to its name in the source.
        split (`StateDictSplit`): which file of the output holds which tensors.
        dtype (`torch.dtype`): of every tensor in the output.
        tied (`bool`): whether the LM head is the embedding.
    """

    sources: dict[str, str]
    split: StateDictSplit
    dtype: torch.dtype
    tied: bool

    @property
    def num_bytes(self) -> int:
        return self.split.metadata["total_size"]


def make_plan(
    source: CheckpointTensors | ModelTensors,
    config: ILLaDAConfig,
    target: Format,
    dtype: torch.dtype | None,
    max_shard_size: int | str,
) -> Plan:
    """Matches the tensors of `source` with those that `config` asks for, and deals them out to shards.

    The LM head is tied if the configuration says so and the tensors agree: a stored head that differs from the
    embedding makes the output untied, whatever the configuration says.

    Args:
        dtype (`torch.dtype`, *optional*): of the output; that of the source, which must then be one, if absent.
        max_shard_size (`int` or `str`): in bytes, or such as `"5GB"`. A larger tensor gets a shard of its own.

    Raises:
        CheckpointError: lists the tensors that are missing, extra, misshapen, duplicate or of a dtype that cannot be
            written.
    """
    sources, problems = match_tensors(source.infos, config)
    problems["wrong dtype"] = _wrong_dtypes(source, dtype)
    if any(problems.values()):
        raise CheckpointError(source.name, problems)

    expected = expected_shapes(config)
    tied = config.tie_word_embeddings and (HEAD not in sources or source.equal(sources[HEAD], sources[EMBEDDING]))
    names = [name for name in expected if name != HEAD or not tied]
    if tied and target.stores_tied_head:
        names.append(HEAD)
        sources[HEAD] = sources[EMBEDDING]
    dtype = dtype or source.infos[sources[EMBEDDING]].dtype
    state = {target.tensor_name(name): torch.empty(expected[name], dtype=dtype, device="meta") for name in names}
    return Plan(
        sources={target.tensor_name(name): sources[name] for name in names},
        split=split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size),
        dtype=dtype,
        tied=tied,
    )


def match_tensors(infos: dict[str, TensorInfo], config: ILLaDAConfig) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Which stored tensor is which of those that `config` asks for.

    Args:
        infos (`dict[str, TensorInfo]`): of the stored tensors, by name.

    Returns:
        Standard name to stored name, and the problems of [`CheckpointError`]; no list has an element if all fit.
    """
    sources: dict[str, str] = {}
    duplicates = []
    for name in infos:
        duplicates += [name, sources[standard_name(name)]] if standard_name(name) in sources else []
        sources[standard_name(name)] = name

    expected = expected_shapes(config)
    head_may_be_absent = config.tie_word_embeddings
    return sources, {
        "missing": [name for name in expected if name not in sources and not (name == HEAD and head_may_be_absent)],
        "extra": [stored for name, stored in sources.items() if name not in expected],
        "misshapen": [
            f"{stored} {list(infos[stored].shape)} instead of {list(expected[name])}"
            for name, stored in sources.items()
            if name in expected and infos[stored].shape != expected[name]
        ],
        "duplicate": duplicates,
    }


def expected_shapes(config: ILLaDAConfig) -> dict[str, tuple[int, ...]]:
    """Of every tensor of the model, the LM head included, under standard names and in the model's order."""
    with torch.device("meta"):
        model = ILLaDAForCausalLM(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _wrong_dtypes(source: CheckpointTensors | ModelTensors, dtype: torch.dtype | None) -> list[str]:
    """Tensors that are not floating; if no dtype is asked for, also those that differ from most."""
    dtypes = {name: info.dtype for name, info in source.infos.items()}
    wrong = [f"{name} ({stored})" for name, stored in dtypes.items() if stored not in DTYPES.values()]
    if wrong or dtype is not None:
        return wrong
    usual = max(set(dtypes.values()), key=list(dtypes.values()).count)
    return [
        f"{name} ({_dtype_name(stored)}, the others are {_dtype_name(usual)}; `dtype` would make them one)"
        for name, stored in dtypes.items()
        if stored != usual
    ]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
