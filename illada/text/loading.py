"""Which checkpoint is meant: a folder, a repository on the Hub, or the embedded model; and how it is loaded."""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..generation import MaskedDiffusionGenerationMixin
from ..tiny import EMBEDDED_MODEL

DTYPES = ("auto", "float32", "bfloat16", "float16")


HUB_ID = re.compile(r"[\w.-]*\w(/[\w.-]+)?")
CHECKPOINT_FILES = ("config.json", "adapter_config.json")
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


def locate(source: str | Path | None, argument: str = "model", files: tuple[str, ...] = CHECKPOINT_FILES) -> str:
    """What `from_pretrained` is given for `source`: a folder or a Hub id.

    Args:
        source (`str` or `Path`, *optional*): a checkpoint folder or a Hub id; the embedded model if absent, or if it
            is the embedded model's name and there is no such folder.
        argument (`str`): what errors call it.
        files (`tuple[str, ...]`): a folder must contain one of them.

    Raises:
        ValueError: if it can be neither.
    """
    if source is None:
        return str(EMBEDDED_MODEL)
    folder = Path(source).expanduser()
    if any((folder / file).is_file() for file in files):
        return str(folder)
    if str(source) == EMBEDDED_MODEL.name:
        return str(EMBEDDED_MODEL)
    if folder.exists() or not HUB_ID.fullmatch(str(source)):
        raise ValueError(
            f"`{argument}` must be a checkpoint folder or a Hub id, got {str(source)!r}: no {files[0]} there."
        )
    return str(source)


def load(
    source: str | Path | None = None, dtype: str = "auto", device: str | None = None, argument: str = "model"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, ready to generate, and its tokenizer.

    Args:
        source (`str` or `Path`, *optional*): see [`locate`].
        dtype (`str`): of the weights: `auto`, `float32`, `bfloat16` or `float16`.
        device (`str`, *optional*): where it runs; CUDA if there is any, else the CPU, if absent.
        argument (`str`): what errors call `source`.

    Raises:
        ValueError: if `source` is no masked diffusion model, or one of its files is damaged.
    """
    place = locate(source, argument)
    try:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype)
    except SafetensorError as error:
        raise ValueError(f"A safetensors file of {place!r} is damaged: {error}.") from error
    if not isinstance(model, MaskedDiffusionGenerationMixin):
        raise ValueError(f"`{argument}` must be a masked diffusion model, got {place!r}: {type(model).__name__}.")
    tokenizer = AutoTokenizer.from_pretrained(place)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer
