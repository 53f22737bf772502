"""What `generate` is asked to continue: the prompts, which of their columns are padding, and the room after them."""

from itertools import accumulate

import torch
from transformers.utils import logging

from .generation_config import MaskedDiffusionGenerationConfig

DEFAULT_MAX_NEW_TOKENS = 256

logger = logging.get_logger()  # Transformers' own, whose verbosity users set


def prepare_prompts(
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None,
    config: MaskedDiffusionGenerationConfig,
    vocab_size: int,
) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """Checks left-padded prompts (B, S) and returns them with their boolean mask.

    Without a mask, leading pad tokens are padding, unless pad is an EOS too.

    Raises:
        ValueError: if a prompt is empty, not of token ids, or padded on the right.
    """
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        kind = getattr(input_ids, "dtype", type(input_ids).__name__)
        raise ValueError(f"`input_ids` must be a tensor of dtype int64 or int32, got {kind}.")
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(f"`input_ids` must be (batch, tokens) and not empty, got {tuple(input_ids.shape)}.")
    if input_ids.min() < 0 or input_ids.max() >= vocab_size:
        span = f"{int(input_ids.min())} to {int(input_ids.max())}"
        raise ValueError(f"`input_ids` must be in [0, {vocab_size}), got {span}.")
    if attention_mask is None:
        is_token = input_ids != config.pad_token_id
        if config.pad_token_id in config.eos_token_ids:
            _warn_of_leading_pads(~is_token, config.pad_token_id)
            is_token = torch.ones_like(is_token)
        elif (is_token[:, :1] & ~is_token[:, -1:]).any():
            raise ValueError(
                f"`input_ids` must be padded on the left, got a row that ends with `pad_token_id`="
                f"{config.pad_token_id}: set `tokenizer.padding_side = 'left'`, or pass `attention_mask`."
            )
        attention_mask = is_token.cumsum(-1) > 0
    if attention_mask.shape != input_ids.shape:
        shapes = f"{tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}"
        raise ValueError(f"`attention_mask` must have the shape of `input_ids`, {shapes}.")
    attention_mask = attention_mask.to(input_ids.device).bool()
    if not attention_mask.any(-1).all():
        raise ValueError("`input_ids` must have at least one token in each row, got a row of padding.")
    if (attention_mask[:, :-1] & ~attention_mask[:, 1:]).any():
        raise ValueError(
            "`attention_mask` must have its zeros on the left, got padding after a token: "
            "set `tokenizer.padding_side = 'left'`."
        )
    return input_ids.long(), attention_mask


def prepare_segments(
    prompt_segments: list | None, attention_mask: torch.BoolTensor, config: MaskedDiffusionGenerationConfig
) -> list[tuple[int, ...]]:
    """Where the segments of each prompt (B, S) end, from the lengths of the first of them; the rest is one more.

    Raises:
        ValueError: if they are not lengths that fit, or nothing reads them.
    """
    if prompt_segments is None:
        return [()] * len(attention_mask)
    if config.block_cache != "frozen":
        raise ValueError(f"`prompt_segments` must come with `block_cache='frozen'`, got {config.block_cache!r}.")
    is_for_all = isinstance(prompt_segments, list) and any(isinstance(row, list) for row in prompt_segments)
    rows = prompt_segments if is_for_all else [prompt_segments]
    if len(rows) != len(attention_mask):
        raise ValueError(
            f"`prompt_segments` must be one list for each of the {len(attention_mask)} prompts, "
            f"got {prompt_segments!r}."
        )
    ends = []
    for lengths, room in zip(rows, attention_mask.sum(-1).tolist()):
        is_list = isinstance(lengths, list) and all(type(length) is int and length > 0 for length in lengths)
        if not is_list or sum(lengths) > room:
            raise ValueError(
                f"`prompt_segments` must be lengths of at least 1 that fit into the prompt of {room} tokens, "
                f"got {lengths!r}."
            )
        ends.append(tuple(accumulate(lengths)))
    return ends


def _warn_of_leading_pads(is_pad: torch.BoolTensor, pad_token_id: int):
    """Warns once if leading pad tokens (B, S), which are read as text, look like padding.

    One at the start of every row does not: that is a BOS.
    """
    leading = is_pad.cumprod(-1).sum(-1)
    if leading.max() > 1 or leading.min() != leading.max():
        logger.warning_once(
            f"`attention_mask` is not given and cannot be inferred, since `pad_token_id`={pad_token_id} is an EOS: "
            "the leading ones of a row are read as text. Pass the `attention_mask` of the tokenizer."
        )


def prepare_max_new_tokens(
    input_ids: torch.LongTensor,
    attention_mask: torch.BoolTensor,
    config: MaskedDiffusionGenerationConfig,
    max_position_embeddings: int,
) -> int:
    """The response's budget in tokens, from `max_new_tokens`, else from `max_length`, else the default.

    Raises:
        ValueError: if prompt and response do not fit into the model's positions, the least length is above the
            budget, or there is nothing to generate.
    """
    prompt_length = int(attention_mask.sum(-1).max())
    room = max_position_embeddings - prompt_length
    if config.max_new_tokens is not None:
        max_new_tokens, source = config.max_new_tokens, f"`max_new_tokens`={config.max_new_tokens}"
    elif config.max_length is not None:
        max_new_tokens, source = config.max_length - input_ids.shape[1], f"`max_length`={config.max_length}"
        if max_new_tokens < 0:
            raise ValueError(f"{source} must be at least the length of the prompt, {input_ids.shape[1]} tokens.")
    else:
        max_new_tokens, source = min(DEFAULT_MAX_NEW_TOKENS, max(room, 1)), "one more token"
    if max_new_tokens > room:
        raise ValueError(
            f"The prompt of {prompt_length} tokens and {source} do not fit into the model's "
            f"{max_position_embeddings} positions (`max_position_embeddings`)."
        )
    for name, least in (("min_new_tokens", config.min_new_tokens), ("min_length", config.min_length)):
        given = input_ids.shape[1] if name == "min_length" else 0
        if least and least > given + max_new_tokens:
            limit = f"{max_new_tokens} new tokens" + (f" after a prompt of {given}" if given else "")
            raise ValueError(f"`{name}` must be at most what may be written, {limit}, got {least}.")
    if max_new_tokens == 0 and not (input_ids == config.mask_token_id).any():
        raise ValueError(f"{source} must be positive: the prompt has no [MASK] to fill, and nothing is appended.")
    return max_new_tokens
