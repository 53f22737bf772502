"""Generation by iterative denoising: `generate` for masked diffusion language models.

`generate` prepares settings and prompts, and hands each prompt as a request to the engine (`engine.py`), which holds
the one loop. A growing canvas, a fixed one and the filling of blanks differ in the blocks of a row (`canvas.py`).
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.configuration_utils import CompileConfig
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .adapters import check_adapters
from .canvas import Canvas
from .commit_rules import rule_of
from .compiled import CompiledFrozenPredictor, CompiledPredictor
from .denoising import Denoiser, DenoisingStep
from .end_of_thinking import EndOfThinkingBoost
from .engine import Engine, Request, RequestResult
from .frozen import FrozenPredictor, segment_ends
from .frozen_cache import FrozenCache, check_cache
from .generate_batch import ContinuousBatchingMixin
from .generation_config import MaskedDiffusionGenerationConfig
from .inherited import RefusesWritingFromLeftToRight, check_pipeline
from .prediction import CachedPredictor, FullPredictor, Predictor, is_guided
from .prompts import prepare_max_new_tokens, prepare_prompts, prepare_segments
from .rankings import RANKINGS
from .revision import (
    FILLING,
    RevisionOutput,
    check_filling,
    check_revision,
    least_likely,
    leave_one_out_confidences,
)
from .shadows import CachedPredictorWithShadows, FrozenPredictorWithShadows, FullPredictorWithShadows


@dataclass
class MaskedDiffusionGenerationOutput(ModelOutput):
    """What `generate` returns with `return_dict_in_generate=True`. B counts the returned rows, S their tokens.

    Args:
        sequences (`torch.LongTensor` of shape `(B, S)`):
            Prompt and response; what follows a row's end is `pad_token_id`.
        num_forward_passes (`torch.LongTensor` of shape `(B,)`):
            Forward passes of the model in which the row took part; a guided pass counts once.
        tokens_per_forward (`torch.FloatTensor` of shape `(B,)`):
            Tokens that were generated for the row, its EOS included, per forward pass; 0 if it took part in none.
        commit_steps (`torch.LongTensor` of shape `(B, S)`, with `output_trace=True`):
            The row's forward pass, counted from 1, that committed the position; 0 for given tokens and padding. With
            `num_drafts` a pass may commit in several steps, one after the other.
        commit_confidences (`torch.FloatTensor` of shape `(B, S)`, with `output_trace=True`):
            Probability of the token when it was committed; NaN for given tokens and padding.
        cache ([`FrozenCache`], with `block_cache="frozen"`): what `generate` was given.
        segments (`list[list[int]]`, with `block_cache="frozen"`):
            Lengths of the segments that each row was written in, prompt and response: the `prompt_segments` of a
            prompt that begins with it.
    """

    sequences: torch.LongTensor | None = None
    num_forward_passes: torch.LongTensor | None = None
    tokens_per_forward: torch.FloatTensor | None = None
    commit_steps: torch.LongTensor | None = None
    commit_confidences: torch.FloatTensor | None = None
    cache: FrozenCache | None = None
    segments: list[list[int]] | None = None


class MaskedDiffusionGenerationMixin(ContinuousBatchingMixin, RefusesWritingFromLeftToRight, GenerationMixin):
    """`generate` for a model whose `forward` predicts the token of every position, masked ones included."""

    default_canvas = "growing"

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        streamer: BaseStreamer | None = None,
        on_step: Callable[[DenoisingStep], None] | None = None,
        generator: torch.Generator | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: FrozenCache | None = None,
        prompt_segments: list[int] | list[list[int]] | None = None,
        **kwargs,
    ) -> MaskedDiffusionGenerationOutput | torch.LongTensor:
        """Writes a continuation of each prompt, and fills the masks inside it, by iterative denoising.

        1. Prepare the settings and the prompts (a [MASK] in a prompt is a blank to fill), each as a request.
        2. Denoise (`engine.py`). Each row decodes its own blocks, the prompt's blanks first. In each pass:
            a. predict the masks of every row's block from its whole text (with a `block_cache`, from the block over
               cached keys and values of the rest),
            b. commit the quota of the most confident predictions, and what a parallel rule adds; the rest stays
               masked,
            c. finish the rows in which everything before the first EOS is decided; at the end of a block, ask the
               stopping criteria, stream what is settled, and open the next.
        3. Pad what follows each row's end.

        A row does not depend on the batch around it: it gets the tokens that it gets by itself, a sampled row with
        the same source of noise included.

        Args:
            inputs or input_ids (`torch.LongTensor` of shape `(B, S)`):
                Prompts, padded on the left. Tokens other than [MASK] are never changed.
            generation_config ([`MaskedDiffusionGenerationConfig`], *optional*):
                Settings. Keyword arguments win over it, and it wins over the model's own.
            logits_processor (`LogitsProcessorList`, *optional*):
                Called with one row per masked position: the text it is in, without padding, and its logits (M, V).
                Confidence is taken from what they return.
            stopping_criteria (`StoppingCriteriaList`, *optional*):
                Asked at the end of each block of a row's response, for that row only: `input_ids` are `(1, S)`.
            streamer (`BaseStreamer`, *optional*):
                For one prompt. Receives the prompt, each settled block and, if it has `put_draft`, after each step
                the block with the current predictions in place of its masks.
            on_step (`Callable`, *optional*):
                Called with a [`DenoisingStep`] for each row after each of its steps: a forward pass, or with
                `num_drafts` a guess that was right.
            generator (`torch.Generator`, *optional*):
                Source of all randomness, on the model's device. It serves one row as it is; of several rows, each has
                one of its own, whose seed is drawn from it, or from the global one if absent. `seed` sets them
                instead: row `i` has `seed + i`.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): needed for `stop_strings`.
            attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*):
                0 for padding. If absent, leading pad tokens are padding, unless pad is an EOS too.
            cache ([`FrozenCache`], *optional*):
                With `block_cache="frozen"`, keys and values of earlier texts: what a prompt begins with is not
                computed again, and the texts of this call join them. The tokens are those of an empty one.
            prompt_segments (`list[int]`, or one list for each prompt, *optional*):
                With `block_cache="frozen"`, the lengths of the segments that a prompt is cut into; what remains is
                one more, and without them the whole prompt is one. A segment sees itself and what is before it. An
                earlier output's `segments` cut a text as it was written.
            kwargs: fields of [`MaskedDiffusionGenerationConfig`], or `preset`, a name in
                `generation_config.PRESETS`, whose fields other arguments override.

        Returns:
            `torch.LongTensor` of shape `(B, S + new)`, or a [`MaskedDiffusionGenerationOutput`] with
            `return_dict_in_generate=True`.

        Raises:
            ValueError: names the argument, its value and what is allowed, before the first forward pass.
        """
        # 1. Settings and prompts
        check_adapters(self, "`generate`")
        for name, value, kind in (
            ("generation_config", generation_config, GenerationConfig),
            ("logits_processor", logits_processor, list),
            ("stopping_criteria", stopping_criteria, list),
            ("on_step", on_step, Callable),
            ("generator", generator, torch.Generator),
            ("attention_mask", attention_mask, torch.Tensor),
        ):
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"`{name}` must be a {kind.__name__}, got {value!r}.")
        config = self._prepare_settings(generation_config, kwargs)
        if (inputs is None) == (input_ids is None):
            raise ValueError("`generate` must get exactly one of `inputs` and `input_ids`.")
        input_ids = inputs if input_ids is None else input_ids
        input_ids, attention_mask = prepare_prompts(input_ids, attention_mask, config, self.config.vocab_size)
        max_new_tokens = prepare_max_new_tokens(input_ids, attention_mask, config, self.config.max_position_embeddings)
        if (input_ids == config.mask_token_id).any():
            check_pipeline()
        check_cache(cache, config.block_cache)
        num_each = config.num_return_sequences or 1
        segments = [
            ends for ends in prepare_segments(prompt_segments, attention_mask, config) for _ in range(num_each)
        ]
        input_ids, attention_mask = (
            tensor.cpu().repeat_interleave(num_each, 0) for tensor in (input_ids, attention_mask)
        )
        if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise ValueError(f"`streamer` must have the methods `put` and `end`, got {streamer!r}.")
        if streamer is not None and len(input_ids) > 1:
            raise ValueError(f"`streamer` must be given with one prompt, got a batch of {len(input_ids)}.")
        if generator is not None and config.seed is not None:
            raise ValueError(f"At most one of `generator` and `seed` may be given, got a generator and {config.seed}.")
        criteria = self._prepare_stopping_criteria(config, stopping_criteria, tokenizer)
        denoiser = self._prepare_denoiser(config, logits_processor)
        min_new_tokens = max(config.min_new_tokens or 0, (config.min_length or 0) - input_ids.shape[1])
        requests = [
            Request(
                prompt=prompt[mask],
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens,
                denoiser=denoiser,
                generator=noise,
                stopping_criteria=criteria,
                streamer=streamer,
                on_step=on_step,
                index=index,
                segments=ends,
                cache=cache,
            )
            for index, (prompt, mask, noise, ends) in enumerate(
                zip(input_ids, attention_mask, self._generators(denoiser, generator, len(input_ids)), segments)
            )
        ]

        # 2. Denoising
        engine = Engine(self._make_predictor, config.mask_token_id, max_rows=len(requests))
        try:
            for request in requests:
                engine.add(request)
            engine.run()
        finally:
            engine.close()

        # 3. Output
        output = _gather(input_ids, attention_mask, [request.result for request in requests], config)
        output = type(output)(**{name: value.to(self._execution_device) for name, value in output.items()})
        if config.block_cache == "frozen":
            output.cache = cache
            output.segments = [_segment_lengths(request) for request in requests]
        return output if config.return_dict_in_generate else output.sequences

    @torch.no_grad()
    def revise(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        *,
        fraction: float | None = None,
        threshold: float | None = None,
        protected: torch.BoolTensor | None = None,
        num_rounds: int = 1,
        num_scoring_passes: int | None = None,
        **kwargs,
    ) -> RevisionOutput:
        """Masks the tokens of a finished text that are least likely in its context, and writes them anew.

        A round asks the model how likely each token is given all others (`leave_one_out_confidences`), masks the least
        likely and fills them as `generate` fills blanks. It ends early when a round changes nothing.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, S)`): finished texts, padded on the left, without [MASK].
            attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): as in `generate`.
            fraction (`float`, *optional*): in (0, 1]; this share of a row's tokens is rewritten, rounded up.
            threshold (`float`, *optional*): in (0, 1]; or every token less likely than this.
            protected (`torch.BoolTensor` of shape `(B, S)`, *optional*):
                True for tokens that must stay. BOS, EOS, padding and [MASK] ids are always protected.
            num_rounds (`int`, defaults to 1).
            num_scoring_passes (`int`, *optional*):
                Forward passes to ask how likely the tokens are; one per token if absent, which is exact.
            kwargs:
                Fields of [`MaskedDiffusionGenerationConfig`] and arguments of `generate` for the filling. Fields about
                a response (`revision.RESPONSE_FIELDS`) are refused, here and in a `generation_config`; those of the
                model's own are not used.

        Raises:
            ValueError: names the argument, its value and what is allowed, before the first forward pass; what only the
                filling reads (`streamer`, `generator`, `tokenizer` ...) is checked when it begins.
        """
        check_adapters(self, "`revise`")
        check_revision(fraction, threshold, num_rounds, num_scoring_passes)
        check_filling(kwargs)
        settings = {**kwargs, **FILLING}
        arguments = inspect.signature(self.generate).parameters
        fields = {name: value for name, value in settings.items() if name not in arguments}
        config = self._prepare_settings(settings.get("generation_config"), fields)
        tokens, mask = (
            tensor.to(self._execution_device)
            for tensor in prepare_prompts(input_ids, attention_mask, config, self.config.vocab_size)
        )
        if (tokens == config.mask_token_id).any():
            raise ValueError("`input_ids` must be finished texts, got a [MASK]: fill it with `generate` first.")
        if (length := int(mask.sum(-1).max())) > self.config.max_position_embeddings:
            raise ValueError(
                f"`input_ids` must fit into the model's {self.config.max_position_embeddings} positions "
                f"(`max_position_embeddings`), got {length} tokens."
            )
        if protected is not None and getattr(protected, "shape", None) != tokens.shape:
            kind = tuple(protected.shape) if isinstance(protected, torch.Tensor) else type(protected).__name__
            raise ValueError(f"`protected` must be a tensor of shape {tuple(tokens.shape)}, got {kind}.")
        special_ids = [config.bos_token_id, config.pad_token_id, *config.eos_token_ids]
        special = torch.tensor([token_id for token_id in special_ids if token_id is not None], device=tokens.device)
        asked = mask & ~torch.isin(tokens, special)
        if protected is not None:
            asked &= ~protected.to(tokens.device).bool()

        original, first_confidences, rounds_run = tokens, None, 0
        while rounds_run < num_rounds:
            rounds_run += 1
            confidences = leave_one_out_confidences(
                self, tokens, mask, asked, config.mask_token_id, num_scoring_passes
            )
            first_confidences = confidences if first_confidences is None else first_confidences
            remasked = least_likely(confidences, fraction, threshold)
            if not remasked.any():
                break
            masked = tokens.masked_fill(remasked, config.mask_token_id)
            revised = self.generate(masked, attention_mask=mask, **settings).sequences
            if torch.equal(revised, tokens):
                break
            tokens = revised
        return RevisionOutput(
            sequences=tokens,
            changed=tokens != original,
            confidences=first_confidences,
            num_rounds=rounds_run,
        )

    @property
    def _execution_device(self) -> torch.device:
        """Where a forward pass runs; offloaded weights are on no device in between."""
        hook = getattr(self, "_hf_hook", None)
        device = getattr(hook, "execution_device", None) if self.device.type == "meta" else self.device
        return torch.device("cpu" if device is None else device)

    def adjust_generation_fn(self, generation_config, *args, **kwargs):
        """Called by `from_pretrained`: makes the generation config that it loads one of masked diffusion."""
        super().adjust_generation_fn(generation_config, *args, **kwargs)
        self.generation_config = MaskedDiffusionGenerationConfig.from_standard(self.generation_config)
        if self.generation_config.mask_token_id is None:
            self.generation_config.mask_token_id = self.config.mask_token_id
        if self.generation_config.do_sample is None:
            self.generation_config.do_sample = False  # or else pipelines would set their own sampling

    def _prepare_settings(
        self, generation_config: GenerationConfig | None, kwargs: dict
    ) -> MaskedDiffusionGenerationConfig:
        """The call's settings with every field that the loop reads, checked against the model."""
        config = MaskedDiffusionGenerationConfig.merged(self.generation_config, generation_config, **kwargs)
        if config.canvas is None:
            config.canvas = self.default_canvas
        if config.mask_token_id is None:
            config.mask_token_id = self.config.mask_token_id
        if config.pad_token_id is None:
            config.pad_token_id = next(iter(config.eos_token_ids), None)
        for name in ("mask_token_id", "pad_token_id"):
            if getattr(config, name) is None:
                raise ValueError(f"`{name}` must be set in the model's config or passed to `generate`, got None.")
        config.validate()
        attention = self.config._attn_implementation
        if rule_of(config).has_shadows and attention not in ("sdpa", "eager"):
            raise ValueError(
                f"`commit_rule`={config.commit_rule!r} must come with 'sdpa' or 'eager' attention, for its shadow "
                f"columns, got {attention!r}."
            )
        if config.block_cache and config.num_candidates > 1 and attention not in ("sdpa", "eager"):
            raise ValueError(
                f"`num_drafts`={config.num_drafts} with a `block_cache` must come with 'sdpa' or 'eager' attention, "
                f"whose masks tell drafts apart, got {attention!r}."
            )
        for name, ids in (
            ("mask_token_id", [config.mask_token_id]),
            ("pad_token_id", [config.pad_token_id]),
            ("eos_token_id", config.eos_token_ids),
            ("end_think_token_ids", config.end_think_token_ids or []),
            ("suppress_tokens", config.suppress_tokens or []),
            ("bad_words_ids", [token_id for word in config.bad_words_ids or () for token_id in word]),
            ("sequence_bias", [token_id for token_id, _ in config.token_biases]),
        ):
            if any(token_id >= self.config.vocab_size for token_id in ids):
                raise ValueError(f"`{name}` must be in the vocabulary of {self.config.vocab_size} tokens, got {ids}.")
        return config

    def _prepare_stopping_criteria(
        self,
        config: MaskedDiffusionGenerationConfig,
        stopping_criteria: StoppingCriteriaList | None,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> StoppingCriteriaList:
        criteria = StoppingCriteriaList(stopping_criteria or [])
        if config.max_time is not None:
            criteria.append(MaxTimeCriteria(config.max_time))
        if config.stop_strings is not None:
            if not isinstance(tokenizer, PreTrainedTokenizerBase):
                raise ValueError(
                    f"`tokenizer` must be passed with `stop_strings`={config.stop_strings!r}, got {tokenizer!r}."
                )
            strings = [config.stop_strings] if isinstance(config.stop_strings, str) else config.stop_strings
            criteria.append(_stop_string_criterion(tokenizer, len(tokenizer), tuple(strings)))
        return criteria

    def _prepare_denoiser(
        self, config: MaskedDiffusionGenerationConfig, logits_processor: LogitsProcessorList | None
    ) -> Denoiser:
        """The settings with the rule, the ranking and the processors that they ask for."""
        processors, warpers = self._prepare_logits_processors(config, logits_processor)
        boost = None
        if config.end_think_token_ids and config.end_think_boost:
            boost = EndOfThinkingBoost(config.end_think_token_ids, config.end_think_boost, config.end_think_power)
        return Denoiser(
            config=config,
            rule=rule_of(config),
            ranking=RANKINGS[config.remasking],
            processors=processors,
            warpers=warpers,
            boost=boost,
            device=self._execution_device,
            dtype=self.dtype,
        )

    def _prepare_logits_processors(
        self, config: MaskedDiffusionGenerationConfig, logits_processor: LogitsProcessorList | None
    ) -> tuple[LogitsProcessorList, LogitsProcessorList]:
        """Transformers' own processors in two lists: those before confidence is taken, and those that only sample.

        Transformers builds one list, in which the warpers of sampling come last: it is built without and with them.
        """
        config = copy.copy(config)
        # Guidance and lengths are this module's own: they must know of positions and blocks.
        config.guidance_scale = config.min_length = config.min_new_tokens = config.renormalize_logits = None
        config._eos_token_tensor = None  # or else an EOS among `bad_words_ids` would be ignored

        def build() -> LogitsProcessorList:
            return self._get_logits_processor(
                config, input_ids_seq_length=1, logits_processor=logits_processor or [], device=self._execution_device
            )

        config.do_sample, do_sample = False, config.do_sample
        processors = build()
        config.do_sample = do_sample
        return processors, LogitsProcessorList(build()[len(processors) :])

    def _generators(
        self, denoiser: Denoiser, generator: torch.Generator | None, count: int
    ) -> list[torch.Generator | None]:
        """A source of noise for each of `count` rows, so that what a row draws is not changed by the rows beside it.

        `seed` is the first row's, `seed + 1` the second's, and so on. A `generator` serves one row as it is; of
        several, each has one of its own whose seed is drawn from it, or from the global one.
        """
        if not denoiser.is_random:
            return [None] * count
        if generator is not None and count == 1:
            return [generator]
        if denoiser.config.seed is not None:
            seeds = range(denoiser.config.seed, denoiser.config.seed + count)
        else:
            device = "cpu" if generator is None else generator.device
            seeds = torch.randint(2**62, (count,), generator=generator, device=device).tolist()
        return [torch.Generator(self._execution_device).manual_seed(seed) for seed in seeds]

    def _make_predictor(self, config: MaskedDiffusionGenerationConfig, canvas: Canvas) -> Predictor:
        """The predictor that the settings ask for."""
        arguments = self, canvas, self._execution_device, 2 if is_guided(config) else 1
        if config.compile:
            kind = CompiledFrozenPredictor if config.block_cache == "frozen" else CompiledPredictor
            return kind(*arguments, config.compile_config or CompileConfig(dynamic=False))
        if rule_of(config).has_shadows:
            kinds = {None: FullPredictorWithShadows, "frozen": FrozenPredictorWithShadows}
            others = CachedPredictorWithShadows
        else:
            kinds, others = {None: FullPredictor, "frozen": FrozenPredictor}, CachedPredictor
        return kinds.get(config.block_cache, others)(*arguments)


def _segment_lengths(request: Request) -> list[int]:
    length, block_length = len(request.result.tokens), request.denoiser.config.block_length
    ends = segment_ends(request.segments, len(request.prompt), block_length, length)
    return [end - start for start, end in zip([0, *ends], ends)]


@lru_cache(maxsize=64)
def _stop_string_criterion(
    tokenizer: PreTrainedTokenizerBase, num_tokens: int, stop_strings: tuple[str, ...]
) -> StopStringCriteria:
    """Requests of one tokenizer and the same strings share it: making it goes through the whole vocabulary.

    `num_tokens` of that vocabulary: a tokenizer that has got new ones needs another.
    """
    return StopStringCriteria(tokenizer, list(stop_strings))


def _gather(
    input_ids: torch.LongTensor,
    attention_mask: torch.BoolTensor,
    results: list[RequestResult],
    config: MaskedDiffusionGenerationConfig,
) -> MaskedDiffusionGenerationOutput:
    """The texts as one batch, padded on the left as the prompts were, and on the right after each row's end."""
    padding = (~attention_mask).sum(-1).tolist()
    width = max(pad + len(result.tokens) for pad, result in zip(padding, results))

    def batch(values: list[torch.Tensor], fill) -> torch.Tensor:
        rows = torch.full((len(values), width), fill, dtype=values[0].dtype)
        for row, pad, value in zip(rows, padding, values):
            row[pad : pad + len(value)] = value
        return rows

    sequences = batch([result.tokens for result in results], config.pad_token_id)
    sequences[:, : input_ids.shape[1]][~attention_mask] = input_ids[~attention_mask]  # padding stays as it was given
    num_forward_passes = torch.tensor([result.num_forward_passes for result in results])
    num_written = torch.tensor([int((~result.given).sum()) for result in results])
    output = MaskedDiffusionGenerationOutput(
        sequences=sequences,
        num_forward_passes=num_forward_passes,
        tokens_per_forward=num_written / num_forward_passes.clamp(min=1),
    )
    if config.output_trace:
        output.commit_steps = batch([result.commit_steps for result in results], 0)
        output.commit_confidences = batch([result.commit_confidences for result in results], torch.nan)
    return output
