"""Configuration of iLLaDA, a bidirectional masked diffusion language model of Llama's shape."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig


@strict
class ILLaDAConfig(LlamaConfig):
    """Configuration of an [`ILLaDAForCausalLM`]; the defaults are those of iLLaDA-8B (arXiv 2606.25331).

    Every field of `LlamaConfig` keeps its meaning. Fields that only the release's own code knew are understood
    (`torch_dtype`, a top-level `rope_theta`) or refused where they would change the mathematics: `layer_norm_eps` is
    null in released configurations, and a number would ask for LayerNorm in place of RMSNorm.

    Args:
        mask_token_id (`int`, defaults to 5):
            Id of [MASK], the token that the model replaces. The released `config.json` lacks it.
        resid_pdrop (`float`, defaults to 0.0):
            Dropout probability of the outputs of attention and of the MLP, before each is added to the residual
            stream. Active in training only.
        rope_full_precision (`bool`, defaults to `False`):
            Whether queries and keys are rotated in fp32 and then cast back, as LLaDA does, instead of in their own
            precision.
        single_turn (`bool`, defaults to `False`):
            Whether the model was trained on single messages with their answers: a chat then sends it the last message
            only.

    Raises:
        ValueError: if `layer_norm_eps` is a number, if RoPE is scaled, or if a special id lies outside the vocabulary.
    """

    model_type = "illada"
    default_theta = 500000.0
    clip_qkv: ClassVar[None] = None  # read by the attention that is inherited from OLMo

    vocab_size: int = 155136
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 8192
    initializer_range: float = 0.009882118  # sqrt(2 / (5 * 4096)), the value in the released configuration
    rms_norm_eps: float = 1e-6
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    mask_token_id: int | None = 5
    tie_word_embeddings: bool = True
    resid_pdrop: float | int = 0.0
    rope_full_precision: bool = False
    single_turn: bool = False

    def __post_init__(self, **kwargs):
        layer_norm_eps = kwargs.pop("layer_norm_eps", None)
        if layer_norm_eps is not None:
            raise ValueError(
                f"`layer_norm_eps` must be null, got {layer_norm_eps}: this model normalises with RMSNorm, "
                "whose epsilon is `rms_norm_eps`."
            )
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict:
        """Without `layer_norm_eps`, which is no field of this class: a model of it normalises with RMSNorm."""
        return {name: value for name, value in super().to_dict().items() if name != "layer_norm_eps"}

    def validate_architecture(self):
        """Part of the validation that `@strict` runs: refuses what this architecture does not implement."""
        super().validate_architecture()
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type != "default":
            raise ValueError(f"`rope_scaling` must be null, got type {rope_type!r}: this model uses unscaled RoPE.")
        for name in ("mask_token_id", "bos_token_id", "pad_token_id"):
            token_id = getattr(self, name)
            if token_id is not None and not 0 <= token_id < self.vocab_size:
                raise ValueError(f"`{name}` must be in [0, {self.vocab_size}), got {token_id}.")


__all__ = ["ILLaDAConfig"]
