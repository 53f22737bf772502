"""The thread that runs the model. Everything else in the server hands it requests and listens to them."""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from transformers import ContinuousBatchingConfig

from ..continuous_batching import DEFAULT_MAX_ROWS, ContinuousBatchingManager
from ..denoising import DenoisingStep
from ..engine import Request
from ..frozen_cache import FrozenCache
from ..generation import MaskedDiffusionGenerationMixin
from ..generation_config import MaskedDiffusionGenerationConfig

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """What happened to a request since its listener was last called.

    Attributes:
        new_tokens (`list[int]`): the settled tokens that follow those reported before.
        new_confidences (`list[float | None]`): the probability of each when it was committed; None if it was given.
        num_passes (`int`): forward passes so far.
        is_finished (`bool`): whether this is the last report.
        step ([`DenoisingStep`], *optional*): the pass that was made, for a listener that asked for drafts.
        error (`Exception`, *optional*): what ended the request early.
    """

    new_tokens: list[int]
    new_confidences: list[float | None]
    num_passes: int
    is_finished: bool = False
    step: DenoisingStep | None = None
    error: Exception | None = None


class TextRequest:
    """One text to write. Its listener hears of tokens that will not change any more.

    Args:
        request: what the engine writes.
        manager: that writes it.
        first_column (`int`): the first token to report; tokens before it are not the listener's concern.

    Attributes:
        listener (`Callable[[Progress], None]`): called in the worker's thread, so it must return at once. What it
            raises ends this request, and no other.
        shows_drafts (`bool`): whether the listener hears of every pass, settled tokens or not.
        confidences (`dict[int, float]`): by column, the probability of each committed token.
        is_cancelled (`bool`): whether the listener is not called any more.
    """

    def __init__(self, request: Request, manager: ContinuousBatchingManager, first_column: int):
        self.request, self.manager = request, manager
        self.listener: Callable[[Progress], None] = lambda progress: None
        self.num_reported, self.num_passes = first_column, 0
        self.shows_drafts = self.is_cancelled = False
        self.confidences: dict[int, float] = {}
        request.on_step, request.on_done = self._on_step, self._on_done

    def cancel(self):
        """Ends the request before its next forward pass; its row is free for the next request."""
        self.is_cancelled = True
        self.manager.cancel([self.request])

    def _on_step(self, step: DenoisingStep):
        """Reports the text up to its first [MASK] or its EOS; of a rule that masks again, up to the open block."""
        denoiser, tokens = self.request.denoiser, step.tokens.tolist()
        eos_token_ids, mask_token_id = denoiser.config.eos_token_ids, denoiser.config.mask_token_id
        end, limit = self.num_reported, int(step.columns[0]) if denoiser.rule.may_remask else len(tokens)
        while end < limit and tokens[end] != mask_token_id:
            end += 1
            if end > len(self.request.prompt) and tokens[end - 1] in eos_token_ids:
                break  # what stands after the end is not part of the text
        self.num_passes = step.num_forward_passes
        committed = step.committed
        self.confidences.update(zip(step.columns[committed].tolist(), step.confidence[committed].tolist()))
        self._report(tokens[self.num_reported : end], step=step if self.shows_drafts else None)

    def _on_done(self, request: Request):
        error = request.error
        if error is None:
            try:
                return self._report(request.result.tokens[self.num_reported :].tolist(), is_finished=True)
            except Exception as raised:
                error = raised
        try:
            self._report([], is_finished=True, error=error)
        except Exception:
            logger.exception("A listener failed while it was told of an error.")

    def _report(self, new_tokens: list[int], **more):
        if not self.is_cancelled:
            start, self.num_reported = self.num_reported, self.num_reported + len(new_tokens)
            confidences = [self.confidences.get(column) for column in range(start, self.num_reported)]
            self.listener(Progress(new_tokens, confidences, self.num_passes, **more))


class Worker:
    """Writes several texts at a time by the engine, each with settings and noise of its own.

    A request joins at the next pass in which a row is free, in the order of arrival, and its tokens are those that
    `generate` gives it.

    Args:
        model: a masked diffusion model, ready to generate.
        max_rows (`int`): texts that are written at a time.
        max_tokens (`int`, *optional*): the most that rows times columns of the longest text may be.
        max_waiting (`int`): requests that may wait for a row.
        max_cached_tokens (`int`): tokens of finished texts whose keys and values are kept for later requests with
            `block_cache="frozen"`.
    """

    def __init__(
        self,
        model: MaskedDiffusionGenerationMixin,
        max_rows: int = DEFAULT_MAX_ROWS,
        max_tokens: int | None = None,
        max_waiting: int = 256,
        max_cached_tokens: int = 16384,
    ):
        self.model, self.max_rows, self.max_tokens, self.max_waiting = model, max_rows, max_tokens, max_waiting
        config = ContinuousBatchingConfig(
            max_requests_per_batch=max_rows, max_batch_tokens=max_tokens, max_queue_size=max_waiting
        )
        self.cache = FrozenCache(max_cached_tokens)
        self.manager = ContinuousBatchingManager(model, None, config)
        self.manager.start()

    @property
    def generation_config(self) -> MaskedDiffusionGenerationConfig:
        """What a request without settings is written with."""
        return self.model._prepare_settings(None, {})

    @property
    def is_alive(self) -> bool:
        return self.manager.is_running()

    def prepare(
        self,
        input_ids: list[int],
        settings: dict,
        first_column: int = 0,
        count: int = 1,
        segment: Callable[[int], list[int]] | None = None,
    ) -> list[TextRequest]:
        """Requests for `count` texts on a prompt, checked and not queued yet. May be called from any thread.

        Args:
            input_ids: the prompt; each [MASK] in it is a blank to fill.
            settings: fields of [`MaskedDiffusionGenerationConfig`], or `preset`. With a `seed`, the second text has
                the seed after it, and so on; without one, fresh noise.
            first_column: where each text begins that listeners hear of.
            segment: gives the `prompt_segments` of the prompt for a block length, if the settings ask for a frozen
                cache; without it the prompt is one segment.

        Raises:
            ValueError: names the setting, its value and what is allowed.
        """
        requests, frozen = [], self._frozen(settings, segment)
        for index in range(count):  # not `num_return_sequences`, which greedy texts cannot have
            own = settings | {"num_return_sequences": 1}
            if settings.get("seed") is not None:
                own["seed"] = settings["seed"] + index
            [request] = self.manager.prepare(input_ids, **frozen, **own)
            requests.append(TextRequest(request, self.manager, first_column))
        return requests

    def _frozen(self, settings: dict, segment: Callable[[int], list[int]] | None) -> dict:
        """With a frozen cache, the arguments by which only what is new of a prompt is computed."""
        config = self.model._prepare_settings(None, settings)
        if config.block_cache != "frozen":
            return {}
        return {"cache": self.cache, "prompt_segments": segment and segment(config.block_length)}

    def submit(self, requests: list[TextRequest]):
        """Queues all of the requests, or none.

        Raises:
            QueueFull: if they do not fit among the requests that wait.
        """
        self.manager.submit([request.request for request in requests])

    def call(self, function: Callable[[], Any]) -> Future:
        """Calls `function`, which may use the model, in the thread that runs it, between two passes.

        Raises:
            QueueFull: if too many calls are waiting.
        """
        return self.manager.call(function)

    def close(self):
        """Ends the thread before its next pass; what is left fails."""
        self.manager.stop(hard_stop=True)
        self.manager.destroy()
