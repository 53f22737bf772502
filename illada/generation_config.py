"""What `generate` can be told: the standard fields of Transformers and those of masked diffusion."""

import math
from typing import Any

from transformers.generation import GenerationConfig

from .commit_rules import COMMIT_RULES, PARALLEL_RULES, CommitRule
from .rankings import RANKINGS

CANVASES = ("growing", "fixed")
BLOCK_CACHES = ("prefix", "dual")

PRESETS: dict[str, dict] = {
    "exact": {
        "max_denoising_steps": None,
        "confidence_threshold": None,
        "confidence_factor": None,
        "entropy_bound": None,
        "commit_rule": None,
        "block_cache": None,
        "cache_refresh_interval": None,
        "compile": None,
    },
    "fast": {"confidence_threshold": 0.9},
}
"""Settings by name. `exact` is the published quality, one token per forward pass; `docs/generation.md` has the
measured accuracy and speed of each."""

# Standard fields that presuppose writing from left to right, with the values that leave them unused.
_LEFT_TO_RIGHT_FIELDS: dict[str, tuple] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "diversity_penalty": (None, 0.0),
    "length_penalty": (None, 1.0),
    "early_stopping": (None, False),
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


# Arguments of Transformers' `generate` that callers pass unset.
_UNUSED_ARGUMENTS = (
    "assistant_model",
    "custom_generate",
    "inputs_embeds",
    "negative_prompt_attention_mask",
    "negative_prompt_ids",
    "past_key_values",
    "position_ids",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "trust_remote_code",
    "use_model_defaults",
)


