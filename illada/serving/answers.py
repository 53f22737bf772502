"""What the endpoints give back: settled tokens as text, and text in the forms of OpenAI's interface."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from .prompts import Prompt
from .requests import ChatBody, TextBody
from .worker import Progress, TextRequest


@dataclass
class Piece:
    """Text that one choice of an answer goes on with.

    Attributes:
        index (`int`): of the choice.
        text (`str`): what follows the text so far; may be empty.
        finish_reason (`str`, *optional*): with the last piece, `"stop"` or `"length"`.
        num_tokens (`int`), num_passes (`int`): tokens written, and forward passes made, so far.
        error (`Exception`, *optional*): what ended the choice early.
    """

    index: int
    text: str
    finish_reason: str | None = None
    num_tokens: int = 0
    num_passes: int = 0
    error: Exception | None = None


class Choice:
    """One text of an answer: hears of settled tokens in the worker's thread, and posts settled text.

    Args:
        request: that this listens to; it is cancelled when a stop string is complete.
        prompt: that the request was made of.
        stop: strings that end the text, which they are not part of. The answer alone is searched.
        eos_token_ids: of the model.
        mask_token_id: of the model.
        post: is handed each [`Piece`]; may be called from any thread.
    """

    def __init__(
        self,
        index: int,
        request: TextRequest,
        prompt: Prompt,
        tokenizer: PreTrainedTokenizerBase,
        stop: list[str],
        eos_token_ids: list[int],
        mask_token_id: int,
        post: Callable[[Piece], None],
    ):
        self.index, self.request, self.prompt, self.stop, self.post = index, request, prompt, stop, post
        self.eos_token_ids = eos_token_ids
        # An answer that shows the prompt has these tokens before those that a stop string may end.
        self.num_given = 0 if prompt.end is not None else len(prompt.input_ids) - prompt.first
        self.is_blank = [token == mask_token_id for token in prompt.input_ids[prompt.first :]]
        self.settled = SettledText(tokenizer)
        self.num_posted = 0  # characters

    def __call__(self, progress: Progress):
        if progress.error is not None:
            return self.post(Piece(self.index, "", error=progress.error))
        searched = len(self.settled.text) - max(map(len, self.stop), default=1) + 1
        self.settled.append(self._shown(progress.new_tokens))
        if progress.is_finished:
            self.settled.finish()
        text = self.settled.text
        searched = max(searched, self.settled.length_of(self.num_given))
        stops = [place for string in self.stop if (place := text.find(string, searched)) >= 0]
        if stops:
            self.request.cancel()
            self._post(text[: min(stops)], progress, "stop")
        elif progress.is_finished:
            self._post(text, progress, self._finish_reason())
        else:
            self._post(text[: len(text) - self._num_held_back(text)], progress)

    def _shown(self, new_tokens: list[int]) -> list[int]:
        if self.prompt.end is None:
            return new_tokens
        return new_tokens[: self.prompt.end - self.prompt.first - len(self.settled.tokens)]

    def _finish_reason(self) -> str:
        is_filled = self.prompt.max_new_tokens == 0
        is_ended = self.settled.tokens and self.settled.tokens[-1] in self.eos_token_ids
        return "stop" if is_filled or is_ended else "length"

    def _num_held_back(self, text: str) -> int:
        """Characters at the end that a stop string may begin with."""
        lengths = (
            length for string in self.stop for length in range(1, len(string)) if text.endswith(string[:length])
        )
        return max(lengths, default=0)

    def _post(self, text: str, progress: Progress, finish_reason: str | None = None):
        piece, self.num_posted = text[self.num_posted :], max(len(text), self.num_posted)
        if not piece and finish_reason is None:
            return
        count = len(self.settled.tokens)
        num_tokens = sum(self.is_blank[:count]) + max(0, count - len(self.is_blank))
        self.post(Piece(self.index, piece, finish_reason, num_tokens, progress.num_passes))


class SettledText:
    """Text of tokens that come one by one, without half characters and without special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.tokens, self.text = tokenizer, [], ""
        self._start = self._end = 0  # tokens whose text is known, and which the next ones are decoded with

    def append(self, new_tokens: list[int]):
        self.tokens += new_tokens
        known, longer = self._decode(self.tokens[self._start : self._end]), self._decode(self.tokens[self._start :])
        if len(longer) > len(known) and not longer.endswith("\ufffd"):
            self.text += longer[len(known) :]
            self._start, self._end = self._end, len(self.tokens)

    def finish(self):
        self.text = self._decode(self.tokens)

    def length_of(self, num_tokens: int) -> int:
        """Characters of the first tokens."""
        return len(self._decode(self.tokens[:num_tokens]))

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


