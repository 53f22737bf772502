"""What becomes of each field of Transformers' `GenerationConfig` in masked diffusion: an allow-list.

A field is read, or ignored because it cannot change a token, or refused by name when it is set. A field that a later
version of Transformers adds is refused until it is listed here.
"""

import difflib
from collections.abc import Iterable
from typing import Any

from transformers.generation import GenerationConfig

STANDARD = frozenset(name for name in vars(GenerationConfig()) if not name.startswith("_"))
"""The fields of the installed version. Names that begin with `_` are Transformers' own notes, not settings."""

READ = frozenset(
    {
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "max_time",
        "stop_strings",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "top_h",
        "min_p",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
        "repetition_penalty",
        "suppress_tokens",
        "bad_words_ids",
        "sequence_bias",
        "remove_invalid_values",
        "guidance_scale",
        "num_return_sequences",
        "return_dict_in_generate",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "compile_config",
    }
)

HARMLESS = {
    "use_cache": "`config.json` sets it; the cache of masked diffusion is `block_cache`",
    "renormalize_logits": "confidence and samples come from a softmax, which is the same for normalized logits",
    "disable_compile": "nothing is compiled unless `compile` is set",
    "transformers_version": "a note of who wrote the file",
}
"""Ignored whatever the value, each with the reason."""

_REFUSED = {
    "beam search and contrastive search write from left to right": (
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "length_penalty",
        "early_stopping",
        "constraints",
        "force_words_ids",
        "penalty_alpha",
        "low_memory",
        "dola_layers",
    ),
    "assisted decoding writes from left to right": (
        "is_assistant",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_lookbehind",
        "assistant_ensemble_weight",
        "target_lookbehind",
        "prompt_lookup_num_tokens",
        "max_matching_ngram_size",
        "speculation_type",
        "use_mtp",
    ),
    "it depends on the tokens just before a position, which may be written later": (
        "token_healing",
        "no_repeat_ngram_size",
        "begin_suppress_tokens",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "exponential_decay_length_penalty",
        "watermarking_config",
    ),
    "there is no encoder": (
        "decoder_start_token_id",
        "encoder_no_repeat_ngram_size",
        "encoder_repetition_penalty",
    ),
    "the cache of masked diffusion is set by `block_cache`": (
        "cache_implementation",
        "cache_config",
        "max_cache_len",
        "prefill_chunk_size",
    ),
    "it is not kept; `output_trace` returns the step and the confidence of each token": (
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
    ),
    "pass it to `generate_batch` or `init_continuous_batching`": ("continuous_batching_config",),
}
REFUSED = {name: reason for reason, names in _REFUSED.items() for name in names}
"""{field: why it has no meaning here}."""

_FILLED_IN = GenerationConfig._get_default_generation_params()


def check_standard_fields(config: GenerationConfig):
    """Refuses fields that are not read, unless they have the value that Transformers gives to an unset field.

    Raises:
        ValueError: names the field, its value and the reason.
    """
    for name in sorted(STANDARD - READ - HARMLESS.keys()):
        value = getattr(config, name, None)
        if not _is_unset(value, _FILLED_IN.get(name)):
            reason = REFUSED.get(name, "this version of illada does not know it")
            raise ValueError(f"`{name}` must be unset, got {value!r}: {reason}.")


def check_names(names: Iterable[str], known: Iterable[str], kind: str):
    """Refuses names that are not `known`, with the nearest that is read; `kind` says what they are: "argument"."""
    for name in sorted(set(names).difference(known)):
        near = difflib.get_close_matches(name, set(known) - REFUSED.keys() - HARMLESS.keys(), n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ": `MaskedDiffusionGenerationConfig` has no such field."
        raise ValueError(f"`{name}` is an unknown {kind}{hint}")


def _is_unset(value: Any, filled_in: Any) -> bool:
    return value is None or value is False or (filled_in is not None and value == filled_in)
