"""Configuration of LLaDA, `model_type = "llada"`, which this package runs as an iLLaDA of other settings."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_illada import ILLaDAConfig

# What the released modelling code can switch and this package does not implement: the field, and the values that it
# may have, the released one first.
IMPLEMENTED_VALUES = {
    "activation_type": ("silu",),
    "alibi": (False, None),
    "attention_layer_norm": (False, None),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1, None),
    "block_type": ("llama",),
    "clip_qkv": (None,),
    "embedding_dropout": (0.0, None),
    "include_bias": (False, None),
    "include_qkv_bias": (False, None),
    "input_emb_norm": (False, None),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "multi_query_attention": (False, None),
    "rope": (True,),
    "scale_logits": (False, None),
}
# Fields that say how the released code is run or initialised, or that belong to a switch which is off.
IRRELEVANT_FIELDS = (
    "alibi_bias_max",
    "attention_layer_norm_with_affine",
    "flash_attention",
    "init_cutoff_factor",
    "init_device",
    "init_fn",
    "precision",
)


@strict
class LLaDAConfig(ILLaDAConfig):
    """Configuration of a [`LLaDAModelLM`]; the defaults are the shape of LLaDA-8B (arXiv 2502.09992).

    The release's field names (`d_model`, `n_layers` ...) and the standard ones (`hidden_size`, `num_hidden_layers`
    ...) are both understood, as arguments, as attributes and in `config.json`; the standard ones are written. Special
    ids have no defaults: they are the checkpoint's own.

    Raises:
        ValueError: if a switch of the released code asks for an architecture that this package does not implement.
    """

    model_type = "llada"
    attribute_map: ClassVar[dict[str, str]] = {
        "d_model": "hidden_size",
        "init_std": "initializer_range",
        "max_sequence_length": "max_position_embeddings",
        "mlp_hidden_size": "intermediate_size",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "n_layers": "num_hidden_layers",
        "residual_dropout": "resid_pdrop",
        "weight_tying": "tie_word_embeddings",
    }

    vocab_size: int = 126464
    intermediate_size: int = 12288
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    mask_token_id: int | None = None
    tie_word_embeddings: bool = False
    rope_full_precision: bool = True

    def __post_init__(self, **kwargs):
        for name, allowed in IMPLEMENTED_VALUES.items():
            value = kwargs.pop(name, allowed[0])
            if value not in allowed:
                raise ValueError(
                    f"`{name}` must be {allowed[0]!r}, got {value!r}: this package implements LLaDA as released."
                )
        for name in IRRELEVANT_FIELDS:
            kwargs.pop(name, None)

        # Set before the base classes derive values (`head_dim`) from these; `attribute_map` alone acts after that.
        for released_name, name in self.attribute_map.items():
            if (value := kwargs.pop(released_name, None)) is not None:
                setattr(self, name, value)
            elif released_name == "mlp_hidden_size" and "mlp_ratio" in kwargs:
                self.intermediate_size = kwargs["mlp_ratio"] * self.hidden_size
        kwargs.pop("mlp_ratio", None)
        # The released code pads the rows of its embedding beyond the vocabulary.
        self.vocab_size = kwargs.pop("embedding_size", None) or self.vocab_size
        super().__post_init__(**kwargs)


__all__ = ["LLaDAConfig"]
