"""Lines in, records out: as many lines under way as keep the model's rows filled, and no more."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, as_completed, wait
from functools import partial
from itertools import count
from pathlib import Path

from anyio.from_thread import start_blocking_portal
from transformers import PreTrainedTokenizerBase

from ..continuous_batching import DEFAULT_MAX_ROWS
from ..generation import MaskedDiffusionGenerationMixin
from .application import Application
from .lines import Line, dump

LINES_PER_ROW = 4  # some are in a row, and some wait for one
LINES_PER_ROW_IN_ORDER = 64  # an answer that is waited for must not let the rows run empty


def answer_all(
    model: MaskedDiffusionGenerationMixin,
    tokenizer: PreTrainedTokenizerBase,
    requests: Iterable[dict],
    *,
    name: str | None = None,
    max_rows: int = DEFAULT_MAX_ROWS,
    max_tokens: int | None = None,
    in_order: bool = False,
) -> Iterator[dict]:
    """Answers any number of requests by the engine, and yields a record for each.

    `requests` is consumed lazily, by the thread that iterates, a little ahead of the records. Whoever stops iterating
    ends the work.

    Args:
        model: a masked diffusion model; its generation config has what a request does not say.
        tokenizer: of the model.
        requests (`Iterable[dict]`): each `{"prompt": ...}`, `{"messages": ...}`, with further fields of the body of
            `/v1/completions` or `/v1/chat/completions` and an `id`, or `{"custom_id", "method", "url", "body"}`.
        name (`str`, *optional*): that a request's `model` must be, if it has one; the model's folder or Hub id if
            absent.
        max_rows (`int`): texts that are written at a time.
        max_tokens (`int`, *optional*): the most that rows times columns of the longest text may be.
        in_order (`bool`): whether records come in the order of the requests, and not as they are finished.

    Yields:
        `dict`: `id`, `custom_id`, `line` (the request's number, from 1), and either `response` with `status_code`,
        `request_id` and `body`, or the `error` of what is no request, with `code` and `message`.

    Raises:
        ValueError: if `max_rows` or `max_tokens` is below 1.
        RuntimeError: if the model's thread ends.
    """
    for argument, value in (("max_rows", max_rows), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"`{argument}` must be at least 1, got {value}.")
    place = model.name_or_path
    name = name or (Path(place).resolve().name if Path(place).is_dir() else place)
    lines = (Line(number, dump(request)) for number, request in zip(count(1), requests))
    return answer_lines(lines, partial(Application, model, tokenizer, name, max_rows, max_tokens), in_order)


def answer_lines(lines: Iterable[Line], make_application: Callable[[], Application], in_order: bool) -> Iterator[dict]:
    """The records of lines, by an application that is made for them and closed at the end."""
    with start_blocking_portal() as portal:
        application = make_application()
        portal.call(application.start)
        try:
            limit = application.worker.max_rows * (LINES_PER_ROW_IN_ORDER if in_order else LINES_PER_ROW)
            futures = (portal.start_task_soon(application.answer, line) for line in lines)
            yield from (_in_order if in_order else _as_finished)(futures, limit)
        finally:
            portal.call(application.close)


def _as_finished(futures: Iterator[Future], limit: int) -> Iterator[dict]:
    """Results as they come, with at most `limit` futures open; the others are not made before."""
    open_futures: set[Future] = set()
    for future in futures:
        open_futures.add(future)
        timeout = None if len(open_futures) >= limit else 0
        done, open_futures = wait(open_futures, timeout, FIRST_COMPLETED)
        for each in done:
            yield each.result()
    for future in as_completed(open_futures):
        yield future.result()


def _in_order(futures: Iterator[Future], limit: int) -> Iterator[dict]:
    """Results in the order of their futures, with at most `limit` results open or kept."""
    open_futures: deque[Future] = deque()
    for future in futures:
        open_futures.append(future)
        while open_futures and (len(open_futures) >= limit or open_futures[0].done()):
            yield open_futures.popleft().result()
    while open_futures:
        yield open_futures.popleft().result()