@dataclass
class Usage:
    """Tokens and passes of an answer."""

    prompt_tokens: int
    completion_tokens: int
    forward_passes: int

    def as_json(self) -> dict:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "forward_passes": self.forward_passes,
            "tokens_per_forward": round(self.completion_tokens / max(self.forward_passes, 1), 3),
        }


class CompletionForm:
    """The answer of `/v1/completions`, whole or in chunks.

    Args:
        request_id (`str`): of the answer.
        model (`str`): the model's name.
    """

    kind, chunk_kind = "text_completion", "text_completion"

    def __init__(self, request_id: str, model: str):
        self.head = {"id": request_id, "created": int(time.time()), "model": model}

    def whole(self, texts: list[str], finish_reasons: list[str], usage: Usage) -> dict:
        choices = [
            {"index": index, **self._text(text), "logprobs": None, "finish_reason": reason}
            for index, (text, reason) in enumerate(zip(texts, finish_reasons, strict=True))
        ]
        return {**self.head, "object": self.kind, "choices": choices, "usage": usage.as_json()}

    def opening(self, num_choices: int) -> list[dict]:
        """The chunks before the first text."""
        return []

    def chunk(self, piece: Piece) -> dict:
        return self._chunk(piece.index, self._delta(piece.text), piece.finish_reason)

    def usage_chunk(self, usage: Usage) -> dict:
        return {**self.head, "object": self.chunk_kind, "choices": [], "usage": usage.as_json()}

    def _chunk(self, index: int, delta: dict, finish_reason: str | None) -> dict:
        choice = {"index": index, **delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self.head, "object": self.chunk_kind, "choices": [choice]}

    def _text(self, text: str) -> dict:
        return {"text": text}

    _delta = _text


class ChatForm(CompletionForm):
    """The answer of `/v1/chat/completions`, whole or in chunks."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def opening(self, num_choices: int) -> list[dict]:
        role = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk(index, role, None) for index in range(num_choices)]

    def _text(self, text: str) -> dict:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict:
        return {"delta": {"content": text} if text else {}}


def form_of(body: TextBody, request_id: str, model: str) -> CompletionForm:
    """The form in which a request is answered."""
    if isinstance(body, ChatBody):
        return ChatForm(f"chatcmpl-{request_id}", model)
    return CompletionForm(f"cmpl-{request_id}", model)


class Answer:
    """The texts of an answer, put together from their pieces.

    Args:
        form: of the answer.
        prompts: that were asked.
        num_texts (`int`): of the answer.
    """

    def __init__(self, form: CompletionForm, prompts: list[Prompt], num_texts: int):
        self.form, self.texts = form, [""] * num_texts
        self.num_prompt_tokens = sum(len(prompt.input_ids) for prompt in prompts)
        self.last: dict[int, Piece] = {}  # of each text
        self.num_open = num_texts

    def add(self, piece: Piece):
        self.texts[piece.index] += piece.text
        self.last[piece.index] = piece
        self.num_open -= piece.finish_reason is not None

    @property
    def usage(self) -> Usage:
        """So far."""
        pieces = self.last.values()
        return Usage(
            self.num_prompt_tokens,
            sum(piece.num_tokens for piece in pieces),
            sum(piece.num_passes for piece in pieces),
        )

    def whole(self) -> dict:
        """The finished answer as JSON."""
        reasons = [self.last[index].finish_reason for index in range(len(self.texts))]
        return self.form.whole(self.texts, reasons, self.usage)
