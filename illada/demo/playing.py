"""A denoising as it happens, and again afterwards: lists of tokens in the form of `illada.text.trace.trace_tokens`.

A token is a dict of `text`, `step` (the forward pass that committed it, 0 if it was given, None while it is undecided)
and `confidence` (None if there is none). The text of an undecided token is the current guess, or empty.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..denoising import DenoisingStep


class _Abandoned(Exception):
    """Nobody looks any more."""


def steps_and_output(call: Callable, **arguments) -> Iterator[DenoisingStep | Any]:
    """Yields each step of `call(on_step=..., **arguments)` as soon as it is made, and then what the call returns.

    The call runs in a thread of its own. Closing the iterator ends it at its next step.

    Raises:
        Exception: what the call raises.
    """
    steps: SimpleQueue[DenoisingStep | None] = SimpleQueue()
    abandoned = Event()

    def on_step(step: DenoisingStep):
        if abandoned.is_set():
            raise _Abandoned
        steps.put(step)

    with ThreadPoolExecutor(1) as pool:
        output = pool.submit(call, on_step=on_step, **arguments)
        output.add_done_callback(lambda _: steps.put(None))
        try:
            while (step := steps.get()) is not None:
                yield step
        finally:
            abandoned.set()
        yield output.result()


class LiveTokens:
    """The tokens of one text while it is denoised; an instance is called with each step.

    Args:
        first_column: the first token to show.
        eos_token_ids: of an answer: what stands after the first of them that is decided will not be part of it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mask_token_id: int,
        first_column: int,
        eos_token_ids: Sequence[int] = (),
    ):
        self.tokenizer, self.mask_token_id, self.first_column = tokenizer, mask_token_id, first_column
        self.eos_token_ids = eos_token_ids
        self.num_steps = 0
        self.tokens: list[dict] = []  # as they were shown last
        self.commits: dict[int, tuple[int, float]] = {}  # column: step and confidence

    def __call__(self, step: DenoisingStep) -> list[dict]:
        self.num_steps = step.num_forward_passes
        columns = step.columns.tolist()
        confidences = dict(zip(columns, step.confidence.tolist()))
        guesses = dict(zip(columns, step.proposals.tolist()))
        for column, is_committed in zip(columns, step.committed.tolist()):
            if is_committed:
                self.commits[column] = (self.num_steps, confidences[column])
        ids = step.tokens.tolist()
        ends = (column + 1 for column in range(self.first_column, len(ids)) if ids[column] in self.eos_token_ids)
        tokens = self.finished(ids[: next(ends, None)])
        for column, token in enumerate(tokens, start=self.first_column):
            if step.tokens[column] == self.mask_token_id:
                guess = guesses.get(column, self.mask_token_id)
                is_guessed = guess != self.mask_token_id
                token["text"] = self.tokenizer.decode(guess) if is_guessed else ""
                token["step"], token["confidence"] = None, confidences[column] if is_guessed else None
        self.tokens = tokens
        return tokens

    def finished(self, input_ids: list[int]) -> list[dict]:
        """The tokens of `input_ids` with the step and confidence of those that were committed so far."""
        tokens = []
        for column, token in enumerate(input_ids[self.first_column :], start=self.first_column):
            step, confidence = self.commits.get(column, (0, None))
            tokens.append({"text": self.tokenizer.decode(token), "step": step, "confidence": confidence})
        return tokens


def hide_after(tokens: list[dict], step: int) -> list[dict]:
    """The tokens as they stood after forward pass `step`, without guesses."""
    hidden = {"text": "", "step": None, "confidence": None}
    return [{**token, **hidden} if (token["step"] or 0) > step else token for token in tokens]
