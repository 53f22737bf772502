"""The engine: one loop in which texts are admitted, denoised together, and leave when they are done.

    request   one text to write: prompt tokens (with blanks), settings, source of noise, who listens
    row       a place in the canvas that a request occupies while it is written
    block     the masks of a row that are decoded together; every row has its own
    pass      one forward of the model over the rows that take part in it

`generate` is this engine with all requests admitted at once; `generate_batch` and servers keep adding to it. What a
request gets depends on nothing but the request: not on its neighbours, the time at which it joined, or who left.
"""

import bisect
import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers.generation import StoppingCriteriaList, StopStringCriteria
from transformers.utils import logging

from .canvas import ActiveBlocks, Canvas, Row, without_drafts
from .commit_rules import CommitRule
from .denoising import Denoiser, DenoisingStep
from .drafts import known_draft, propose
from .frozen_cache import FrozenCache
from .logits import non_finite_logits
from .prediction import Predictor, predictor_key

logger = logging.get_logger()


@dataclass
class RequestResult:
    """What became of a request; on the host. S counts the prompt and what was written.

    Attributes:
        tokens (`torch.LongTensor` of shape `(S,)`): up to the text's end, its EOS included.
        given (`torch.BoolTensor` of shape `(S,)`): True for the tokens that the caller gave.
        num_forward_passes (`int`): passes in which the text took part; a guided pass counts once.
        commit_steps (`torch.LongTensor` of shape `(S,)`): the pass that committed each token; 0 for given ones. With
            `num_drafts` a pass may commit tokens in several steps.
        commit_confidences (`torch.FloatTensor` of shape `(S,)`): its probability then; NaN for given ones.
    """

    tokens: torch.LongTensor
    given: torch.BoolTensor
    num_forward_passes: int
    commit_steps: torch.LongTensor
    commit_confidences: torch.FloatTensor


@dataclass(eq=False)
class Request:
    """One text to write.

    Args:
        prompt (`torch.LongTensor` of shape `(S,)`): on the host; [MASK] is a blank to fill.
        max_new_tokens (`int`), min_new_tokens (`int`): the response's budget, and how early it may end.
        denoiser ([`Denoiser`]): the settings. Requests that share one are decided together.
        generator (`torch.Generator`, *optional*): the source of noise, on the model's device.
        stopping_criteria (`StoppingCriteriaList`): asked at the end of each block of the response, with a batch of 1;
            stop strings see the response only.
        streamer (*optional*): receives the prompt, each settled block, and drafts if it has `put_draft`.
        on_step (`Callable`, *optional*): called with a [`DenoisingStep`] after each step.
        on_done (`Callable`, *optional*): called with the request once it is finished or has failed. What it raises is
            logged, and changes nothing.
        index (`int`): the request's place among those of a call, for `on_step`.
        segments (`tuple[int, ...]`), cache ([`FrozenCache`], *optional*): as of a [`Row`].

    Attributes:
        result ([`RequestResult`] or `None`): once it is finished.
        error (`Exception` or `None`): what made it fail; a request fails alone.
        is_done (`bool`): whether it is finished, failed or cancelled.
    """

    prompt: torch.LongTensor
    max_new_tokens: int
    denoiser: Denoiser
    min_new_tokens: int = 0
    generator: torch.Generator | None = None
    stopping_criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    streamer: object | None = None
    on_step: Callable[[DenoisingStep], None] | None = None
    on_done: "Callable[[Request], None] | None" = None
    index: int = 0
    segments: tuple[int, ...] = ()
    cache: FrozenCache | None = None
    result: RequestResult | None = field(default=None, init=False)
    error: Exception | None = field(default=None, init=False)
    is_done: bool = field(default=False, init=False)
    num_streamed: int = field(default=0, init=False)

    @property
    def num_columns(self) -> int:
        """Columns that it may come to occupy."""
        return len(self.prompt) + self.max_new_tokens

    @property
    def num_candidates(self) -> int:
        """Texts that it may have in a pass: its own, and drafts."""
        return self.denoiser.config.num_candidates


