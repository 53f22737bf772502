"""What `generate` would refuse, without a forward pass: for callers who must answer before the writing begins."""

import torch

from ..generation import MaskedDiffusionGenerationMixin
from ..prompts import prepare_max_new_tokens, prepare_prompts


def check_call(model: MaskedDiffusionGenerationMixin, input_ids: list[int], settings: dict):
    """Checks one prompt and its settings, which are fields of [`MaskedDiffusionGenerationConfig`] or `preset`.

    Raises:
        ValueError: names the argument of `generate`, its value and what is allowed.
    """
    config = model._prepare_settings(None, dict(settings))
    tokens = torch.tensor([input_ids], dtype=torch.long)
    tokens, mask = prepare_prompts(tokens, torch.ones_like(tokens), config, model.config.vocab_size)
    prepare_max_new_tokens(tokens, mask, config, model.config.max_position_embeddings)
