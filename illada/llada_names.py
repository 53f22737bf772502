"""The names of LLaDA's released code for the parameters of this package's models."""

from transformers.core_model_loading import WeightRenaming

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


_RENAMINGS = llada_weight_renamings()
_REVERSE_RENAMINGS = [renaming.reverse_transform() for renaming in reversed(_RENAMINGS)]


def standard_name(name: str) -> str:
    """The standard name of a tensor: LLaDA's names are translated, and every other is left as it is."""
    return _rename(name, _RENAMINGS)


def llada_name(name: str) -> str:
    """The LLaDA release's name of a tensor with a standard name."""
    return _rename(name, _REVERSE_RENAMINGS)


def _rename(name: str, renamings: list[WeightRenaming]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name
