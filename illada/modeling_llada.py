"""LLaDA checkpoints as iLLaDA models: the same network under other parameter names and settings."""

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from .configuration_llada import LLaDAConfig
from .modeling_illada import ILLaDAForCausalLM

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}


def llada_weight_renamings() -> list[WeightRenaming]:
    """The rules, in order, that give a LLaDA checkpoint's parameters this package's names; each can be reversed."""
    outside_blocks = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
    return [
        *(WeightRenaming(rf"^model\.transformer\.{source}", target) for source, target in outside_blocks.items()),
        *(
            WeightRenaming(rf"^model\.transformer\.blocks\.(\d+)\.{source}", rf"model.layers.\1.{target}")
            for source, target in _BLOCK_NAMES.items()
        ),
    ]


class LLaDAModelLM(ILLaDAForCausalLM):
    """An [`ILLaDAForCausalLM`] of a [`LLaDAConfig`], under the class name of the release.

    `from_pretrained` renames the release's parameters on the way in, and `save_pretrained` gives them back their
    names; `illada convert` writes a standard checkpoint.
    """

    config: LLaDAConfig
    config_class = LLaDAConfig
    default_canvas = "fixed"


register_checkpoint_conversion_mapping("llada", llada_weight_renamings(), overwrite=True)

__all__ = ["LLaDAModelLM", "llada_weight_renamings"]
