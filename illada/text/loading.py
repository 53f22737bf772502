"""Which checkpoint is meant: a folder, a repository on the Hub, or the embedded model; and how it is loaded."""

import re
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..generation import MaskedDiffusionGenerationMixin
from ..generation_config import MaskedDiffusionGenerationConfig
from ..tiny import EMBEDDED_MODEL
from .whole_models import ADAPTER_CONFIG, BASE_FIELD, base_of, load_whole_model, refuse_problems

DTYPES = ("auto", "float32", "bfloat16", "float16")
HUB_ID = re.compile(r"(?!.*(--|\.\.))[\w.-]*\w(/[\w.-]*\w)?")
CHECKPOINT_FILES = ("config.json", ADAPTER_CONFIG)
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
        reason = f"no {files[0]} there" if folder.exists() else "no such folder"
        raise ValueError(f"`{argument}` must be a folder or a Hub id, got {str(source)!r}: {reason}.")
    return str(source)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose small files can be read before its weights are; see [`open_checkpoint`].

    Attributes:
        place (`str`): folder or Hub id of the weights.
        adapter (`str`, *optional*): folder or Hub id of a LoRA adapter for them.
        argument (`str`): what errors call it.
    """

    place: str
    adapter: str | None
    argument: str

    @property
    def name(self) -> str:
        """The Hub id, or the folder's name."""
        place = self.adapter or self.place
        return Path(place).resolve().name if Path(place).is_dir() else place

    @property
    def is_embedded(self) -> bool:
        """Whether it is the embedded model, without an adapter."""
        return self.adapter is None and Path(self.place).resolve() == EMBEDDED_MODEL

    @cached_property
    def config(self) -> PreTrainedConfig:
        """Raises a `ValueError` if the model is no masked diffusion model."""
        try:
            config = AutoConfig.from_pretrained(self.place)
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise OSError(f"`{self.argument}` {self.place!r} could not be loaded: {reason}") from error
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), type(None))
        if not issubclass(model_class, MaskedDiffusionGenerationMixin):
            raise ValueError(
                f"`{self.argument}` must be a masked diffusion model, got {self.place!r}: {config.model_type}."
            )
        return config

    @cached_property
    def generation_config(self) -> MaskedDiffusionGenerationConfig:
        """The checkpoint's own; the special ids of `config` where it has none."""
        if _find(self.place, "generation_config.json") is None:
            return MaskedDiffusionGenerationConfig.from_model_config(self.config)
        generation_config = MaskedDiffusionGenerationConfig.from_pretrained(self.place)
        if generation_config.mask_token_id is None:
            generation_config.mask_token_id = self.config.mask_token_id
        return generation_config

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The adapter's own, if it has one."""
        has_own = self.adapter is not None and any(_find(self.adapter, file) for file in TOKENIZER_FILES)
        return AutoTokenizer.from_pretrained(self.adapter if has_own else self.place)

    def load_model(self, device: str | torch.device | None = None, **settings) -> PreTrainedModel:
        """The model, ready to generate.

        Args:
            device (`str` or `torch.device`, *optional*): where it is moved.
            settings: further arguments of `from_pretrained`, such as `dtype`.

        Raises:
            CheckpointError: if a tensor is missing, unexpected or of another shape than the config says.
            ValueError: if it is no masked diffusion model, or a file is damaged.
        """
        try:
            model = load_whole_model(self.place, **settings)
            if self.adapter is not None:
                refuse_problems(self.adapter, model.load_adapter(self.adapter).to_dict())
        except SafetensorError as error:
            raise ValueError(f"A safetensors file of {self.adapter or self.place!r} is damaged: {error}.") from error
        return (model if device is None else model.to(device)).eval()


def _find(place: str, file: str) -> Path | None:
    """The file of a folder, or the local copy of the repository's; `None` if there is no such file."""
    if Path(place).is_dir():
        return Path(place, file) if Path(place, file).is_file() else None
    try:
        return Path(hf_hub_download(place, file))
    except EntryNotFoundError:
        return None


def open_checkpoint(source: str | Path | None = None, argument: str = "model") -> Checkpoint:
    """The checkpoint that `source` names: a folder, a Hub id or the embedded model, or a LoRA adapter of one of them.

    Args:
        source (`str` or `Path`, *optional*): see [`locate`].
        argument (`str`): what errors call it.

    Raises:
        ValueError: if there is no checkpoint, or the base model of an adapter is not named.
        OSError: if a repository cannot be reached and is not in the local cache.
        ImportError: if it is an adapter, and `peft` is not installed.
    """
    place = locate(source, argument)
    adapter_config = _find(place, ADAPTER_CONFIG)
    if adapter_config is None or _find(place, "config.json") is not None:
        return _checked(Checkpoint(place, None, argument))
    if find_spec("peft") is None:
        raise ImportError(f"`{argument}` {place!r} is an adapter, which needs peft: `pip install peft`.")
    base = locate(base_of(adapter_config.parent), BASE_FIELD)
    return _checked(Checkpoint(base, place, argument))


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    checkpoint.config  # noqa: B018  is read, or refused
    return checkpoint
