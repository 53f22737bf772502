"""One text of an answer, which listens to the worker and posts what is settled."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from ..denoising import DenoisingStep
from .prompts import Prompt
from .settled import SettledText, Thinking, num_held_back
from .worker import Progress, TextRequest

LEAST_LOGPROB = -9999.0  # OpenAI's value for a probability of 0


@dataclass
class TokenText:
    """A token as logprobs show it.

    Attributes:
        text (`str`): of the token by itself.
        logprob (`float`, *optional*): of the token when it was committed; None if the caller gave it.
        start (`int`): the character of the answer at which it begins.
    """

    text: str
    logprob: float | None
    start: int


@dataclass
class Piece:
    """What one choice of an answer goes on with.

    Attributes:
        index (`int`): of the choice.
        text (`str`): what follows the text so far; may be empty.
        thought (`str`): what follows the thinking so far, where an answer has any.
        finish_reason (`str`, *optional*): with the last piece, `"stop"` or `"length"`.
        num_tokens (`int`), num_passes (`int`): tokens written, and forward passes made, so far.
        tokens (`list[TokenText]`): of the text, if logprobs were asked for.
        draft (`dict`, *optional*): the block as it stands, if drafts were asked for.
        error (`Exception`, *optional*): what ended the choice early.
    """

    index: int
    text: str = ""
    thought: str = ""
    finish_reason: str | None = None
    num_tokens: int = 0
    num_passes: int = 0
    tokens: list[TokenText] = field(default_factory=list)
    draft: dict | None = None
    error: Exception | None = None

    def extend(self, piece: "Piece"):
        """Goes on with the piece that follows. Of two drafts the later is kept."""
        self.text += piece.text
        self.thought += piece.thought
        self.tokens += piece.tokens
        self.finish_reason, self.num_tokens, self.num_passes = piece.finish_reason, piece.num_tokens, piece.num_passes
        self.draft, self.error = piece.draft or self.draft, piece.error


class Choice:
    """One text of an answer: hears of settled tokens in the worker's thread, and posts settled text.

    Args:
        request: that this listens to; it is cancelled when a stop string is complete.
        prompt: that the request was made of.
        stop: strings that end the text, which they are not part of. The answer alone is searched.
        thinking: divides the text, if it may begin with a chain of thought.
        has_logprobs: whether pieces have their tokens.
        post: is handed each [`Piece`]; may be called from any thread.
    """

    def __init__(
        self,
        index: int,
        request: TextRequest,
        prompt: Prompt,
        tokenizer: PreTrainedTokenizerBase,
        stop: list[str],
        thinking: Thinking | None,
        has_logprobs: bool,
        post: Callable[[Piece], None],
    ):
        self.index, self.request, self.prompt, self.stop, self.post = index, request, prompt, stop, post
        self.tokenizer, self.thinking, self.has_logprobs = tokenizer, thinking, has_logprobs
        config = request.request.denoiser.config
        self.eos_token_ids, self.mask_token_id = config.eos_token_ids, config.mask_token_id
        # An answer that shows the prompt has these tokens before those that a stop string may end.
        self.num_given = 0 if prompt.end is not None else len(prompt.input_ids) - prompt.first
        self.is_blank = [token == self.mask_token_id for token in prompt.input_ids[prompt.first :]]
        self.settled, self.confidences = SettledText(tokenizer), []
        self.num_posted = self.num_posted_tokens = 0  # characters; tokens, if there are logprobs

    def __call__(self, progress: Progress):
        if progress.error is not None:
            return self.post(Piece(self.index, error=progress.error))
        searched = len(self.settled.text) - max(map(len, self.stop), default=1) + 1
        self._settle(progress)
        if progress.is_finished:
            self.settled.finish()
        text = self.settled.text
        searched = max(searched, self.settled.length_of(self.num_given)) if self.stop else 0
        stops = [place for string in self.stop if (place := text.find(string, searched)) >= 0]
        if stops:
            self.request.cancel()
            self._post(text[: min(stops)], progress, "stop")
        elif progress.is_finished:
            self._post(text, progress, self._finish_reason())
        else:
            self._post(text[: len(text) - num_held_back(text, self.stop)], progress)

    def _settle(self, progress: Progress):
        count = len(progress.new_tokens)
        if self.prompt.end is not None:
            count = min(count, self.prompt.end - self.prompt.first - len(self.settled.tokens))
        self.settled.append(progress.new_tokens[:count])
        self.confidences += progress.new_confidences[:count]

    def _finish_reason(self) -> str:
        is_filled = self.prompt.max_new_tokens == 0
        is_ended = self.settled.tokens and self.settled.tokens[-1] in self.eos_token_ids
        return "stop" if is_filled or is_ended else "length"

    def _post(self, text: str, progress: Progress, finish_reason: str | None = None):
        new, self.num_posted = text[self.num_posted :], max(len(text), self.num_posted)
        tokens = self._tokens_before(self.num_posted) if self.has_logprobs else []
        thought = ""
        if self.thinking is not None:
            thought, new = self.thinking.divide(new, is_last=finish_reason is not None)
        draft = None if progress.step is None else self._draft(progress.step)
        if not (new or thought or tokens or draft) and finish_reason is None:
            return
        count = len(self.settled.tokens)
        num_tokens = sum(self.is_blank[:count]) + max(0, count - len(self.is_blank))
        self.post(Piece(self.index, new, thought, finish_reason, num_tokens, progress.num_passes, tokens, draft))

    def _tokens_before(self, end: int) -> list[TokenText]:
        """The tokens that begin before a character of the text and were not posted yet; special ones have no text."""
        tokens, starts = self.settled.tokens, self.settled.starts
        first = self.num_posted_tokens
        while self.num_posted_tokens < len(tokens) and starts[self.num_posted_tokens] < end:
            self.num_posted_tokens += 1
        texts = self.tokenizer.batch_decode(
            [[token] for token in tokens[first : self.num_posted_tokens]], skip_special_tokens=True
        )
        return [
            TokenText(text, logprob_of(self.confidences[place]), starts[place])
            for place, text in enumerate(texts, first)
            if text
        ]

    def _draft(self, step: DenoisingStep) -> dict:
        """The block after a pass: tokens that are committed, and predictions where none is."""
        columns, confidences = step.columns.tolist(), step.confidence.tolist()
        texts = self.tokenizer.batch_decode(step.proposals.unsqueeze(-1))
        is_committed = (step.tokens[step.columns] != self.mask_token_id).tolist()
        return {
            "forward_passes": step.num_forward_passes,
            "tokens": [
                {
                    "position": column - self.prompt.first,
                    "text": text,
                    "confidence": self.request.confidences.get(column) if math.isnan(confidence) else confidence,
                    "is_committed": committed,
                }
                for column, text, confidence, committed in zip(columns, texts, confidences, is_committed, strict=True)
            ],
        }


def logprob_of(confidence: float | None) -> float | None:
    """Natural logarithm of a probability, as JSON can have it."""
    if confidence is None:
        return None
    return max(math.log(confidence), LEAST_LOGPROB) if confidence > 0 else LEAST_LOGPROB
