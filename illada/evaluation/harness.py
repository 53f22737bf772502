"""The lm-eval model `illada`: the harness's own `HFLM`, in which scores and generation are those of masked diffusion.

Tokenisation, chat templates, loading (`dtype`, `peft`, `parallelize` ...), batching, data parallelism and caches are
inherited. Importing this module registers the model; `illada eval` does that and then runs the harness.
"""

import contextlib
import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.generation import StoppingCriteriaList, StopStringCriteria
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import GenerationOutput

from ..conversion.adapters import with_adapter
from ..conversion.reading import locate_checkpoint
from ..text.whole_models import load_whole_model
from ..tiny import EMBEDDED_MODEL
from .confidence import confidence_score, is_greedy
from .harness_arguments import Score, check_generation_arguments, check_model_arguments
from .likelihood import Sampling, monte_carlo_log_likelihood, rolling_log_likelihood
from .pairs import check_model

logger = logging.getLogger(__name__)

END_OF_THINKING = "</think>"
CHUNK_BATCHES = 4  # requests scored between two writes to the cache, in batches: several keep every batch full


@dataclass(frozen=True)
class _Generation:
    """A `generate_until` request: prompt ids, what `add_request` gets, and what is done to the text."""

    prompt: list[int]
    settings: dict
    until: list[str]
    infill: bool


def _request_seed(seed: int | None, place: tuple) -> int:
    """A seed that is a function of the run's seed, or the task's own, and of a request's place in the tasks."""
    content = repr((torch.initial_seed() if seed is None else seed, *place)).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") % 2**62


class WholeCheckpoint:
    """What `HFLM` loads a model with, in place of an Auto class."""

    from_pretrained = staticmethod(load_whole_model)


