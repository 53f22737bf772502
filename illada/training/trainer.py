"""The standard Trainer, with the noise of masked diffusion added to every clean batch."""

import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import Trainer

from ..adapters import check_adapters
from ..text.prompts import encode_prompt
from .arguments import check_arguments
from .corruption import Purpose, corrupt, random_stream, sample_mask_probabilities
from .segments import isolate_segments, split_segments

EVALUATION_SEED = 0
"""Seed of the noise of every evaluation, whatever the run's own seed is: two evaluations can be compared."""

EVALUATION_STRATA = 64
"""Rows over which an evaluation's mask probabilities are stratified, independent of its batch size."""


@dataclass(frozen=True)
class Objective:
    """What is random in training, and how the loss is normalised; the defaults are iLLaDA's (arXiv 2606.25331).

    Args:
        split_probability: share of the rows that are cut at a random point into two segments.
        keep_prompt_probability: share of the rows that keep the prompt with which they begin: it stays visible and is
            not learnt; 1 for LLaDA's SFT. Later prompts of a window are masked like answers: if they stood behind an
            answer, they would give its length away, and no canvas of `generate` has them.
        eps: least mask probability; p = (1 - eps) t + eps.
        stratified: whether the t of one optimiser step are spread evenly over (0, 1], which lowers the variance.
        per_response: whether each row's loss is divided by its own number of learnt tokens, as in LLaDA's SFT, and
            the batch's by its rows; otherwise the sum over all tokens is divided by their number.
    """

    split_probability: float = 0.3
    keep_prompt_probability: float = 0.0
    eps: float = 1e-3
    stratified: bool = True
    per_response: bool = False

    def __post_init__(self):
        for name in ("split_probability", "keep_prompt_probability", "eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be a number in [0, 1], got {value!r}.")
        for name in ("stratified", "per_response"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be true or false, got {getattr(self, name)!r}.")

    def add_noise(
        self, batch: dict[str, torch.Tensor], mask_token_id: int, seed: int, rows: Sequence[int], strata: int = 1
    ) -> dict[str, torch.Tensor]:
        """Corrupts a clean batch; the same arguments give the same noise, anywhere.

        Args:
            batch: `input_ids`, `labels`, `position_ids` and `is_prompt` (B, S), from [`MaskedDiffusionCollator`].
                Without `position_ids`, each row is one segment; without `is_prompt`, no row begins with a prompt.
            mask_token_id: id of [MASK].
            seed: of all noise of the run.
            rows: number of each sequence in the run.
            strata: rows over which t is spread evenly (see [`sample_mask_probabilities`]).

        Returns:
            `input_ids`, `labels`, `loss_weights` and `position_ids` (B, S).

        Raises:
            ValueError: if the batch lacks what the noise needs, or has what the noise would not heed.
        """
        batch = self._checked(batch)
        kept = [random_stream(seed, Purpose.KEEP_PROMPT, row).random() < self.keep_prompt_probability for row in rows]
        first_prompts = batch["is_prompt"].cumprod(1).bool()
        hidden = first_prompts & torch.tensor(kept, device=first_prompts.device).unsqueeze(1)
        maskable = (batch["labels"] != -100) & ~hidden
        probabilities = sample_mask_probabilities(seed, rows, strata if self.stratified else 1, self.eps)
        corruption = corrupt(batch["input_ids"], maskable, probabilities, mask_token_id, seed, rows)
        if self.per_response:
            corruption.loss_weights /= maskable.sum(1, keepdim=True).clamp(min=1)
        position_ids = split_segments(batch["position_ids"], self.split_probability, seed, rows)
        return {**vars(corruption), "position_ids": position_ids}

    def _checked(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch with its optional parts."""
        missing = [name for name in ("input_ids", "labels") if name not in batch]
        missing += ["is_prompt"] if self.keep_prompt_probability > 0 and "is_prompt" not in batch else []
        unknown = [name for name in batch if name not in ("input_ids", "labels", "position_ids", "is_prompt")]
        if missing or unknown:
            lacks_or_has = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown)}"
            raise ValueError(
                "A batch must have `input_ids`, `labels`, `position_ids` and `is_prompt`, as from "
                f"`MaskedDiffusionCollator`; this one {lacks_or_has}."
            )
        input_ids = batch["input_ids"]
        columns = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        return {"position_ids": columns, "is_prompt": torch.zeros_like(input_ids, dtype=torch.bool), **batch}


class MaskedDiffusionTrainer(Trainer):
    """A `transformers.Trainer` for masked diffusion; takes [`MaskedDiffusionCollator`]'s batches.

    Noise is added in the main process, as a function of the run's seed and of the number of each sequence in the run:
    loader workers, processes, accumulation and an interruption do not change it. `num_items_in_batch` counts the
    positions that may be masked (or the rows, with `objective.per_response`) in all micro-batches of all processes, so
    that they give the gradient of one big batch. Logits are made for the masked positions only.

    `compute_metrics` and `predict` get `predictions` (B, S, V) and `label_ids` (B, S): the logits of the masked
    positions with their clean tokens, and elsewhere zeros with the label -100. `preprocess_logits_for_metrics` can
    reduce them; `include_for_metrics: [inputs]` gives the corrupted tokens that the model read.

    Args:
        objective: what is random, and the loss's normalisation.
        sample_prompts: texts that the model continues at every evaluation, by its generation config; the results are
            logged as `eval_sample_0` and so on, as text in TensorBoard. Written by the chat template, if there is one.
        arguments, keywords: of the `Trainer`. `remove_unused_columns` is set to false, as it must be.

    Raises:
        ValueError: if an argument would replace or change the loss (see [`check_arguments`]).
        ValueError: if the model has an adapter that acts on prompts (see [`check_adapters`]).
    """

    def __init__(self, *arguments, objective: Objective | None = None, sample_prompts: Sequence[str] = (), **keywords):
        super().__init__(*arguments, **keywords)
        check_arguments(self.args, self.compute_loss_func)
        check_adapters(self.model, "`MaskedDiffusionTrainer`")
        self.args.remove_unused_columns = False  # the collator reads `is_prompt`, which the model does not know
        self.objective = objective or Objective()
        self.sample_prompts = sample_prompts
        self._evaluated_batches = itertools.count()

    # Noise

    def _rows(self, batch_number: int, batch: dict[str, torch.Tensor], batch_size: int) -> range:
        """Number in the run of each row of this process's batch; Accelerate deals the batches out in turn."""
        first = (batch_number * self.args.world_size + self.args.process_index) * batch_size
        return range(first, first + len(batch["input_ids"]))

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """Adds the noise before the Trainer counts the labels."""
        rows_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        first_batch = self.state.global_step * self.args.gradient_accumulation_steps
        corrupted = (
            self.objective.add_noise(
                batch,
                self.model.config.mask_token_id,
                self.args.seed,
                self._rows(number, batch, self.args.train_batch_size),
                rows_per_step,
            )
            for number, batch in enumerate(epoch_iterator, start=first_batch)
        )
        return super().get_batch_samples(corrupted, num_batches, device)

    def evaluation_loop(self, *arguments, **keywords):
        self._evaluated_batches = itertools.count()
        return super().evaluation_loop(*arguments, **keywords)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        rows = self._rows(next(self._evaluated_batches), inputs, self.args.eval_batch_size)
        mask_token_id = self.model.config.mask_token_id
        noisy = self.objective.add_noise(inputs, mask_token_id, EVALUATION_SEED, rows, EVALUATION_STRATA)
        inputs.update(noisy)  # the caller's, too: `include_for_metrics` shows what the model read
        loss, logits, labels = super().prediction_step(model, noisy, prediction_loss_only, ignore_keys)
        if logits is None:
            return loss, logits, labels
        logits = logits[0] if isinstance(logits, tuple) else logits
        masked = noisy["loss_weights"].to(logits.device) != 0
        aligned = logits.new_zeros(*masked.shape, logits.shape[-1])
        aligned[masked] = logits  # (M, V), a row for each masked position
        return loss, aligned, labels.masked_fill(~masked, -100)

    # Loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device):
        if self.objective.per_response:  # one item per row
            batch_samples = [{"labels": batch["labels"].amax(1)} for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(self, model, inputs, *arguments, **keywords):
        inputs = isolate_segments(inputs, self.model.config._attn_implementation)
        return super().compute_loss(model, inputs, *arguments, **keywords)

    def save_model(self, *arguments, **keywords):
        with warnings.catch_warnings():  # peft asks the Hub for the base model `illada-tiny`, which is not there
            warnings.filterwarnings("ignore", "Could not find a config file in", UserWarning)
            super().save_model(*arguments, **keywords)

    # Samples

    def evaluate(self, *arguments, **keywords) -> dict[str, float]:
        metrics = super().evaluate(*arguments, **keywords)
        if self.sample_prompts:
            self.log({f"eval_sample_{index}": text for index, text in enumerate(self._samples())})
        return metrics

    def _samples(self) -> list[str]:
        """The continuation of each of `sample_prompts`."""
        tokenizer = self.processing_class
        prompts = [encode_prompt(tokenizer, prompt) for prompt in self.sample_prompts]
        outputs = self.model.generate_batch(prompts, seed=self.args.seed)
        for output in outputs.values():
            if output.exception is not None:
                raise output.exception
        return [tokenizer.decode(output.generated_tokens, skip_special_tokens=True) for output in outputs.values()]
