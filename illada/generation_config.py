"""What `generate` can be told: the standard fields of Transformers and those of masked diffusion."""

from functools import cache
from typing import Any

from transformers.generation import GenerationConfig
from transformers.utils import logging

from .commit_rules import PARALLEL_RULES, CommitRule, rule_names, rule_of
from .field_checks import (
    check_bad_words,
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_strings,
    check_token_biases,
    check_token_ids,
    is_integer,
)
from .rankings import RANKINGS
from .standard_fields import READ, STANDARD, check_names, check_standard_fields

logger = logging.get_logger()  # Transformers' own, whose verbosity users set

CANVASES = ("growing", "fixed")
BLOCK_CACHES = ("prefix", "dual", "frozen")

PRESETS: dict[str, dict] = {
    "exact": {
        "max_denoising_steps": None,
        "confidence_threshold": None,
        "confidence_factor": None,
        "entropy_bound": None,
        "frechet_margin": None,
        "commit_rule": None,
        "num_drafts": None,
        "block_cache": None,
        "cache_refresh_interval": None,
        "cache_refresh_entropy": None,
        "compile": None,
        "compile_config": None,
    },
    "fast": {"confidence_threshold": 0.9},
}
"""Settings by name. `exact` is the published quality, one token per forward pass; `docs/generation.md` has the
measured accuracy and speed of each."""

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
    "use_model_defaults",
)


def _is_unused(name: str, value: Any) -> bool:
    # `trust_remote_code` is about `custom_generate` and means nothing without it.
    return name == "trust_remote_code" or (name in _UNUSED_ARGUMENTS and (value is None or value is False))


def _settings(config: GenerationConfig | None) -> dict[str, Any]:
    """What a config sets, including names that are no fields; without Transformers' own notes."""
    if not isinstance(config, (GenerationConfig, type(None))):
        raise ValueError(f"`generation_config` must be a GenerationConfig, got {config!r}.")
    fields = {} if config is None else vars(config)
    return {name: value for name, value in fields.items() if value is not None and not name.startswith("_")}


