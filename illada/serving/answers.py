"""What the endpoints give back: texts in the forms of OpenAI's interface, whole or in chunks."""

import time
from dataclasses import dataclass

from .choices import Piece, TokenText
from .prompts import Prompt


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
        request_id (`str`): of the request.
        model (`str`): the model's name.
        has_logprobs (`bool`): whether tokens are shown.
    """

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, request_id: str, model: str, has_logprobs: bool):
        self.head = {"id": f"{self.prefix}-{request_id}", "created": int(time.time()), "model": model}
        self.has_logprobs = has_logprobs

    def whole(self, pieces: list[Piece], usage: Usage) -> dict:
        """The finished answer; each of `pieces` is a whole text."""
        choices = [self._choice(piece, self._text(piece)) for piece in pieces]
        return {**self.head, "object": self.kind, "choices": choices, "usage": usage.as_json()}

    def opening(self, num_choices: int) -> list[dict]:
        """The chunks before the first text."""
        return []

    def chunks(self, piece: Piece) -> list[dict]:
        """What a piece of text adds to the stream."""
        return [self._chunk(piece, self._delta(piece))]

    def closing(self, usage: Usage, has_usage: bool) -> list[dict]:
        """The chunks after the last text."""
        chunk = {**self.head, "object": self.chunk_kind, "choices": [], "usage": usage.as_json()}
        return [chunk] if has_usage else []

    def _chunk(self, piece: Piece, delta: dict) -> dict:
        return {**self.head, "object": self.chunk_kind, "choices": [self._choice(piece, delta)]}

    def _choice(self, piece: Piece, text: dict) -> dict:
        logprobs = self._logprobs(piece.tokens) if self.has_logprobs else None
        draft = {} if piece.draft is None else {"draft": piece.draft}
        return {"index": piece.index, **text, "logprobs": logprobs, "finish_reason": piece.finish_reason, **draft}

    def _logprobs(self, tokens: list[TokenText]) -> dict:
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": None,
            "text_offset": [token.start for token in tokens],
        }

    def _text(self, piece: Piece) -> dict:
        return {"text": piece.text}

    _delta = _text


class ChatForm(CompletionForm):
    """The answer of `/v1/chat/completions`, whole or in chunks."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self, num_choices: int) -> list[dict]:
        role = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk(Piece(index), role) for index in range(num_choices)]

    def _logprobs(self, tokens: list[TokenText]) -> dict:
        content = [
            {
                "token": token.text,
                "logprob": token.logprob,
                "bytes": list(token.text.encode()),
                "top_logprobs": [],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _text(self, piece: Piece) -> dict:
        thought = {"reasoning_content": piece.thought} if piece.thought else {}
        return {"message": {"role": "assistant", "content": piece.text, "refusal": None, **thought}}

    def _delta(self, piece: Piece) -> dict:
        thought = {"reasoning_content": piece.thought} if piece.thought else {}
        return {"delta": {**thought, **({"content": piece.text} if piece.text else {})}}


class Answer:
    """The texts of an answer, put together from their pieces.

    Args:
        form: of the answer.
        prompts: that were asked.
        num_texts (`int`): of the answer.
    """

    def __init__(self, form: CompletionForm, prompts: list[Prompt], num_texts: int):
        self.form, self.texts = form, [Piece(index) for index in range(num_texts)]
        self.num_prompt_tokens = sum(len(prompt.input_ids) for prompt in prompts)
        self.num_open = num_texts

    def add(self, piece: Piece):
        self.texts[piece.index].extend(piece)
        self.num_open -= piece.finish_reason is not None

    @property
    def usage(self) -> Usage:
        """So far."""
        return Usage(
            self.num_prompt_tokens,
            sum(text.num_tokens for text in self.texts),
            sum(text.num_passes for text in self.texts),
        )

    def whole(self) -> dict:
        """The finished answer as JSON."""
        return self.form.whole(self.texts, self.usage)