class Engine:
    """Writes requests in rows that come and go.

    Args:
        make_predictor (`Callable`): makes the predictor for settings and a canvas.
        mask_token_id (`int`).
        max_rows (`int`): requests that are written at a time.
        max_tokens (`int`, *optional*): the most that rows, with `num_drafts` for each, times columns of the longest
            may be.

    Attributes:
        waiting (`deque[Request]`): in order of arrival. What does not fit waits, and nothing overtakes it.
        active (`dict[Row, Request]`): what is being written.
        num_passes (`int`), num_row_passes (`int`): passes so far, and the rows that took part in
            them; for a listener, the pass that it hears of included.
    """

    def __init__(self, make_predictor: Callable, mask_token_id: int, max_rows: int, max_tokens: int | None = None):
        self.make_predictor, self.max_tokens = make_predictor, max_tokens
        self.canvas = Canvas(max_rows, mask_token_id)
        self.free_indices = list(range(max_rows))
        self.waiting: deque[Request] = deque()
        self.active: dict[Row, Request] = {}
        self.rules: dict[Row, CommitRule] = {}
        self.predictors: dict[tuple, Predictor] = {}
        self.num_passes = self.num_row_passes = 0

    def check(self, request: Request):
        """Raises a `ValueError` if a request would not fit even by itself."""
        if self.max_tokens is not None and request.num_candidates * request.num_columns > self.max_tokens:
            drafts = f", {request.num_candidates} times for `num_drafts`" if request.num_candidates > 1 else ""
            raise ValueError(
                f"A request must fit into `max_tokens`={self.max_tokens}, got {len(request.prompt)} tokens of prompt "
                f"and a budget of {request.max_new_tokens}{drafts}."
            )

    def add(self, request: Request):
        """Puts a request in line; [`check`] says whether it can ever be admitted."""
        self.check(request)
        self.waiting.append(request)

    def cancel(self, request: Request):
        """Ends a request between two passes; its row is free for the next one."""
        if request in self.waiting:
            self.waiting.remove(request)
        for row in [row for row, active in self.active.items() if active is request]:
            self._leave(row)
        request.is_done = True

    @torch.no_grad()
    def step(self) -> bool:
        """One pass of all active rows. Returns whether there is more to do.

        1. Admit waiting requests into free rows, in order of arrival.
        2. Predict the masks of every row's active block, those of its drafts too, and decide which predictions to
           commit. All of it is on its way to the device before the device is waited for, once.
        3. Write what was decided for each row, and for its drafts as far as it becomes one; tell who listens.
        4. Finish the rows in which everything before the first EOS is decided, or that met a stop; open the next block
           of the others whose block is decided: the prompt's blanks first, then the response.
        """
        self._admit()
        decided: list[tuple[ActiveBlocks, torch.Tensor]] = []
        for key, rows in _grouped(self.active, lambda row: predictor_key(row.settings)).items():
            with self._failing(rows):
                decided += self._predict_and_decide(self.predictors[key], rows)
        self.num_passes += bool(decided)  # whoever hears of an answer finds its passes counted
        self.num_row_passes += sum(len(without_drafts(blocks.rows)) for blocks, _ in decided)
        for blocks, outcome in zip([blocks for blocks, _ in decided], _read([outcome for _, outcome in decided])):
            self._write(blocks, outcome)
        return bool(self.active or self.waiting)

    def run(self):
        """Writes all requests in line.

        Raises:
            Exception: the first that made a request fail.
        """
        requests = list(self.waiting)
        while self.step():
            _raise_error(requests)
        _raise_error(requests)

    def close(self):
        """Gives up all rows, and what the predictors keep."""
        for row in list(self.active):
            self._leave(row)
        for predictor in self.predictors.values():
            predictor.close()
        self.predictors.clear()

    def _admit(self):
        while self.waiting and self.free_indices:
            request = self.waiting[0]
            columns = max([request.num_columns, *(row.end for row in self.active)])
            texts = sum(each.num_candidates for each in [request, *self.active.values()])
            if self.max_tokens is not None and texts * columns > self.max_tokens:
                return
            self.waiting.popleft()
            settings = request.denoiser.config
            key = predictor_key(settings)
            if key not in self.predictors:
                self.predictors[key] = self.make_predictor(settings, self.canvas)
            index = self.free_indices.pop(0)
            row = self.canvas.admit(index, request.prompt, request.max_new_tokens, settings)
            row.segments, row.cache = request.segments, request.cache
            rule = request.denoiser.rule
            self.active[row], self.rules[row] = request, copy.deepcopy(rule) if rule.has_memory else rule
            with self._failing([row]):
                self._open_next_block(row)

    def _open_next_block(self, row: Row):
        self._stream(row, self.canvas.settled_length(row))
        row.block, row.block_steps, row.drafts = next(row.blocks, None), 0, []
        if row.block is None:
            return self._finish(row, row.length)
        if self.rules[row].has_memory:
            self.rules[row].begin(len(row.block))
        self._predictor(row).begin(row)

    def _predictor(self, row: Row) -> Predictor:
        return self.predictors[predictor_key(row.settings)]

    def _predict_and_decide(self, predictor: Predictor, rows: list[Row]) -> list[tuple[ActiveBlocks, torch.Tensor]]:
        """For rows that share a predictor: those that share their settings with their drafts, and what was decided."""
        rows = [*rows, *(draft for row in rows for draft in row.drafts)]
        blocks = ActiveBlocks(self.canvas, rows)
        predicted = blocks.masked | blocks.exists & torch.tensor([[self.rules[row.owner].may_remask] for row in rows])
        places, line = predicted.nonzero(as_tuple=True)
        logits = predictor.logits(rows, places, blocks.columns[places, line])
        decided = []
        for group in _grouped(range(len(rows)), lambda place: self._decision_key(rows[place])).values():
            together = [rows[place] for place in group]
            with self._failing(together):
                if len(group) == len(rows):
                    part = blocks, predicted, logits
                else:
                    mine = torch.isin(places, torch.tensor(group)).nonzero().squeeze(-1).to(logits.device)
                    own = ActiveBlocks(self.canvas, together)
                    part = own, predicted[group, : own.columns.shape[1]], logits[mine]
                requests = [self.active[row.owner] for row in together]
                decided.append((part[0], requests[0].denoiser(*part, self.rules[together[0].owner], requests)))
        return decided

    def _decision_key(self, row: Row) -> tuple:
        """Rows of equal keys are decided together."""
        denoiser = self.active[row.owner].denoiser
        return id(denoiser), id(self.rules[row.owner]), row.length if denoiser.reads_texts else None

    def _write(self, blocks: ActiveBlocks, outcome: torch.Tensor):
        """Writes what was decided (6, R, W) for the rows of `blocks`.

        It is a step of each row, and further ones for as long as the row becomes one of its drafts. Guesses from the
        last of them are its next drafts.
        """
        place_of = {row: place for place, row in enumerate(blocks.rows)}
        decided = {row: place_of[row] for row in without_drafts(blocks.rows)}
        for row in decided:
            row.num_passes += 1
        while decided:
            if len(decided) < len(blocks.rows):
                blocks = ActiveBlocks(self.canvas, list(decided))
            self._write_step(blocks, *outcome[:5, list(decided.values()), : blocks.columns.shape[1]])
            going_on = [row for row in decided if row in self.active and row.block_steps > 0]
            drafts = {row: self._known_draft(row) for row in going_on}
            for row in going_on:
                if drafts[row] is None and row.draft_indices:
                    tokens, ranks = outcome[[0, 5], decided[row], : len(row.block)].long()
                    row.drafts = propose(self.canvas, row, tokens, ranks, self._predictor(row).may_be_drafted)
            decided = {row: place_of[draft] for row, draft in drafts.items() if draft is not None}

    def _known_draft(self, row: Row) -> Row | None:
        return known_draft(self.canvas, row) if self._predictor(row).may_be_drafted(row) else None

    def _write_step(self, blocks: ActiveBlocks, tokens, bits, commit, remask, uncertain):
        """Writes a step of the rows of `blocks`, all (R, W) on the host; finishes those that are done."""
        masked, denoiser = blocks.masked, self.active[blocks.rows[0]].denoiser
        confidence = bits.view(torch.float32).masked_fill(~masked, torch.nan)
        is_broken = masked & confidence.isnan()
        proposals = torch.where(masked, tokens.long(), blocks.tokens)
        blocks.commit(proposals, confidence, commit.bool(), remask.bool())
        ends, is_open = blocks.first_eos(denoiser.eos_token_ids), blocks.masked.any(-1).tolist()
        has_failed, is_stale = is_broken.any(-1).tolist(), uncertain.bool().any(-1).tolist()
        for place, row in enumerate(blocks.rows):
            row.is_stale = is_stale[place]
            with self._failing([row]):
                if has_failed[place]:
                    position = int(row.block[is_broken[place, : len(row.block)]][0])
                    raise non_finite_logits(f"position {position}", denoiser.dtype)
                seen = slice(len(row.block))
                committed, remasked = (changes[place, seen].bool() for changes in (commit, remask))
                self._tell(row, proposals[place, seen], confidence[place, seen], committed, remasked)
                self._finish_or_go_on(row, ends[place], is_open[place], row.block[committed | remasked])

    def _tell(self, row: Row, proposals, confidence, committed, remasked):
        request = self.active[row]
        if request.on_step is not None:
            text = self.canvas.text(row).clone()
            step = request.index, row.block, text, proposals, committed, confidence, row.num_passes, remasked
            request.on_step(DenoisingStep(*step))
        if hasattr(request.streamer, "put_draft"):
            draft = self.canvas.text(row, row.prompt_length).clone()
            if row.is_in_response:
                draft = proposals
            else:
                draft[row.block] = proposals
            request.streamer.put_draft(draft)

    def _finish_or_go_on(self, row: Row, eos: int | None, is_open: bool, changed: torch.LongTensor):
        """Finishes a row at its EOS (a column) or at a stop, or opens its next block if nothing is open.

        A rule that may mask again must have seen all up to the EOS, and have left it as it is: what a step `changed`
        (columns) it has not seen yet.
        """
        if eos is not None and is_open and self.rules[row].may_remask and bool((changed <= eos).any()):
            eos = None
        end = None
        if row.is_in_response and not (is_open and eos is None):
            end = self._stopped_at(row, None if eos is None else eos + 1)
        if end is not None:
            self._finish(row, end)
        elif not is_open:
            self._open_next_block(row)

    def _stopped_at(self, row: Row, end: int | None) -> int | None:
        """Where the text ends: right after a stop string, else at `end`, else where a criterion stops it."""
        first, last = int(row.block[0]), int(row.block[-1]) + 1
        others = []
        for criterion in self.active[row].stopping_criteria:
            if not isinstance(criterion, StopStringCriteria):
                others.append(criterion)
                continue
            response = self.canvas.text(row, last if end is None else end)[row.prompt_length :]
            for length in range(first + 1 - row.prompt_length, len(response) + 1):
                if criterion(response[None, :length], None).item():
                    end = row.prompt_length + length
                    break
        if end is None and any(
            _is_stopped(criterion(self.canvas.text(row, last)[None], None)) for criterion in others
        ):
            end = last
        return end

    def _stream(self, row: Row, settled: int):
        """Hands the streamer the prompt, in one piece, and then what will not change any more."""
        request = self.active[row]
        if request.streamer is None:
            return
        text = self.canvas.text(row, settled)
        if request.num_streamed == 0 and settled >= row.prompt_length:
            request.streamer.put(text[None, : row.prompt_length].clone())
            request.num_streamed = row.prompt_length
        if request.num_streamed and settled > request.num_streamed:
            request.streamer.put(text[request.num_streamed :].clone())
            request.num_streamed = settled

    def _finish(self, row: Row, end: int):
        request = self.active[row]
        self._stream(row, end)
        if request.streamer is not None:
            request.streamer.end()
        texts = (self.canvas.tokens, self.canvas.given, self.canvas.commit_steps, self.canvas.commit_confidences)
        tokens, given, steps, confidences = (values[row.index, :end].clone() for values in texts)
        request.result = RequestResult(tokens, given, row.num_passes, steps, confidences)
        self._leave(row)
        _tell_it_is_done(request)

    def _leave(self, row: Row):
        request = self.active.pop(row)
        self.rules.pop(row)
        self._predictor(row).end(row)
        self.canvas.release(row)
        bisect.insort(self.free_indices, row.index)
        request.is_done = True

    @contextmanager
    def _failing(self, rows: list[Row]) -> Iterator[None]:
        """What is raised inside makes the requests of these rows fail, and no other."""
        try:
            yield
        except Exception as error:
            for row in rows:
                if row in self.active:
                    request = self.active[row]
                    request.error = error
                    self._leave(row)
                    _tell_it_is_done(request)


def _tell_it_is_done(request: Request):
    if request.on_done is None:
        return
    try:
        request.on_done(request)
    except Exception as error:  # the request is over: there is nobody else to tell
        logger.error("`on_done` of a request raised %r.", error, exc_info=True)


def _grouped(items: Iterable, key: Callable) -> dict:
    groups: dict = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _read(outcomes: list[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors of the device on the host: the one wait of a pass."""
    if not outcomes:
        return []
    values = torch.cat([outcome.flatten() for outcome in outcomes]).to("cpu", copy=True)
    sizes = [outcome.numel() for outcome in outcomes]
    return [part.view(outcome.shape) for part, outcome in zip(values.split(sizes), outcomes)]


def _is_stopped(answer: bool | torch.Tensor) -> bool:
    if torch.as_tensor(answer).numel() != 1:
        raise ValueError(
            f"`stopping_criteria` must answer with one bool for each text, asked by itself, got {answer}."
        )
    return bool(answer)


def _raise_error(requests: list[Request]):
    for request in requests:
        if request.error is not None:
            raise request.error