class MaskedDiffusionGenerationConfig(GenerationConfig):
    """Settings of [`MaskedDiffusionGenerationMixin.generate`].

    Standard fields that are read keep their standard meaning (`max_new_tokens`, `do_sample`, `temperature`, `top_p`,
    `eos_token_id`, `stop_strings`, `suppress_tokens`, `guidance_scale`, `return_dict_in_generate` ...), except that
    `max_new_tokens` may be 0, to fill only the blanks of a prompt. `bad_words_ids` and `sequence_bias` take single
    tokens. Every other standard field (beams, assisted decoding, forced first tokens ...) is refused when it is set;
    `standard_fields.py` has the list. Unset fields give the published quality: exact, greedy, one token per forward.
    `PRESETS` are named groups of settings, which `generate(preset=...)` takes.

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
            Positive. Each step also commits the n most confident positions while
            `(n + 1) (1 - c_(n)) < factor`, where `c_(n)` is the n-th highest confidence.
        entropy_bound (`float`, *optional*):
            Nats, not negative. Each step also commits positions in ascending entropy while the entropies before each
            add up to at most this.
        frechet_margin (`float`, *optional*):
            In [0, 1). Each step also commits the n most confident positions while
            `c_(1) + ... + c_(n) - (n - 1) - (1 - c_(n)) > frechet_margin`. At most one of these four and
            `commit_rule` is set.
        commit_rule (`str` or [`CommitRule`], *optional*):
            What decides which proposals a step commits: `"klass"`, `"local_leap"`, `"credit_decoding"`, `"t2m"`,
            `"wino"` or another name in `commit_rules.COMMIT_RULES`, for the rule with its defaults; an object such as
            `KLASS(confidence=0.8)`; or a rule of your own.
        seed (`int`, *optional*):
            Seed of sampling and of `remasking="random"`, instead of a `generator`: the first row has `seed`, the
            second `seed + 1`, and so on.
        defer_eos (`bool`, defaults to `False`):
            Commit a proposed EOS only when nothing else of the block is left to commit (LLaDA's
            `confidence_eos_eot_inf`, for models whose training padded answers with EOS).
        num_drafts (`int`, *optional*):
            At least 1, which is the same as absent. Texts of a row that a pass predicts: the row's own, and
            `num_drafts - 1` guesses of what the next steps make of it. Steps that were guessed need no pass of their
            own; the tokens are the same (`drafts.py`). For greedy decoding by rules without a memory.
        block_cache (`str`, *optional*):
            Compute the whole canvas at the first step of a block; at its other steps reuse those keys and values, and
            recompute only the block (`"dual"`), or the block and what follows it (`"prefix"`; on a growing canvas
            nothing does). `"frozen"`, on a growing canvas: each block, and the prompt, see what is before them and
            not what follows, so that their keys and values are computed once. All three are approximate. Without a
            cache every step computes the whole canvas.
        cache_refresh_interval (`int`, *optional*):
            With `"prefix"` or `"dual"`, compute the whole canvas again every so many steps of a block; 1 is exact.
        cache_refresh_entropy (`float`, *optional*):
            Positive, in nats. With `"prefix"` or `"dual"`, compute the whole canvas in the step after one that commits
            a token whose distribution has more entropy than this (EntropyCache, arXiv 2603.18489).
        compile (`bool`, *optional*):
            With a `block_cache`, compile the forward pass of a block once, for one shape, and use it in later calls
            of that shape; as a CUDA graph on a GPU.
        compile_config (`CompileConfig`, *optional*):
            With `compile`, the arguments of `torch.compile`.
        mask_token_id (`int`, defaults to the model config's):
            Id of [MASK].
        end_think_token_ids (`list[int]`, *optional*):
            Ids of the text that ends a chain of thought, `</think>`. Until the response contains them, the next
            of them is boosted at the first masked position of the active block.
        end_think_boost (`float`, defaults to 0.0), end_think_power (`float`, defaults to 3.0):
            The boost is `end_think_boost * progress ** end_think_power` logits, where progress is the share of
            `max_new_tokens` up to the position.
        output_trace (`bool`, defaults to `False`):
            Also return the forward pass and the confidence at which each position was committed.

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
        self.frechet_margin: float | None = kwargs.pop("frechet_margin", None)
        self.commit_rule: str | CommitRule | None = kwargs.pop("commit_rule", None)
        self.seed: int | None = kwargs.pop("seed", None)
        self.defer_eos: bool | None = kwargs.pop("defer_eos", None)
        self.num_drafts: int | None = kwargs.pop("num_drafts", None)
        self.block_cache: str | None = kwargs.pop("block_cache", None)
        self.cache_refresh_interval: int | None = kwargs.pop("cache_refresh_interval", None)
        self.cache_refresh_entropy: float | None = kwargs.pop("cache_refresh_entropy", None)
        self.compile: bool | None = kwargs.pop("compile", None)
        self.mask_token_id: int | None = kwargs.pop("mask_token_id", None)
        self.end_think_token_ids: list[int] | None = kwargs.pop("end_think_token_ids", None)
        self.end_think_boost: float | None = kwargs.pop("end_think_boost", None)
        self.end_think_power: float | None = kwargs.pop("end_think_power", None)
        self.output_trace: bool | None = kwargs.pop("output_trace", None)
        fields = {name for name in kwargs if not name.startswith("_")}
        check_names(fields, STANDARD.union(vars(self)), "field")
        super().__init__(**kwargs)

    @classmethod
    @cache
    def field_names(cls) -> frozenset[str]:
        """Every name that may be set."""
        return frozenset(name for name in vars(cls()) if not name.startswith("_"))

    @classmethod
    def from_model_config(cls, model_config) -> "MaskedDiffusionGenerationConfig":
        """Takes the special ids from a model config, and nothing else."""
        names = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")
        return cls(**{name: getattr(model_config, name, None) for name in names})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As Transformers has it. Unknown names are kept, with a warning: a file with extras can be loaded and saved.

        `generate` refuses them, since a misspelt name looks the same.
        """
        extras = {
            name: value
            for name, value in config_dict.items()
            if name not in cls.field_names() and not name.startswith("_")
        }
        if extras:
            logger.warning_once(
                f"The generation config has unknown fields, which `generate` refuses: {sorted(extras)}"
            )
        fields = {name: value for name, value in config_dict.items() if name not in extras}
        loaded = super().from_dict(fields, **kwargs)
        vars(loaded[0] if isinstance(loaded, tuple) else loaded).update(extras)
        return loaded

    @classmethod
    def from_standard(cls, config: GenerationConfig | None) -> "MaskedDiffusionGenerationConfig":
        """The same settings as an object of this class; itself, if it is one already."""
        # `_from_model_config` is not among them: such a config would lose fields when it is saved and loaded.
        return config if isinstance(config, cls) else cls.from_dict(_settings(config))

    @classmethod
    def merged(
        cls, own: GenerationConfig | None, given: GenerationConfig | None, preset: str | None = None, **fields
    ) -> "MaskedDiffusionGenerationConfig":
        """The settings of one call: `fields`, then `preset`, then `given`, then the model's `own`, then defaults.

        Fields that exclude each other (two lengths, two parallel rules) are taken together: where one source sets one
        of them, those of the sources after it are left out.

        Raises:
            ValueError: if a field is unknown or has a bad value.
        """
        if preset is not None and preset not in tuple(PRESETS):
            raise ValueError(f"`preset` must be one of {', '.join(map(repr, PRESETS))}, got {preset!r}.")
        fields = {name: value for name, value in fields.items() if not _is_unused(name, value)}
        names = cls.field_names()
        check_names(fields, names, "argument of `generate`")
        check_names(_settings(given), names, "field of `generation_config`")
        check_names(_settings(own), names, "field of the model's `generation_config`")
        caller = [_settings(given), PRESETS.get(preset, {}), fields]
        values: dict[str, Any] = {}
        for source in (cls._get_default_generation_params(), _settings(own), *caller):
            for alternatives in (("max_new_tokens", "max_length"), (*PARALLEL_RULES, "commit_rule")):
                if any(source.get(name) is not None for name in alternatives):
                    values = {name: value for name, value in values.items() if name not in alternatives}
            values |= source
        config = cls()
        vars(config).update(values)
        config.validate(user_set_attributes=set().union(*caller))
        return config

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        """Values of fields that neither the caller nor the checkpoint has set."""
        defaults = GenerationConfig._get_default_generation_params()
        del defaults["max_length"]  # `generate` has a default for the response alone
        del defaults["top_k"]  # sampling is from the whole distribution, as published
        return {
            **{name: value for name, value in defaults.items() if name in READ},
            "block_length": 32,
            "remasking": "low_confidence",
            "defer_eos": False,
            "end_think_boost": 0.0,
            "end_think_power": 3.0,
            "output_trace": False,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """What `generation_config.json` holds: the fields that are set and differ from Transformers' defaults."""
        fields = {name: value for name, value in super().to_diff_dict().items() if value is not None}
        if isinstance(self.commit_rule, CommitRule):
            fields["commit_rule"] = f"<{type(self.commit_rule).__name__}>"  # shown; saving refuses it
        return fields

    @property
    def eos_token_ids(self) -> list[int]:
        """`eos_token_id` as a list, empty if there is none."""
        if self.eos_token_id is None:
            return []
        return [self.eos_token_id] if isinstance(self.eos_token_id, int) else list(self.eos_token_id)

    @property
    def num_candidates(self) -> int:
        """Texts of a row that a pass may predict. No more of them differ than a block has positions."""
        return min(self.num_drafts or 1, self.block_length)

    @property
    def token_biases(self) -> list[tuple[int, float]]:
        """`sequence_bias` as pairs of a token id and its bias."""
        biases = self.sequence_bias or []
        pairs = biases.items() if isinstance(biases, dict) else biases
        return [(tokens[0], bias) for tokens, bias in pairs]

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None):
        """Checks every field; called on construction, on update and on saving."""
        check_standard_fields(self)
        self._check_fields()  # before the inherited check, which compares without looking at types
        # The inherited check does not know the use of 0: blanks are filled, and nothing is appended.
        max_new_tokens, self.max_new_tokens = self.max_new_tokens, self.max_new_tokens or None
        try:
            super().validate(strict=strict, user_set_attributes=user_set_attributes)
        finally:
            self.max_new_tokens = max_new_tokens
        self._check_combinations()
        if strict:
            self._check_for_saving()

    def _check_fields(self):
        """Checks each field by itself."""
        for name in ("max_length", "block_length", "max_denoising_steps", "num_return_sequences"):
            check_integer(name, getattr(self, name), minimum=1)
        for name in ("num_drafts", "cache_refresh_interval"):
            check_integer(name, getattr(self, name), minimum=1)
        check_integer("seed", self.seed, minimum=0)
        for name in ("max_new_tokens", "min_length", "min_new_tokens", "top_k", "mask_token_id", "pad_token_id"):
            check_integer(name, getattr(self, name), minimum=0)
        check_integer("bos_token_id", self.bos_token_id, minimum=0)
        for name in ("compile", "defer_eos", "do_sample", "output_trace", "return_dict_in_generate"):
            check_flag(name, getattr(self, name))
        check_flag("remove_invalid_values", self.remove_invalid_values)
        check_choice("canvas", self.canvas, CANVASES)
        check_choice("block_cache", self.block_cache, BLOCK_CACHES)
        check_choice("remasking", self.remasking, tuple(RANKINGS))
        names = rule_names()
        if not (self.commit_rule is None or isinstance(self.commit_rule, CommitRule) or self.commit_rule in names):
            raise ValueError(
                f"`commit_rule` must be a `CommitRule` object or one of {', '.join(map(repr, names))}, "
                f"got {self.commit_rule!r}."
            )
        for name in ("confidence_threshold", "typical_p", "top_h"):
            check_number(name, getattr(self, name), "in (0, 1]", lambda value: 0 < value <= 1)
        for name in ("top_p", "min_p"):
            check_number(name, getattr(self, name), "in [0, 1]", lambda value: 0 <= value <= 1)
        for name in ("epsilon_cutoff", "eta_cutoff", "frechet_margin"):
            check_number(name, getattr(self, name), "in [0, 1)", lambda value: 0 <= value < 1)
        for name in ("cache_refresh_entropy", "confidence_factor", "repetition_penalty", "max_time"):
            check_number(name, getattr(self, name), "above 0", lambda value: value > 0)
        for name in ("entropy_bound", "end_think_boost", "end_think_power", "guidance_scale", "temperature"):
            check_number(name, getattr(self, name), "of at least 0", lambda value: value >= 0)
        if not (is_integer(self.eos_token_id) and self.eos_token_id >= 0):
            check_token_ids("eos_token_id", self.eos_token_id)
        check_token_ids("suppress_tokens", self.suppress_tokens)
        check_token_ids("end_think_token_ids", self.end_think_token_ids, may_be_empty=False)
        check_bad_words("bad_words_ids", self.bad_words_ids)
        check_token_biases("sequence_bias", self.sequence_bias)
        check_strings("stop_strings", self.stop_strings)

    def _check_combinations(self):
        """Checks the fields that say something about each other."""
        if self.do_sample and self.temperature == 0:
            raise ValueError(
                f"`temperature` must be above 0 with `do_sample=True`, got {self.temperature}: "
                "`do_sample=False` takes the likeliest token."
            )
        for least, most in (("min_new_tokens", "max_new_tokens"), ("min_length", "max_length")):
            low, high = getattr(self, least), getattr(self, most)
            if low is not None and high is not None and low > high:
                raise ValueError(f"`{least}` must be at most `{most}`={high}, got {low}.")
        rules = *PARALLEL_RULES, "commit_rule"
        values = {name: getattr(self, name) for name in rules if getattr(self, name) is not None}
        if len(values) > 1:
            names = ", ".join(f"`{name}`" for name in rules)
            raise ValueError(f"At most one of {names} may be set, got {values}.")
        if (self.num_drafts or 1) > 1:
            self._check_drafts()
        if self.compile and rule_of(self).has_shadows:
            raise ValueError(
                f"`compile` must be unset with `commit_rule`={self.commit_rule!r}, whose shadow columns have no fixed "
                "shape, got True."
            )
        for name, needed in (
            ("cache_refresh_interval", "block_cache"),
            ("cache_refresh_entropy", "block_cache"),
            ("compile", "block_cache"),
            ("compile_config", "compile"),
            ("end_think_boost", "end_think_token_ids"),
        ):
            if getattr(self, name) and not getattr(self, needed):
                raise ValueError(
                    f"`{name}`={getattr(self, name)} must come with `{needed}`, got {getattr(self, needed)}."
                )
        if self.block_cache == "frozen":
            for name, value, allowed in (
                ("canvas", self.canvas == "fixed", "'growing': no block sees what follows it"),
                ("cache_refresh_interval", self.cache_refresh_interval, "absent: nothing is computed again"),
                ("cache_refresh_entropy", self.cache_refresh_entropy, "absent: nothing is computed again"),
            ):
                if value:
                    raise ValueError(
                        f"`{name}` must be {allowed} with `block_cache='frozen'`, got {getattr(self, name)!r}."
                    )
        if self.compile and self.disable_compile:
            raise ValueError("`disable_compile` must be unset with `compile=True`, got True.")
        self._check_mask_id()

    def _check_drafts(self):
        """Refuses what a guess cannot stand in for: decisions that depend on more than the text and the step."""
        rule = rule_of(self)
        for name, value, is_refused, reason in (
            ("do_sample", True, self.do_sample, "each step draws new noise"),
            ("remasking", self.remasking, self.remasking == "random", "each step draws new noise"),
            ("commit_rule", self.commit_rule, rule.has_memory, "it decides by the steps before"),
            ("commit_rule", self.commit_rule, rule.may_remask, "it may mask again what was committed"),
        ):
            if is_refused:
                raise ValueError(
                    f"`num_drafts` must be unset with `{name}`={value!r}, since {reason}, got {self.num_drafts}."
                )

    def _check_for_saving(self):
        """Refuses what a file cannot give back."""
        if isinstance(self.commit_rule, CommitRule):
            raise ValueError(
                f"`commit_rule` must be a name in a config that is saved, got a `{type(self.commit_rule).__name__}` "
                "object: pass it to `generate`."
            )
        if self.max_new_tokens == 0:
            raise ValueError(
                "`max_new_tokens` must be positive in a config that is saved, got 0: pass it to `generate`, since "
                "Transformers reads no file with it."
            )
        if isinstance(self.sequence_bias, dict):
            raise ValueError(
                "`sequence_bias` must be a list of [[token id], bias] in a config that is saved, got "
                f"{self.sequence_bias}: the keys of JSON are strings."
            )

    def _check_mask_id(self):
        if self.mask_token_id is None:
            return
        for name, values in (
            ("eos_token_id", self.eos_token_ids),
            ("pad_token_id", [self.pad_token_id]),
            ("end_think_token_ids", self.end_think_token_ids or []),
        ):
            if self.mask_token_id in values:
                raise ValueError(f"`{name}` must not contain `mask_token_id`, [MASK], got {self.mask_token_id}.")
