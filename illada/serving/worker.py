"""The thread that runs the model. Everything else in the server queues requests here and listens to them."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..denoising import DenoisingStep
from ..generation import MaskedDiffusionGenerationMixin
from ..generation_config import MaskedDiffusionGenerationConfig
from ..text.checks import check_call

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """What happened to a request since its listener was last called.

    Attributes:
        new_tokens (`list[int]`): the settled tokens that follow those reported before.
        num_passes (`int`): forward passes so far.
        is_finished (`bool`): whether this is the last report.
        error (`Exception`, *optional*): what ended the request early.
    """

    new_tokens: list[int]
    num_passes: int
    is_finished: bool = False
    error: Exception | None = None


@dataclass(eq=False)
class TextRequest:
    """One text to write.

    Args:
        input_ids (`list[int]`): the prompt; each [MASK] in it is a blank to fill.
        settings (`dict`): fields of [`MaskedDiffusionGenerationConfig`], or `preset`.
        first_column (`int`): the first token to report; tokens before it are not the listener's concern.
        seed (`int`, *optional*): seed of this request's noise; a fresh one is drawn if absent.
        listener (`Callable[[Progress], None]`): called in the worker's thread, so it must return at once.
    """

    input_ids: list[int]
    settings: dict
    first_column: int
    seed: int | None = None
    listener: Callable[[Progress], None] = lambda progress: None
    is_cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self):
        """Ends the request before its next forward pass; its listener is not called again."""
        self.is_cancelled.set()


class QueueFull(Exception):
    """More requests are waiting than the worker allows."""


class _Cancelled(Exception):
    """Ends a call of `generate` whose answer nobody waits for."""


class Worker:
    """Answers requests in the order of their arrival, each by a call of `generate` with a generator of its own.

    Args:
        model: a masked diffusion model, ready to generate.
        max_waiting (`int`): requests that may wait for their turn.
    """

    def __init__(self, model: MaskedDiffusionGenerationMixin, max_waiting: int = 256):
        self.model, self.max_waiting = model, max_waiting
        self._waiting: deque[TextRequest] = deque()
        self._running: TextRequest | None = None
        self._changed, self._is_closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="illada-worker", daemon=True)
        self._thread.start()

    @property
    def generation_config(self) -> MaskedDiffusionGenerationConfig:
        """What a request without settings is written with."""
        return self.model._prepare_settings(None, {})

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def check(self, request: TextRequest):
        """Refuses what `generate` would refuse, without a forward pass. May be called from any thread.

        Raises:
            ValueError: names the setting, its value and what is allowed.
        """
        check_call(self.model, request.input_ids, request.settings)

    def submit(self, requests: list[TextRequest]):
        """Queues all of the requests, or none.

        Raises:
            QueueFull: if they do not fit among the requests that wait.
        """
        with self._changed:
            self._waiting = deque(request for request in self._waiting if not request.is_cancelled.is_set())
            if self._is_closing or len(self._waiting) + len(requests) > self.max_waiting:
                raise QueueFull
            self._waiting.extend(requests)
            self._changed.notify()

    def close(self):
        """Cancels what is left, and ends the thread."""
        with self._changed:
            self._is_closing = True
            for request in (*self._waiting, self._running):
                if request is not None:
                    request.cancel()
            self._changed.notify()
        self._thread.join()

    def _run(self):
        while (request := self._next()) is not None:
            try:
                self._write(request)
            except _Cancelled:
                pass
            except Exception as error:
                self._report_error(request, error)

    def _next(self) -> TextRequest | None:
        """The next request to write; None ends the thread."""
        with self._changed:
            self._running = None
            while not self._is_closing:
                while self._waiting:
                    request = self._waiting.popleft()
                    if not request.is_cancelled.is_set():
                        self._running = request
                        return request
                self._changed.wait()
        return None

    def _write(self, request: TextRequest):
        model = self.model
        generator = torch.Generator(model.device)
        generator.seed() if request.seed is None else generator.manual_seed(request.seed)
        settled = _SettledTokens(request, model._prepare_settings(None, dict(request.settings)))
        input_ids = torch.tensor([request.input_ids], device=model.device)
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generator=generator,
            on_step=settled.on_step,
            return_dict_in_generate=True,
            **request.settings,
        )
        settled.finish(output.sequences[0].tolist())

    def _report_error(self, request: TextRequest, error: Exception):
        try:
            request.listener(Progress([], 0, is_finished=True, error=error))
        except Exception:
            logger.exception("A listener failed while it was told of an error.")


class _SettledTokens:
    """Tells a request's listener what will not change any more: the text up to its first [MASK], or its EOS."""

    def __init__(self, request: TextRequest, config):
        self.request, self.config = request, config
        self.reported, self.num_passes = request.first_column, 0

    def on_step(self, step: DenoisingStep):
        self.num_passes = step.num_forward_passes
        tokens = step.tokens.tolist()
        end = self.reported
        while end < len(tokens) and tokens[end] != self.config.mask_token_id:
            end += 1
            if end > len(self.request.input_ids) and tokens[end - 1] in self.config.eos_token_ids:
                break  # what stands after the end is not part of the text
        self._report(tokens[self.reported : end])

    def finish(self, tokens: list[int]):
        self._report(tokens[self.reported :], is_finished=True)

    def _report(self, new_tokens: list[int], is_finished: bool = False):
        if self.request.is_cancelled.is_set():
            raise _Cancelled
        self.reported += len(new_tokens)
        self.request.listener(Progress(new_tokens, self.num_passes, is_finished))
