"""Generation by iterative denoising: `generate` for masked diffusion language models.

There is one loop. A *canvas* holds prompt and masks (`canvas.py`); a *schedule* says which masks are decoded together,
block after block; a *denoising step* predicts the masks of the block and commits some (`denoising.py`,
`remasking.py`). A growing canvas, a fixed one and the filling of blanks are schedules over the same loop.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .canvas import Block, Canvas
from .denoising import Denoiser, DenoisingStep, PositionProcessor
from .end_of_thinking import EndOfThinkingBoost
from .generation_config import MaskedDiffusionGenerationConfig
from .remasking import commit_quotas

DEFAULT_MAX_NEW_TOKENS = 256


@dataclass
class MaskedDiffusionGenerationOutput(ModelOutput):
    """What `generate` returns with `return_dict_in_generate=True`. B counts the returned rows, S their tokens.

    Args:
        sequences (`torch.LongTensor` of shape `(B, S)`):
            Prompt and response; what follows a row's end is `pad_token_id`.
        num_forward_passes (`torch.LongTensor` of shape `(B,)`):
            Forward passes of the model in which the row took part; a guided pass counts once.
        tokens_per_forward (`torch.FloatTensor` of shape `(B,)`):
            Tokens that were generated for the row, its EOS included, per forward pass.
        commit_steps (`torch.LongTensor` of shape `(B, S)`, with `output_trace=True`):
            The row's forward pass, counted from 1, that committed the position; 0 for given tokens and padding.
        commit_confidences (`torch.FloatTensor` of shape `(B, S)`, with `output_trace=True`):
            Probability of the token when it was committed; NaN for given tokens and padding.
    """

    sequences: torch.LongTensor | None = None
    num_forward_passes: torch.LongTensor | None = None
    tokens_per_forward: torch.FloatTensor | None = None
    commit_steps: torch.LongTensor | None = None
    commit_confidences: torch.FloatTensor | None = None


class MaskedDiffusionGenerationMixin(GenerationMixin):
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
        **kwargs,
    ) -> MaskedDiffusionGenerationOutput | torch.LongTensor:
        """Writes a continuation of each prompt, and fills the masks inside it, by iterative denoising.

        1. Prepare the settings, the prompts (a [MASK] in a prompt is a blank to fill) and the canvas.
        2. For each block of the schedule, until every row is finished:
            a. while a live row has masks in the block, predict them from the whole canvas,
            b. commit the quota of the surest predictions, and what a parallel rule adds; the rest stays masked,
            c. finish the rows in which everything before the first EOS is decided,
            d. at the end of the block, ask the stopping criteria and stream what is settled.
        3. Pad what follows each row's end.

        A greedy row does not depend on the batch around it: it gives the tokens that it gives alone.

        Args:
            inputs or input_ids (`torch.LongTensor` of shape `(B, S)`):
                Prompts, padded on the left. Tokens other than [MASK] are never changed.
            generation_config ([`MaskedDiffusionGenerationConfig`], *optional*):
                Settings. Keyword arguments win over it, and it wins over the model's own.
            logits_processor (`LogitsProcessorList`, *optional*):
                Called with one row per masked position: the canvas of its text, in which padding reads as [MASK], and
                its logits (M, V). Confidence is taken from what they return.
            stopping_criteria (`StoppingCriteriaList`, *optional*): asked at the end of each block.
            streamer (`BaseStreamer`, *optional*):
                For one prompt. Receives the prompt, each settled block and, if it has `put_draft`, after each step
                the block with the current predictions in place of its masks.
            on_step (`Callable`, *optional*): called with a [`DenoisingStep`] after each forward pass.
            generator (`torch.Generator`, *optional*):
                Source of all randomness; the global one if absent. Noise is drawn for masked positions alone.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): needed for `stop_strings`.
            attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*):
                0 for padding. If absent, leading pad tokens are padding, unless pad is an EOS too.
            kwargs: fields of [`MaskedDiffusionGenerationConfig`].

        Returns:
            `torch.LongTensor` of shape `(B, S + new)`, or a [`MaskedDiffusionGenerationOutput`] with
            `return_dict_in_generate=True`.

        Raises:
            ValueError: names the argument, its value and what is allowed, before the first forward pass.
        """
        # 1. Settings, prompts, canvas
        config = self._prepare_settings(generation_config, kwargs)
        input_ids, attention_mask = self._prepare_prompts(inputs, input_ids, attention_mask, config)
        max_new_tokens = self._prepare_max_new_tokens(input_ids, attention_mask, config)
        if streamer is not None and len(input_ids) > 1:
            raise ValueError(f"`streamer` must be given with one prompt, got a batch of {len(input_ids)}.")
        stopping_criteria = self._prepare_stopping_criteria(config, stopping_criteria, tokenizer)
        processors, warpers = self._prepare_logits_processors(config, logits_processor)
        position_processors = self._prepare_position_processors(config, input_ids.shape[1], max_new_tokens)
        eos_token_ids = torch.tensor(config.eos_token_ids, dtype=torch.long, device=input_ids.device)
        canvas = Canvas(input_ids, attention_mask, config.mask_token_id)
        denoise = Denoiser(self, canvas, config, processors, warpers, position_processors, generator)
        settled_text = _SettledText(streamer, canvas)

        # 2. Blocks
        for block in _schedule(canvas, config, max_new_tokens):
            settled_text.stream()
            quotas = commit_quotas(block.active.sum(-1), config.max_denoising_steps or config.block_length)
            for quota in quotas.unbind(-1):
                rows = canvas.undecided_rows(block)
                if len(rows) == 0:
                    break
                step = denoise(block, rows, quota[rows])
                settled_text.stream_draft(step)
                if on_step is not None:
                    on_step(step)
                canvas.finish_at_eos(eos_token_ids)
            _finish_at_stop(canvas, block, stopping_criteria)
            if not canvas.live.any():
                break

        # 3. Output
        canvas.finish(canvas.live, torch.full_like(canvas.ends, canvas.length))
        settled_text.stream()
        settled_text.end()
        output = _output(canvas, config)
        return output if config.return_dict_in_generate else output.sequences

    def adjust_generation_fn(self, generation_config, *args, **kwargs):
        """Called by `from_pretrained`: makes the generation config that it loads one of masked diffusion."""
        super().adjust_generation_fn(generation_config, *args, **kwargs)
        self.generation_config = self._as_masked_diffusion_config(self.generation_config)
        if self.generation_config.mask_token_id is None:
            self.generation_config.mask_token_id = self.config.mask_token_id

    def _as_masked_diffusion_config(self, config: GenerationConfig | None) -> MaskedDiffusionGenerationConfig:
        if isinstance(config, MaskedDiffusionGenerationConfig):
            return config
        return MaskedDiffusionGenerationConfig.from_dict({} if config is None else config.to_dict())

    def _prepare_settings(
        self, generation_config: GenerationConfig | None, kwargs: dict
    ) -> MaskedDiffusionGenerationConfig:
        """Merges keyword arguments, the given config, the model's own and the defaults; the earlier wins."""
        base = self._as_masked_diffusion_config(generation_config)
        config, _ = self._prepare_generation_config(base)
        unknown = config.update(**kwargs)
        unknown = {name: value for name, value in unknown.items() if value is not None and value is not False}
        if unknown:
            raise ValueError(
                f"`generate` got unknown arguments {sorted(unknown)}: it takes the fields of "
                "`MaskedDiffusionGenerationConfig` and the arguments of its docstring."
            )
        lengths = {name: kwargs.get(name, getattr(base, name)) for name in ("max_length", "max_new_tokens")}
        if lengths["max_length"] is not None and lengths["max_new_tokens"] is None:
            config.max_new_tokens = None  # the caller's limit wins over the checkpoint's
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
        return config

    def _prepare_prompts(
        self,
        inputs: torch.LongTensor | None,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
        config: MaskedDiffusionGenerationConfig,
    ) -> tuple[torch.LongTensor, torch.BoolTensor]:
        """Checks the prompts and returns them with their boolean mask, repeated `num_return_sequences` times."""
        if (inputs is None) == (input_ids is None):
            raise ValueError("`generate` must get exactly one of `inputs` and `input_ids`.")
        input_ids = inputs if input_ids is None else input_ids
        if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
            kind = getattr(input_ids, "dtype", type(input_ids).__name__)
            raise ValueError(f"`input_ids` must be a tensor of dtype int64 or int32, got {kind}.")
        if input_ids.ndim != 2 or input_ids.numel() == 0:
            raise ValueError(f"`input_ids` must be (batch, tokens) and not empty, got {tuple(input_ids.shape)}.")
        if input_ids.min() < 0 or input_ids.max() >= self.config.vocab_size:
            raise ValueError(
                f"`input_ids` must be in [0, {self.config.vocab_size}), got {int(input_ids.min())} "
                f"to {int(input_ids.max())}."
            )
        if attention_mask is None:
            is_token = input_ids != config.pad_token_id
            infers_padding = config.pad_token_id not in config.eos_token_ids
            attention_mask = is_token.cumsum(-1) > 0 if infers_padding else torch.ones_like(is_token)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` must have the shape of `input_ids`, {tuple(input_ids.shape)}, "
                f"got {tuple(attention_mask.shape)}."
            )
        attention_mask = attention_mask.bool()
        if not attention_mask.any(-1).all():
            raise ValueError("`input_ids` must hold at least one token in each row, got a row of padding.")
        if (attention_mask[:, :-1] & ~attention_mask[:, 1:]).any():
            raise ValueError(
                "`attention_mask` must have its zeros on the left, got padding after a token: "
                "set `tokenizer.padding_side = 'left'`."
            )
        repeats = config.num_return_sequences or 1
        return tuple(
            tensor.to(self.device).repeat_interleave(repeats, 0) for tensor in (input_ids.long(), attention_mask)
        )

    def _prepare_max_new_tokens(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.BoolTensor,
        config: MaskedDiffusionGenerationConfig,
    ) -> int:
        """The response's budget in tokens, from `max_new_tokens`, else from `max_length`, else the default."""
        prompt_length = int(attention_mask.sum(-1).max())
        room = self.config.max_position_embeddings - prompt_length
        if config.max_new_tokens is not None:
            max_new_tokens, source = config.max_new_tokens, f"`max_new_tokens`={config.max_new_tokens}"
        elif config.max_length is not None:
            max_new_tokens = config.max_length - input_ids.shape[1]
            source = f"`max_length`={config.max_length}"
            if max_new_tokens < 0:
                raise ValueError(f"{source} must be at least the length of the prompt, {input_ids.shape[1]} tokens.")
        else:
            max_new_tokens, source = min(DEFAULT_MAX_NEW_TOKENS, max(room, 1)), "one more token"
        if max_new_tokens > room:
            raise ValueError(
                f"The prompt of {prompt_length} tokens and {source} do not fit into the model's "
                f"{self.config.max_position_embeddings} positions (`max_position_embeddings`)."
            )
        if max_new_tokens == 0 and not (input_ids == config.mask_token_id).any():
            raise ValueError(f"{source} must be positive: the prompt has no [MASK] to fill, and nothing is appended.")
        return max_new_tokens

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
            if tokenizer is None:
                raise ValueError(f"`tokenizer` must be passed with `stop_strings`={config.stop_strings!r}, got None.")
            criteria.append(StopStringCriteria(tokenizer, config.stop_strings))
        return criteria

    def _prepare_logits_processors(
        self, config: MaskedDiffusionGenerationConfig, logits_processor: LogitsProcessorList | None
    ) -> tuple[LogitsProcessorList, LogitsProcessorList]:
        """Transformers' own processors in two lists: those before confidence is taken, and those of sampling alone."""
        config = copy.copy(config)
        # Guidance and lengths are this module's own: they must know of positions and blocks.
        config.guidance_scale = config.min_length = config.min_new_tokens = config.renormalize_logits = None

        def build() -> LogitsProcessorList:
            return self._get_logits_processor(
                config, input_ids_seq_length=1, logits_processor=logits_processor or [], device=self.device
            )

        config.do_sample, do_sample = False, config.do_sample
        processors = build()
        config.do_sample = do_sample
        return processors, LogitsProcessorList(build()[len(processors) :])

    def _prepare_position_processors(
        self, config: MaskedDiffusionGenerationConfig, prompt_length: int, max_new_tokens: int
    ) -> list[PositionProcessor]:
        processors: list[PositionProcessor] = []
        first_eos = max(prompt_length + (config.min_new_tokens or 0), config.min_length or 0)
        if first_eos > prompt_length and config.eos_token_ids:

            def suppress_early_eos(tokens, rows, columns, logits):
                is_early = (columns < first_eos).unsqueeze(-1)
                is_eos = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
                is_eos[config.eos_token_ids] = True
                return logits.masked_fill(is_early & is_eos, -torch.inf)

            processors.append(suppress_early_eos)
        if config.end_think_token_ids and config.end_think_boost and max_new_tokens > 0:
            processors.append(
                EndOfThinkingBoost(
                    config.end_think_token_ids,
                    config.end_think_boost,
                    config.end_think_power,
                    prompt_length,
                    max_new_tokens,
                )
            )
        return processors


def _schedule(canvas: Canvas, config: MaskedDiffusionGenerationConfig, max_new_tokens: int) -> Iterator[Block]:
    """Yields the blocks in the order of decoding, and lets the canvas grow as its kind says."""
    end = canvas.prompt_length + max_new_tokens
    if config.canvas == "fixed":
        canvas.append_masks(max_new_tokens)
    yield from canvas.blanks(config.block_length)
    for start in range(canvas.prompt_length, end, config.block_length):
        block_end = min(start + config.block_length, end)
        if config.canvas == "growing":
            canvas.append_masks(block_end - start)
        yield canvas.block(start, block_end)


def _finish_at_stop(canvas: Canvas, block: Block, stopping_criteria: StoppingCriteriaList):
    """Finishes the rows that a criterion stops; a stop string ends a row right where it is complete."""
    for criterion in stopping_criteria:
        first = (
            max(block.start + 1, canvas.prompt_length + 1) if isinstance(criterion, StopStringCriteria) else block.end
        )
        for end in range(first, block.end + 1):
            stopped = criterion(canvas.tokens[:, :end], None)
            canvas.finish(stopped, torch.full_like(canvas.ends, end))


def _output(canvas: Canvas, config: MaskedDiffusionGenerationConfig) -> MaskedDiffusionGenerationOutput:
    """Pads what follows each row's end, and drops the columns that no row needs."""
    columns = torch.arange(canvas.length, device=canvas.tokens.device)
    is_written = canvas.attention_mask & (columns < canvas.ends.unsqueeze(-1))
    is_kept = is_written | (columns < canvas.prompt_length)
    width = int(canvas.ends.max())
    output = MaskedDiffusionGenerationOutput(
        sequences=torch.where(is_kept, canvas.tokens, config.pad_token_id)[:, :width],
        num_forward_passes=canvas.num_forward_passes,
        tokens_per_forward=(is_written & ~canvas.given).sum(-1) / canvas.num_forward_passes,
    )
    if config.output_trace:
        output.commit_steps = canvas.commit_steps.masked_fill(~is_written, 0)[:, :width]
        output.commit_confidences = canvas.commit_confidences.masked_fill(~is_written, torch.nan)[:, :width]
    return output


class _SettledText:
    """Hands a streamer the prompt and then each piece of text that will not change any more."""

    def __init__(self, streamer: BaseStreamer | None, canvas: Canvas):
        self.streamer, self.canvas = streamer, canvas
        self.streamed = 0

    def stream(self):
        if self.streamer is None:
            return
        settled = self.canvas.settled_length(0)
        if self.streamed == 0 and settled >= self.canvas.prompt_length:
            self.streamer.put(self.canvas.tokens[:, : self.canvas.prompt_length].cpu())
            self.streamed = self.canvas.prompt_length
        if self.streamed and settled > self.streamed:
            self.streamer.put(self.canvas.tokens[0, self.streamed : settled].cpu())
            self.streamed = settled

    def stream_draft(self, step: DenoisingStep):
        if hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(step.proposals[0].cpu())

    def end(self):
        if self.streamer is not None:
            self.streamer.end()
