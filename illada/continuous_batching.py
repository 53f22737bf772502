"""The manager of continuous batching: a thread whose engine takes requests at any time.

The interface is that of Transformers' `ContinuousBatchingManager`, so that code written for it runs on masked
diffusion models. The work is done by this package's engine: there is no paged cache, and a request's tokens are those
that `generate` gives it, whoever else is served.
"""

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.utils import logging

from .adapters import check_adapters
from .denoising import Denoiser
from .engine import Engine, Request
from .frozen_cache import FrozenCache, check_cache
from .prompts import prepare_max_new_tokens, prepare_prompts, prepare_segments
from .request_output import RequestOutput, Ticket

__all__ = ["ContinuousBatchingManager", "QueueFull", "RequestOutput"]

logger = logging.get_logger()

DEFAULT_MAX_ROWS = 8
MAX_KEPT_SETTINGS = 64


class QueueFull(RuntimeError):
    """More requests are waiting than a manager's `max_queue_size` allows."""


class ContinuousBatchingManager:
    """Writes requests as they come, in the order of their arrival; made by `init_continuous_batching`.

    Methods, arguments and results are those of Transformers' manager of the same name.

    Args:
        model: a masked diffusion model.
        generation_config (`GenerationConfig`, *optional*): settings of all requests; a request's own win over it.
        config (`ContinuousBatchingConfig`, *optional*): `max_requests_per_batch` are the rows (8 if absent),
            `max_batch_tokens` the most that rows times columns may be, and `max_queue_size`, `return_logprobs` and
            `seed` mean what they mean there. What is about the paged cache has no meaning here.
    """

    def __init__(self, model, generation_config: GenerationConfig | None, config: ContinuousBatchingConfig | None):
        check_adapters(model, "Continuous batching")
        self.model, self.generation_config = model.eval(), generation_config
        self.config = ContinuousBatchingConfig() if config is None else config
        defaults = model._prepare_settings(generation_config, {})
        self.num_return_sequences = defaults.num_return_sequences or 1
        self.mask_token_id = defaults.mask_token_id
        self.engine = Engine(
            model._make_predictor,
            self.mask_token_id,
            max_rows=self.config.max_requests_per_batch or DEFAULT_MAX_ROWS,
            max_tokens=self.config.max_batch_tokens,
        )
        self.background_thread_status = SimpleNamespace(fatal_error=None)
        self.warmed_up = True
        self._seeds = torch.Generator()
        self._seeds.seed() if self.config.seed is None else self._seeds.manual_seed(self.config.seed)
        self._denoisers: dict[str, Denoiser] = {}
        self._counter = itertools.count()
        self._tickets: dict[str, Ticket] = {}
        self._arrivals: list[Request] = []
        self._cancelled: set[Request] = set()
        self._calls: deque[tuple[Future, Callable]] = deque()
        self._results: deque[RequestOutput] = deque()
        self._handlers: dict[str, tuple[Callable, asyncio.AbstractEventLoop]] = {}
        self._changed, self._pass_lock = threading.Condition(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopping: str | None = None  # "flush" or "hard"

    # Requests

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        on_step: Callable | None = None,
        cache: FrozenCache | None = None,
        prompt_segments: list[int] | None = None,
        **settings: Any,
    ) -> str:
        """Puts a request in line, and returns its id.

        Args:
            input_ids (`list[int]`): the prompt; each [MASK] in it is a blank, filled in the result's `prompt_ids`.
            request_id (`str`, *optional*): made up if absent.
            max_new_tokens (`int`, *optional*): the budget.
            streaming (`bool`): whether to deliver a result for each settled block, and not only the last.
            record_timestamps (`bool`): whether results have the time at which each token was settled, in seconds.
            eos_token_id (`int` or `list[int]`, *optional*).
            tokenizer, logits_processor, stopping_criteria, on_step, cache, prompt_segments: as in `generate`.
            settings: fields of [`MaskedDiffusionGenerationConfig`], `seed` among them, or `preset`.

        Raises:
            ValueError: if an argument is bad, or the request would not fit by itself; nothing is queued then.
            QueueFull: if too many are waiting.
            RuntimeError: if the manager is stopping.
        """
        own = {"max_new_tokens": max_new_tokens, "eos_token_id": eos_token_id}
        settings |= {name: value for name, value in own.items() if value is not None}
        arguments = tokenizer, logits_processor, stopping_criteria, on_step, cache, prompt_segments
        requests = self.prepare(input_ids, *arguments, **settings)
        request_id = f"req_{next(self._counter)}" if request_id is None else request_id
        names = [*(f"{request_id}__child#{index}" for index in range(len(requests) - 1)), request_id]
        tickets = []
        for name, request in zip(names, requests, strict=True):
            now = time.perf_counter()
            output = RequestOutput(name, prompt_ids=request.prompt.tolist(), created_time=now, lifespan=(now, -1))
            timestamps = [] if record_timestamps else None
            ticket = Ticket(name, self._deliver, output, streaming, timestamps, self.config.return_logprobs, request)
            request.streamer = ticket if streaming or record_timestamps else None
            request.on_done = self._on_done(ticket)
            tickets.append(ticket)
        with self._changed:
            for name in names:
                if name in self._tickets:
                    raise ValueError(f"`request_id` must be unique, got {name!r}, which is in line.")
            self.submit(requests)
            self._tickets |= {ticket.request_id: ticket for ticket in tickets}
        return request_id

    def prepare(
        self,
        input_ids: list[int],
        tokenizer: PreTrainedTokenizerBase | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        on_step: Callable | None = None,
        cache: FrozenCache | None = None,
        prompt_segments: list[int] | None = None,
        **settings: Any,
    ) -> list[Request]:
        """The requests of a prompt, checked and not in line yet: `num_return_sequences` of them, as in `generate`.

        Whoever hands them to [`submit`] sets their `on_done`, which is called in the manager's thread.

        Raises:
            ValueError: if an argument is bad, or a request would not fit by itself.
        """
        config = self.model._prepare_settings(self.generation_config, settings)
        if config.mask_token_id != self.mask_token_id:
            own = self.mask_token_id
            raise ValueError(f"`mask_token_id` must be the manager's, {own}, got {config.mask_token_id}.")
        prompt = torch.as_tensor(input_ids).reshape(1, -1)
        prompt, mask = prepare_prompts(prompt, torch.ones_like(prompt), config, self.model.config.vocab_size)
        check_cache(cache, config.block_cache)
        [segments] = prepare_segments(prompt_segments, mask, config)
        budget = prepare_max_new_tokens(prompt, mask, config, self.model.config.max_position_embeddings)
        denoiser = self._denoiser(config, settings, logits_processor)
        criteria = self.model._prepare_stopping_criteria(config, stopping_criteria, tokenizer)
        seed = torch.randint(2**62, (), generator=self._seeds).item() if config.seed is None else config.seed
        requests = []
        for index in range(config.num_return_sequences or 1):
            generator = None
            if denoiser.is_random:
                generator = torch.Generator(self.model._execution_device).manual_seed(seed + index)
            request = Request(
                prompt=prompt[0],
                max_new_tokens=budget,
                min_new_tokens=max(config.min_new_tokens or 0, (config.min_length or 0) - prompt.shape[1]),
                denoiser=denoiser,
                generator=generator,
                stopping_criteria=criteria,
                on_step=on_step,
                segments=segments,
                cache=cache,
            )
            self.engine.check(request)
            requests.append(request)
        return requests

    def submit(self, requests: list[Request]):
        """Puts all of these requests in line, or none.

        Raises:
            QueueFull: if they do not fit among those that wait.
            RuntimeError: if the manager is stopping, or its thread has failed.
        """
        with self._changed:
            self._refuse_if_stopping()
            limit = self.config.max_queue_size
            if limit and self.num_waiting + len(requests) > limit:
                raise QueueFull(f"`max_queue_size`={limit} requests may wait, and {self.num_waiting} do already.")
            self._arrivals += requests
            self._changed.notify_all()

    def call(self, function: Callable[[], Any]) -> Future:
        """Calls `function` in the manager's thread, for what else the model is asked: one call before each pass.

        Returns:
            `concurrent.futures.Future`: of what it returns or raises; gradients are off.

        Raises:
            QueueFull: if `max_queue_size` calls are waiting.
            RuntimeError: if the manager is stopping, or its thread has failed.
        """
        future: Future = Future()
        with self._changed:
            self._refuse_if_stopping()
            limit = self.config.max_queue_size
            if limit and len(self._calls) >= limit:
                raise QueueFull(f"`max_queue_size`={limit} calls may wait, and so many do already.")
            self._calls.append((future, function))
            self._changed.notify_all()
        return future

    def _refuse_if_stopping(self):
        if self._stopping is not None or self.background_thread_status.fatal_error is not None:
            raise RuntimeError("The manager is stopping and takes no more requests.")

    @property
    def num_waiting(self) -> int:
        """Requests in line that are not in a row yet; those that arrive during a pass wait for the next."""
        with self._changed:
            return len({*self._arrivals, *self.engine.waiting.copy()} - self._cancelled)

    def cancel(self, requests: list[Request]):
        """Ends these requests before the next pass, and their rows are free for it. `on_done` is not called, unless a
        request is done in the pass under way."""
        with self._changed:
            self._cancelled.update(requests)
            self._changed.notify_all()

    def add_requests(
        self,
        inputs: list[list[int]],
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        **settings: Any,
    ) -> list[str]:
        """[`add_request`] for each prompt; returns their ids in order."""
        shared = {"max_new_tokens": max_new_tokens, "streaming": streaming, "record_timestamps": record_timestamps}
        return [self.add_request(input_ids, **shared, **settings) for input_ids in inputs]

    def cancel_request(self, request_id: str):
        """Ends a request before its next pass. No result is delivered, and an id that is not known is no error."""
        with self._changed:
            ticket = self._tickets.pop(request_id, None)
            self._handlers.pop(request_id, None)
            if ticket is not None:
                self.cancel([ticket.request])

    def _denoiser(self, config, settings: dict, logits_processor) -> Denoiser:
        """Requests of equal settings share a denoiser, and are decided together."""
        if logits_processor is not None:
            return self.model._prepare_denoiser(config, logits_processor)
        lengths = {"max_new_tokens", "max_length", "min_new_tokens", "min_length"}
        own = {*lengths, "seed", "stop_strings", "num_return_sequences"}
        key = repr(sorted((name, repr(value)) for name, value in settings.items() if name not in own))
        with self._changed:
            denoiser = self._denoisers.pop(key, None) or self.model._prepare_denoiser(config, None)
            self._denoisers[key] = denoiser
            if len(self._denoisers) > MAX_KEPT_SETTINGS:
                del self._denoisers[next(iter(self._denoisers))]
        return denoiser

    # Results

    def _on_done(self, ticket: Ticket) -> Callable[[Request], None]:
        def on_done(request: Request):
            with self._changed:
                if self._tickets.get(ticket.request_id) is not ticket:
                    return  # cancelled
                del self._tickets[ticket.request_id]
            ticket.finish(request)

        return on_done

    def _deliver(self, output: RequestOutput):
        with self._changed:
            handler = self._handlers.get(output.request_id)
            if handler is None:
                self._results.append(output)
                self._changed.notify_all()
                return
            if output.is_finished():
                del self._handlers[output.request_id]
        callback, loop = handler
        loop.call_soon_threadsafe(callback, output)

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> RequestOutput | None:
        """The next result, of the request with this id if one is given; None after `timeout` seconds, or if none will
        come."""

        def take() -> RequestOutput | None:
            for index, output in enumerate(self._results):
                if request_id in (None, output.request_id):
                    del self._results[index]
                    return output

        end = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while (output := take()) is None:
                remaining = None if end is None else end - time.monotonic()
                if not self.is_running() or (remaining is not None and remaining <= 0):
                    return None
                self._changed.wait(remaining)
            return output

    def __iter__(self) -> Iterator[RequestOutput]:
        """Yields results as they come, until the manager has stopped."""
        while self.is_running() or self._results:
            if (output := self.get_result(timeout=0.1)) is not None:
                yield output

    def request_id_iter(self, request_id: str) -> Iterator[RequestOutput]:
        """Yields the results of one request until it is finished."""
        while self.is_running() or self._results:
            output = self.get_result(request_id, timeout=0.1)
            if output is not None:
                yield output
                if output.is_finished():
                    return

    def register_result_handler(self, request_id: str, callback: Callable[[RequestOutput], None]):
        """Calls `callback` with each result of a request, on the running event loop, in place of queueing it."""
        with self._changed:
            self._handlers[request_id] = callback, asyncio.get_running_loop()

    # The loop

    def is_running(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self):
        """Starts the thread that writes."""
        if self.is_running():
            return logger.warning("The manager's thread is running already.")
        self._stopping, self.background_thread_status.fatal_error = None, None
        self._thread = threading.Thread(target=self._run, name="illada-continuous-batching", daemon=True)
        self._thread.start()

    def warmup(self):
        """Nothing is captured beforehand."""

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = False,
        hard_stop: bool = False,
    ):
        """Ends the thread: after all requests are written, or at once with `hard_stop`, which makes them fail."""
        with self._changed:
            self._stopping = "hard" if hard_stop else "flush"
            self._changed.notify_all()
        if block and self._thread is not None:
            self.join(time.perf_counter(), timeout)
        if keep_for_next_session:
            self.model._cached_continuous_batching_manager = self

    def join(self, stop_trigger_time: float = 0.0, timeout: float | None = None):
        """Waits for the thread to end."""
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                logger.warning(f"The manager's thread did not end within {timeout} seconds.")

    def destroy(self):
        """Stops, and gives up the cache."""
        if self.is_running():
            self.stop()
        self.engine.close()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Between two passes, for instance to change weights; nothing is lost."""
        with self._pass_lock:
            yield

    def run(self, on_result: Callable[[], None] = lambda: None):
        """Writes all that is in line in the calling thread, which is what `generate_batch` does."""
        while self._step():
            on_result()

    def _step(self) -> bool:
        """Takes in what has arrived, and makes one pass. Returns whether there is more to do."""
        with self._pass_lock:
            with self._changed:
                arrivals, self._arrivals = self._arrivals, []
                cancelled, self._cancelled = self._cancelled, set()
                for request in arrivals:
                    self.engine.add(request)
                call = self._calls.popleft() if self._calls else None
            for request in cancelled:
                self.engine.cancel(request)
            if call is not None:
                _answer(*call)
            return self.engine.step() or bool(self._arrivals or self._calls)

    def _run(self):
        try:
            while self._stopping != "hard":
                if not self._step():
                    with self._changed:
                        if self._stopping is not None and not self._arrivals and not self._calls:
                            break
                        self._changed.wait_for(
                            lambda: self._arrivals or self._calls or self._cancelled or self._stopping is not None
                        )
        except BaseException as error:
            logger.error(f"The manager's thread ended: {error!r}")
            self.background_thread_status.fatal_error = error
        finally:
            self._fail_the_rest()

    def _fail_the_rest(self):
        reason = self.background_thread_status.fatal_error or RuntimeError("The manager was stopped.")
        with self._changed:
            requests = [*self.engine.active.values(), *self.engine.waiting, *self._arrivals]
            failed = [request for request in requests if request not in self._cancelled]
            self._arrivals, self._cancelled = [], set()
            calls, self._calls = self._calls, deque()
        for future, _ in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(reason)
        for request in requests:
            self.engine.cancel(request)
        for request in failed:
            request.error = reason
            if request.on_done is not None:
                request.on_done(request)
        with self._changed:
            self._changed.notify_all()


@torch.no_grad()
def _answer(future: Future, function: Callable[[], Any]):
    if not future.set_running_or_notify_cancel():
        return  # nobody waits for it any more
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
