"""LLaDA checkpoints as iLLaDA models: the same network under other parameter names and settings."""

from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from .configuration_llada import LLaDAConfig
from .llada_names import llada_weight_renamings
from .modeling_illada import ILLaDAForCausalLM


class LLaDAModelLM(ILLaDAForCausalLM):
    """An [`ILLaDAForCausalLM`] of a [`LLaDAConfig`], under the class name of the release.

    `from_pretrained` renames the release's parameters on the way in, and `save_pretrained` gives them back their
    names; `illada convert` writes a standard checkpoint.
    """

    config: LLaDAConfig
    config_class = LLaDAConfig
    default_canvas = "fixed"


register_checkpoint_conversion_mapping("llada", llada_weight_renamings(), overwrite=True)

__all__ = ["LLaDAModelLM"]
