"""The formats of the family on disk: how each names its tensors and spells its configuration."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from ..configuration_illada import ILLaDAConfig
from ..configuration_llada import IMPLEMENTED_VALUES, LLaDAConfig
from ..llada_names import llada_name
from ..modeling_illada import ILLaDAForCausalLM
from ..modeling_llada import LLaDAModelLM

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def read_config(fields: dict[str, Any], where: str) -> ILLaDAConfig:
    """The configuration in a `config.json` of either release, or in the standard one.

    Raises:
        ValueError: if `model_type` is of another family, or the configuration asks for what is not implemented.
    """
    classes = {config_class.model_type: config_class for config_class in (ILLaDAConfig, LLaDAConfig)}
    model_type = fields.get("model_type")
    if model_type not in classes:
        raise ValueError(
            f"`model_type` in {where} must be one of {', '.join(map(repr, classes))}, got {model_type!r}."
        )
    try:
        return classes[model_type].from_dict(dict(fields))
    except StrictDataclassError as error:  # its own message has several lines
        raise ValueError(f"{where} is no configuration of this family: {error.__cause__ or error}") from error


def standard_config(config: ILLaDAConfig, dtype: torch.dtype, tied: bool) -> ILLaDAConfig:
    """The same network as a plain [`ILLaDAConfig`], without what belonged to another release's code or folder."""
    fields = config.to_dict()
    for name in ("model_type", "auto_map", "transformers_version", "dtype", "torch_dtype", "architectures"):
        fields.pop(name, None)
    fields |= {"tie_word_embeddings": tied, "dtype": dtype, "architectures": [ILLaDAForCausalLM.__name__]}
    return ILLaDAConfig(**fields)


def _standard_fields(config: ILLaDAConfig) -> dict[str, Any]:
    return json.loads(config.to_json_string())


def _illada_release_fields(config: ILLaDAConfig) -> dict[str, Any]:
    """As transformers 4 wrote it: RoPE's base and the dtype at the top level, under their old names."""
    fields = _standard_fields(config)
    fields |= {"rope_theta": fields.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    fields["torch_dtype"] = fields.pop("dtype")
    return fields


def _llada_release_fields(config: ILLaDAConfig) -> dict[str, Any]:
    representable = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": config.hidden_size // config.num_attention_heads,
    }
    for name, value in representable.items():
        if getattr(config, name) != value:
            raise ValueError(f"`{name}` must be {value!r} in the LLaDA format, got {getattr(config, name)!r}.")
    fields = {released: getattr(config, name) for released, name in LLaDAConfig.attribute_map.items()}
    fields |= {name: allowed[0] for name, allowed in IMPLEMENTED_VALUES.items() if name != "clip_qkv"}
    same_in_both = ("vocab_size", "rms_norm_eps", "rope_full_precision", "attention_dropout", "use_cache")
    ids = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")
    return fields | {
        "architectures": [LLaDAModelLM.__name__],
        "model_type": LLaDAConfig.model_type,
        "embedding_size": config.vocab_size,
        "rope_theta": config.rope_parameters["rope_theta"],
        "torch_dtype": _standard_fields(config)["dtype"],
        **{name: getattr(config, name) for name in same_in_both + ids},
    }


@dataclass(frozen=True)
class Format:
    """A form in which a checkpoint is written.

    Attributes:
        tensor_name (`Callable[[str], str]`): standard name of a tensor to its name in this format.
        config_fields (`Callable[[ILLaDAConfig], dict]`): standard configuration to the content of `config.json`.
        stores_tied_head (`bool`): whether `lm_head.weight` is stored even if it is the embedding.
    """

    tensor_name: Callable[[str], str]
    config_fields: Callable[[ILLaDAConfig], dict[str, Any]]
    stores_tied_head: bool = False


FORMATS = {
    "standard": Format(lambda name: name, _standard_fields),
    "illada": Format(lambda name: name, _illada_release_fields, stores_tied_head=True),
    "llada": Format(llada_name, _llada_release_fields),
}


def find_format(name: str) -> Format:
    """The format of that name. Raises `ValueError` for any other than `"standard"`, `"illada"` and `"llada"`."""
    if name not in FORMATS:
        raise ValueError(f"`to` must be one of {', '.join(map(repr, FORMATS))}, got {name!r}.")
    return FORMATS[name]