def _is_unset(name: str, value: Any) -> bool:
    return name in _UNUSED_ARGUMENTS and (value is None or value is False)


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
            add up to at most this. At most one of these three and `commit_rule` is set.
        commit_rule (`str` or [`CommitRule`], *optional*):
            A rule by its name in `commit_rules.COMMIT_RULES`, or a rule of your own.
        seed (`int`, *optional*):
            Seed of the noise, instead of a `generator`: the first row's, one more for each row after it.
        defer_eos (`bool`, defaults to `False`):
            Commit a proposed EOS only when nothing else of the block is left to commit (LLaDA's
            `confidence_eos_eot_inf`, for models whose training padded answers with EOS).
        block_cache (`str`, *optional*):
            Between the first step of a block and its last, keep keys and values as they were at the first, and
            recompute the block alone (`"dual"`), or the block and what follows it (`"prefix"`; on a growing canvas
            nothing does). Approximate. Without it every step computes the whole canvas.
        cache_refresh_interval (`int`, *optional*):
            With a `block_cache`, also compute the whole canvas at every so many steps of a block; 1 is exact.
        compile (`bool`, *optional*):
            With a `block_cache`, compile the forward pass of a block once, for one shape, and use it in later calls
            of that shape; as a CUDA graph on a GPU. `compile_config` sets how.
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
        self.commit_rule: str | CommitRule | None = kwargs.pop("commit_rule", None)
        self.seed: int | None = kwargs.pop("seed", None)
        self.defer_eos: bool | None = kwargs.pop("defer_eos", None)
        self.block_cache: str | None = kwargs.pop("block_cache", None)
        self.cache_refresh_interval: int | None = kwargs.pop("cache_refresh_interval", None)
        self.compile: bool | None = kwargs.pop("compile", None)
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

    @classmethod
    def from_standard(cls, config: GenerationConfig | None) -> "MaskedDiffusionGenerationConfig":
        """The same settings as an object of this class; itself, if it is one already."""
        if isinstance(config, cls):
            return config
        fields = {} if config is None else config.to_dict()
        fields.pop("_from_model_config", None)  # such a config would lose fields when it is saved and loaded
        return cls.from_dict(fields)

    @classmethod
    def merged(
        cls, own: GenerationConfig | None, given: GenerationConfig | None, preset: str | None = None, **fields
    ) -> "MaskedDiffusionGenerationConfig":
        """The settings of one call: `fields`, then `preset`, then `given`, then the model's `own`, then defaults.

        Fields that exclude each other (two lengths, two parallel rules) are taken together: where one source sets one
        of them, those of the sources behind it are left out.

        Raises:
            ValueError: if a field is unknown or has a bad value.
        """
        if preset is not None and preset not in tuple(PRESETS):
            raise ValueError(f"`preset` must be one of {', '.join(map(repr, PRESETS))}, got {preset!r}.")
        config = cls()
        fields = {name: value for name, value in fields.items() if not _is_unset(name, value)}
        if unknown := {name for name in fields if not hasattr(config, name)}:
            raise ValueError(
                f"`generate` got unknown arguments {sorted(unknown)}: it takes the fields of `{cls.__name__}` and the "
                "arguments of its docstring."
            )

        def set_fields(source: GenerationConfig | None) -> dict:
            values = cls.from_standard(source).to_dict()
            return {name: value for name, value in values.items() if value is not None and name in vars(config)}

        caller = [set_fields(given), PRESETS.get(preset, {}), fields]
        values: dict[str, Any] = {}
        for source in (cls._get_default_generation_params(), set_fields(own), *caller):
            for alternatives in (("max_new_tokens", "max_length"), (*PARALLEL_RULES, "commit_rule")):
                if any(source.get(name) is not None for name in alternatives):
                    values = {name: value for name, value in values.items() if name not in alternatives}
            values |= source
        for name, value in values.items():
            setattr(config, name, value)
        config.validate(user_set_attributes=set().union(*caller))
        return config

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
            "defer_eos": False,
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
        self._check_fields()
        # The inherited check does not know the use of 0: blanks are filled, and nothing is appended.
        max_new_tokens, self.max_new_tokens = self.max_new_tokens, self.max_new_tokens or None
        try:
            super().validate(strict=strict, user_set_attributes=user_set_attributes)
        finally:
            self.max_new_tokens = max_new_tokens
        if strict and max_new_tokens == 0:
            raise ValueError(
                "`max_new_tokens` must be positive in a config that is saved, got 0: pass it to `generate`, since "
                "Transformers reads no file with it."
            )
        self._check_parallel_rules()
        self._check_block_cache()
        self._check_mask_id()
        if self.end_think_boost and not self.end_think_token_ids:
            raise ValueError(
                f"`end_think_boost`={self.end_think_boost} must come with `end_think_token_ids`, got none."
            )

    def _check_fields(self):
        """Checks each field alone; before the inherited check, which compares without looking at types."""
        for name, unused in _LEFT_TO_RIGHT_FIELDS.items():
            if getattr(self, name, None) not in unused:
                raise ValueError(
                    f"`{name}` must be unset, got {getattr(self, name)!r}: it presupposes writing from left to right, "
                    "and masked diffusion does not."
                )
        for name in ("max_length", "block_length", "max_denoising_steps", "num_return_sequences"):
            self._check_integer(name, minimum=1)
        self._check_integer("cache_refresh_interval", minimum=1)
        self._check_integer("seed", minimum=0)
        for name in ("max_new_tokens", "min_length", "min_new_tokens", "top_k", "mask_token_id", "pad_token_id"):
            self._check_integer(name, minimum=0)
        for name in ("compile", "defer_eos", "do_sample", "output_trace", "return_dict_in_generate"):
            if not isinstance(getattr(self, name), (bool, type(None))):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        self._check_choice("canvas", CANVASES)
        self._check_choice("block_cache", BLOCK_CACHES)
        self._check_choice("remasking", tuple(RANKINGS))
        if not isinstance(self.commit_rule, CommitRule):
            self._check_choice("commit_rule", tuple(name for name in COMMIT_RULES if name not in PARALLEL_RULES))
        for name in ("confidence_threshold", "typical_p"):
            self._check_number(name, "in (0, 1]", lambda value: 0 < value <= 1)
        for name in ("top_p", "min_p"):
            self._check_number(name, "in [0, 1]", lambda value: 0 <= value <= 1)
        for name in ("epsilon_cutoff", "eta_cutoff"):
            self._check_number(name, "in [0, 1)", lambda value: 0 <= value < 1)
        for name in ("confidence_factor", "repetition_penalty", "max_time"):
            self._check_number(name, "above 0", lambda value: value > 0)
        for name in ("entropy_bound", "end_think_boost", "end_think_power", "guidance_scale", "temperature"):
            self._check_number(name, "of at least 0", lambda value: value >= 0)
        for name in ("eos_token_id", "suppress_tokens", "end_think_token_ids"):
            self._check_token_ids(name)
        self._check_stop_strings()

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
        rules = *PARALLEL_RULES, "commit_rule"
        values = {name: getattr(self, name) for name in rules if getattr(self, name) is not None}
        if len(values) > 1:
            names = ", ".join(f"`{name}`" for name in rules)
            raise ValueError(f"At most one of {names} may be set, got {values}.")

    def _check_block_cache(self):
        for name in ("cache_refresh_interval", "compile"):
            if self.block_cache is None and getattr(self, name):
                raise ValueError(f"`{name}`={getattr(self, name)} must come with `block_cache`, got None.")

    def _check_token_ids(self, name: str):
        value = getattr(self, name)
        if value is None or (name == "eos_token_id" and _is_integer(value) and value >= 0):
            return
        is_list = isinstance(value, (list, tuple)) and (value or name != "end_think_token_ids")
        if not (is_list and all(_is_integer(token_id) and token_id >= 0 for token_id in value)):
            raise ValueError(f"`{name}` must be a list of token ids, got {value!r}.")

    def _check_stop_strings(self):
        value = self.stop_strings
        strings = [value] if isinstance(value, str) else value
        if value is not None and not (
            isinstance(strings, (list, tuple)) and strings and all(isinstance(x, str) and x for x in strings)
        ):
            raise ValueError(f"`stop_strings` must be a string or a list of strings, none empty, got {value!r}.")

    def _check_mask_id(self):
        if self.mask_token_id is None:
            return
        for name, values in (
            ("eos_token_id", self.eos_token_ids),
            ("pad_token_id", [self.pad_token_id]),
            ("end_think_token_ids", self.end_think_token_ids or []),
        ):
            if self.mask_token_id in values:
                raise ValueError(f"`{name}` must not hold `mask_token_id`, [MASK], got {self.mask_token_id}.")
