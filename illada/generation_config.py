"""What `generate` can be told: the standard fields of Transformers and those of masked diffusion."""

import math
from typing import Any

from transformers.generation import GenerationConfig

from .remasking import RANKINGS

CANVASES = ("growing", "fixed")

# Standard fields that presuppose writing from left to right, with the values that leave them unused.
_LEFT_TO_RIGHT_FIELDS: dict[str, tuple] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None,),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "use_mtp": (None, False),
    "cache_implementation": (None,),
    "token_healing": (None, False),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "begin_suppress_tokens": (None,),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "exponential_decay_length_penalty": (None,),
    "watermarking_config": (None,),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "output_scores": (None, False),
    "output_logits": (None, False),
}


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class MaskedDiffusionGenerationConfig(GenerationConfig):
    """Settings of [`MaskedDiffusionGenerationMixin.generate`].

    Every standard field keeps its standard meaning (`max_new_tokens`, `do_sample`, `temperature`, `top_p`,
    `eos_token_id`, `stop_strings`, `suppress_tokens`, `guidance_scale`, `return_dict_in_generate` ...), and
    `max_new_tokens` may be 0, to fill blanks alone. Fields that presuppose writing from left to right (beams, assisted
    decoding, forced first tokens ...) are refused. Unset fields take the published quality: exact, greedy, one token
    per forward.

    Args:
        block_length (`int`, defaults to 32):
            Positions that are decoded together, in tokens.
        canvas (`str`, defaults to the model's way, `"growing"` for iLLaDA):
            `"growing"` appends one block of masks at a time (iLLaDA); `"fixed"` masks the whole response from the
            start and decodes its blocks from left to right (LLaDA).
        max_denoising_steps (`int`, defaults to `block_length`):
            Steps per block. A block of N masks commits `N // steps` in a step, the remainder first.
        remasking (`str`, defaults to `"low_confidence"`):
            What ranks the positions: `"low_confidence"`, `"random"`, `"margin"` or `"entropy"`.
        confidence_threshold (`float`, *optional*):
            In (0, 1]. Each step also commits every position whose confidence is at least this.
        confidence_factor (`float`, *optional*):
            Positive. Each step also commits the n surest positions while `(n + 1) (1 - c_(n)) < factor`.
        entropy_bound (`float`, *optional*):
            Nats, not negative. Each step also commits positions in ascending entropy while the entropies before each
            add up to at most this. At most one of these three is set.
        mask_token_id (`int`, defaults to the model config's):
            Id of [MASK].
        end_think_token_ids (`list[int]`, *optional*):
            Ids of the text that ends a chain of thought, `</think>`. Until the response holds them, the next of them
            is boosted at the first masked position of the active block.
        end_think_boost (`float`, defaults to 0.0), end_think_power (`float`, defaults to 3.0):
            The boost is `end_think_boost * progress ** end_think_power` logits, where progress is the share of
            `max_new_tokens` up to the position.
        output_trace (`bool`, defaults to `False`):
            Also return the step and the confidence at which each position was committed.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    def __init__(self, **kwargs):
        self.block_length: int | None = kwargs.pop("block_length", None)
        self.canvas: str | None = kwargs.pop("canvas", None)
        self.max_denoising_steps: int | None = kwargs.pop("max_denoising_steps", None)
        self.remasking: str | None = kwargs.pop("remasking", None)
        self.confidence_threshold: float | None = kwargs.pop("confidence_threshold", None)
        self.confidence_factor: float | None = kwargs.pop("confidence_factor", None)
        self.entropy_bound: float | None = kwargs.pop("entropy_bound", None)
        self.mask_token_id: int | None = kwargs.pop("mask_token_id", None)
        self.end_think_token_ids: list[int] | None = kwargs.pop("end_think_token_ids", None)
        self.end_think_boost: float | None = kwargs.pop("end_think_boost", None)
        self.end_think_power: float | None = kwargs.pop("end_think_power", None)
        self.output_trace: bool | None = kwargs.pop("output_trace", None)
        super().__init__(**kwargs)

    @classmethod
    def from_model_config(cls, model_config) -> "MaskedDiffusionGenerationConfig":
        """Takes the special ids from a model config, and nothing else."""
        names = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")
        return cls(**{name: getattr(model_config, name, None) for name in names})

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        """Values of fields that neither the caller nor the checkpoint has set."""
        defaults = GenerationConfig._get_default_generation_params()
        del defaults["max_length"]  # `generate` has a default for the response alone
        del defaults["top_k"]  # sampling is from the whole distribution, as published
        return {
            **defaults,
            "block_length": 32,
            "remasking": "low_confidence",
            "end_think_boost": 0.0,
            "end_think_power": 3.0,
            "output_trace": False,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """What `generation_config.json` holds: the fields that are set and differ from Transformers' defaults."""
        return {name: value for name, value in super().to_diff_dict().items() if value is not None}

    @property
    def eos_token_ids(self) -> list[int]:
        """`eos_token_id` as a list, empty if there is none."""
        if self.eos_token_id is None:
            return []
        return [self.eos_token_id] if isinstance(self.eos_token_id, int) else list(self.eos_token_id)

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None):
        """Checks every field; called on construction, on update and on saving."""
        # The inherited check does not know the use of 0: blanks are filled, and nothing is appended.
        max_new_tokens, self.max_new_tokens = self.max_new_tokens, self.max_new_tokens or None
        try:
            super().validate(strict=strict, user_set_attributes=user_set_attributes)
        finally:
            self.max_new_tokens = max_new_tokens

        for name, unused in _LEFT_TO_RIGHT_FIELDS.items():
            if getattr(self, name, None) not in unused:
                raise ValueError(
                    f"`{name}` must be unset, got {getattr(self, name)!r}: it presupposes writing from left to right, "
                    "and masked diffusion does not."
                )
        self._check_integer("max_new_tokens", minimum=0)
        for name in ("max_length", "block_length", "max_denoising_steps"):
            self._check_integer(name, minimum=1)
        for name in ("min_length", "min_new_tokens", "mask_token_id"):
            self._check_integer(name, minimum=0)
        self._check_choice("canvas", CANVASES)
        self._check_choice("remasking", tuple(RANKINGS))
        self._check_number("confidence_threshold", "in (0, 1]", lambda value: 0 < value <= 1)
        self._check_number("confidence_factor", "positive", lambda value: value > 0)
        self._check_number("entropy_bound", "at least 0", lambda value: value >= 0)
        self._check_number("end_think_boost", "at least 0", lambda value: value >= 0)
        self._check_number("end_think_power", "at least 0", lambda value: value >= 0)
        self._check_number("guidance_scale", "at least 0", lambda value: value >= 0)
        self._check_number("temperature", "at least 0", lambda value: value >= 0)
        self._check_number("max_time", "positive", lambda value: value > 0)
        self._check_parallel_rules()
        self._check_special_ids()

    def _check_integer(self, name: str, minimum: int):
        value = getattr(self, name)
        if value is not None and not (_is_integer(value) and value >= minimum):
            raise ValueError(f"`{name}` must be an integer of at least {minimum}, got {value!r}.")

    def _check_choice(self, name: str, choices: tuple[str, ...]):
        value = getattr(self, name)
        if value is not None and value not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")

    def _check_number(self, name: str, allowed: str, is_allowed):
        value = getattr(self, name)
        if value is not None and not (_is_number(value) and is_allowed(value)):
            raise ValueError(f"`{name}` must be a number {allowed}, got {value!r}.")

    def _check_parallel_rules(self):
        rules = ("confidence_threshold", "confidence_factor", "entropy_bound")
        values = {name: getattr(self, name) for name in rules if getattr(self, name) is not None}
        if len(values) > 1:
            raise ValueError(f"At most one of {', '.join(f'`{name}`' for name in rules)} may be set, got {values}.")

    def _check_special_ids(self):
        ids = self.end_think_token_ids
        if ids is not None and not (isinstance(ids, (list, tuple)) and ids and all(map(_is_integer, ids))):
            raise ValueError(f"`end_think_token_ids` must be a non-empty list of token ids, got {ids!r}.")
        if self.mask_token_id is None:
            return
        for name, values in (
            ("eos_token_id", self.eos_token_ids),
            ("pad_token_id", [self.pad_token_id]),
            ("end_think_token_ids", ids or []),
        ):
            if self.mask_token_id in values:
                raise ValueError(f"`{name}` must not hold the id of [MASK], got {self.mask_token_id}.")