@register_model("illada")
class MaskedDiffusionLM(HFLM):
    """lm-eval's adapter to a masked diffusion model.

    Args:
        pretrained (`str` or `PreTrainedModel`, *optional*):
            As in `HFLM`; the embedded model, with a warning, if absent. Weights that a checkpoint lacks are an error.
        score (`str`, defaults to `"likelihood"`):
            What `loglikelihood` returns: the Monte-Carlo bound of [`monte_carlo_log_likelihood`], or the score of
            [`confidence_score`], with `"confidence"`. Both in nats; `loglikelihood_rolling` is always the bound.
        num_samples (`int`, defaults to 128), sampling (`str`, defaults to `"auto"`): masks drawn per pair, and how.
            The seed is that of torch, which the harness sets (`--seed`).
        append_eos (`bool`, defaults to `False`): put one EOS after every candidate.
        check_greedy (`bool`, defaults to `True`):
            Compute the harness's `is_greedy`, which costs forwards of its own. Multiple-choice accuracy does not read
            it. Without, it is always false.
        guidance_scale (`float`, defaults to 1.0): weight of the conditional logits; 1 is no guidance. Generation takes
            it from here too.
        add_bos_token (`bool`, *optional*): as in `HFLM`, and with `True` a context that the tokenizer does not begin
            with BOS gets one.
        device (`str`, *optional*): a GPU if there is one and the CPU otherwise.
        kwargs: arguments of `HFLM`, and of `from_pretrained` those in [`LOADING_ARGUMENTS`].

    Raises:
        ValueError: for an unknown argument or a value that is not allowed, before anything is loaded; for a tensor of
            the checkpoint or the adapter (`peft`) that is missing, has no place in the model or has another shape.
    """

    AUTO_MODEL_CLASS = WholeCheckpoint

    def __init__(
        self,
        pretrained: str | Path | PreTrainedModel | None = None,
        *,
        score: Score = "likelihood",
        num_samples: int = 128,
        sampling: Sampling = "auto",
        append_eos: bool = False,
        check_greedy: bool = True,
        guidance_scale: float = 1.0,
        device: str | None = None,
        **kwargs,
    ):
        own = {
            "score": score,
            "num_samples": num_samples,
            "sampling": sampling,
            "append_eos": append_eos,
            "check_greedy": check_greedy,
            "guidance_scale": guidance_scale,
            "device": device,
        }
        check_model_arguments(pretrained, own, kwargs)
        if pretrained is None:
            logger.warning("`pretrained` is not given: the embedded model is evaluated.")
        if not isinstance(pretrained, torch.nn.Module):
            pretrained = str(EMBEDDED_MODEL if pretrained is None else pretrained)
        kwargs.setdefault("backend", "causal")
        if kwargs.get("max_batch_size") is None:  # as lm-eval's command hands it on
            kwargs.pop("max_batch_size", None)
        self.score = score
        self.append_eos = append_eos
        self.check_greedy = check_greedy
        self.guidance_scale = guidance_scale
        self.num_samples, self.sampling = num_samples, sampling
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained, device=device, **kwargs)
        if hasattr(self, "accelerator"):
            # HFLM sets these for GPUs alone.
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        check_model(self.model)
        if not 2 <= self.max_length <= (limit := self.model.config.max_position_embeddings):
            raise ValueError(f"`max_length` must be in [2, {limit}], the model's positions, got {self.max_length}.")
        if self.add_bos_token and self.tokenizer.bos_token_id is None:
            raise ValueError("`add_bos_token` is True, but the tokenizer has no BOS.")

    def _create_model(self, *arguments, peft: str | None = None, revision: str | None = "main", **settings):
        """As in `HFLM`, where an adapter's tensors that are missing, or have no place in the model, go unseen."""
        super()._create_model(*arguments, revision=revision, **settings)
        if peft:
            folder = locate_checkpoint(peft, revision, allow_pickle=True, argument="peft")
            self._model = with_adapter(self._model, folder, allow_pickle=True)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As in `HFLM`: (score in nats, `is_greedy`) per (context, continuation) request."""
        for request in requests:
            context, continuation = request.args
            if continuation == "":
                raise ValueError(
                    f"Document {request.doc_id} of task {request.task_name!r} has an empty continuation after a "
                    f"context of {len(context)} characters: a score needs at least one token."
                )
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        pairs = [self._fit(*request) for request in requests]
        results: list = [None] * len(pairs)
        for indices in self._chunks([len(context) + len(candidate) for context, candidate in pairs], disable_tqdm):
            for index, result in zip(indices, self._score_pairs([pairs[index] for index in indices])):
                results[index] = result
                self.cache_hook.add_partial("loglikelihood", requests[index][0], result)
        return results

    def _fit(self, texts: tuple[str, str], context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Puts BOS where it is asked for and missing; cuts a context that does not fit on its left, as HFLM does."""
        if not continuation:
            raise ValueError(f"The continuation {texts[1]!r} has no tokens besides those of its context.")
        bos = [self.tokenizer.bos_token_id] if self.add_bos_token else []
        if context[:1] == bos:
            context = context[1:]
        room = self.max_length - len(continuation) - len(bos) - self.append_eos
        if room < 0:
            raise ValueError(
                f"A continuation of {len(continuation)} tokens does not fit into the model's {self.max_length} "
                "positions (`max_length`): continuations are never truncated."
            )
        if len(context) > room:
            logger.warning("A context of %d tokens is cut on its left to %d.", len(context), room)
            context = context[len(context) - room :]
        return bos + context, continuation

    def _score_pairs(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        settings = {"append_eos": self.append_eos, "guidance_scale": self.guidance_scale}
        batch_size = self._rows_per_forward()
        with self._autocast():
            if self.score == "confidence":
                results = confidence_score(self.model, pairs, batch_size=batch_size, **settings)
                scores = [result.score for result in results]
            else:
                results = monte_carlo_log_likelihood(
                    self.model, pairs, batch_size=batch_size, **self._sampling_settings(), **settings
                )
                scores = [result.log_likelihood for result in results]
            greedy = [False] * len(pairs)
            if self.check_greedy:
                greedy = is_greedy(self.model, pairs, batch_size=batch_size, **settings)
        return list(zip(scores, greedy))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The bound on the log-likelihood of each text, in nats, by windows of `max_length` tokens.

        See [`rolling_log_likelihood`]; the text stands after the prefix token (BOS), which is not scored.
        """
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        results: list = [None] * len(texts)
        for indices in self._chunks([len(text) for text in texts], disable_tqdm):
            with self._autocast():
                likelihoods = rolling_log_likelihood(
                    self.model,
                    [texts[index] for index in indices],
                    window_length=self.max_length,
                    prefix_token_id=self.prefix_token_id,
                    guidance_scale=self.guidance_scale,
                    batch_size=self._rows_per_forward(),
                    **self._sampling_settings(),
                )
            for index, likelihood in zip(indices, likelihoods):
                results[index] = likelihood.log_likelihood
                self.cache_hook.add_partial("loglikelihood_rolling", requests[index].args, results[index])
        return results

    def _sampling_settings(self) -> dict:
        """A new generator of the run's seed for every call: a pair's noise then depends on nothing else."""
        generator = torch.Generator().manual_seed(torch.initial_seed())
        return {"num_samples": self.num_samples, "sampling": self.sampling, "generator": generator}

    def _chunks(self, lengths: list[int], disable_tqdm: bool) -> Iterator[list[int]]:
        """Indices of requests, longest first, some batches at a time, so that results can be cached on the way."""
        if self.batch_size == "auto" and lengths:
            self.batch_sizes = {0: self._detect_batch_size([(None, [], [0] * (max(lengths) + 1))])}
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        with tqdm(total=len(order), desc="Scoring requests", disable=disable_tqdm or self.rank != 0) as progress:
            for first in range(0, len(order), size := CHUNK_BATCHES * self._rows_per_forward()):
                yield order[first : first + size]
                progress.update(len(order[first : first + size]))

    def _rows_per_forward(self) -> int:
        return self.batch_sizes.get(0, 1) if self.batch_size == "auto" else self.batch_size

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As in `HFLM`. `gen_kwargs` are fields of [`MaskedDiffusionGenerationConfig`], and:

        - `infill=True`: the result is the whole context with its [MASK] tokens filled, and what was appended to it.
          With `max_gen_toks=0` nothing is appended.
        - `end_think_boost` without `end_think_token_ids`: those of "</think>".

        All requests go through one engine of `batch_size` rows, the longest contexts first.

        Raises:
            ValueError: for arguments of any request, before the first pass.
            Exception: what made a request fail.
        """
        prepared = self._prepare_requests(requests)
        rows = self._detect_batch_size() if self.batch_size == "auto" else self.batch_size
        manager = self.model.init_continuous_batching(
            continuous_batching_config=ContinuousBatchingConfig(max_requests_per_batch=rows)
        )
        for index in sorted(range(len(prepared)), key=lambda index: -len(prepared[index].prompt)):
            manager.add_request(prepared[index].prompt, str(index), **prepared[index].settings)
        texts: list = [None] * len(requests)
        progress = tqdm(total=len(requests), desc="Generating", disable=disable_tqdm or self.rank != 0)

        def take_results():
            while (output := manager.get_result()) is not None:
                request, index = requests[int(output.request_id)], int(output.request_id)
                if output.exception is not None:
                    logger.error("Document %s of task %r failed.", request.doc_id, request.task_name)
                    raise output.exception
                texts[index] = self._response(output, prepared[index])
                self.cache_hook.add_partial("generate_until", request.args, texts[index])
                progress.update()

        try:
            with progress, self._autocast():
                manager.run(take_results)
                take_results()
        finally:
            manager.destroy()
        return texts

    def _prepare_requests(self, requests: list[Instance]) -> list["_Generation"]:
        """What `generate` needs to know of each request."""
        eos = self.tok_decode(self.eot_token_id, False)
        checked: list[tuple[str, dict]] = []
        places: Counter = Counter()
        criteria: dict[tuple, StoppingCriteriaList] = {}  # to make one reads the whole vocabulary
        prepared = []
        for request in requests:
            task, (context, gen_kwargs) = request.task_name, request.args
            settings = self._generation_settings(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
            if (task, gen_kwargs) not in checked[-1:]:
                check_generation_arguments(self.model.generation_config, task, gen_kwargs, settings, self.max_length)
                checked.append((task, gen_kwargs))
            until, infill = settings.pop("until"), settings.pop("infill", False)
            settings["max_new_tokens"] = settings.pop("max_gen_toks")
            prompt, _ = self.tok_batch_encode(
                [context], left_truncate_len=self.max_length - settings["max_new_tokens"], truncation=self.truncation
            )
            stops = tuple(text for text in until if text != eos)
            if stops not in criteria:
                criteria[stops] = StoppingCriteriaList([StopStringCriteria(self.tokenizer, stops)] if stops else [])
            place = (task, request.doc_id, request.idx)
            settings |= {
                "seed": _request_seed(settings.get("seed"), (*place, places[place])),
                "pad_token_id": self.tokenizer.pad_token_id,
                "stopping_criteria": criteria[stops],
            }
            places[place] += 1
            prepared.append(_Generation(prompt[0].tolist(), settings, [*stops, eos], infill))
        return prepared

    def _generation_settings(self, gen_kwargs: dict) -> dict:
        """Arguments of `generate` for those of the harness."""
        settings = {"guidance_scale": self.guidance_scale, **gen_kwargs}
        if not settings.get("do_sample"):
            settings.pop("temperature", None)  # the harness sends 0.0 for greedy decoding
        if settings.get("end_think_boost") and "end_think_token_ids" not in settings:
            settings["end_think_token_ids"] = self.tok_encode(END_OF_THINKING, add_special_tokens=False)
        return settings

    def _response(self, output: GenerationOutput, generation: "_Generation") -> str:
        """The text as the harness wants it: without what led to it (`think_end_token`), and up to a stop string."""
        tokens = (output.prompt_ids if generation.infill else []) + output.generated_tokens
        end = self.think_end_token
        if not isinstance(end, int):
            return postprocess_generated_text(self.tok_decode(tokens), generation.until, end)
        if end in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(end) :]
        return postprocess_generated_text(self.tok_decode(tokens).lstrip(), generation.until, None)

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(
            device_type=self.device.type,
            dtype=self.mixed_precision_dtype,
            enabled=self.mixed_precision_dtype is not None,
        )
