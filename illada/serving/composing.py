"""From the body of a request to the texts that are written for it, for the server and for files of requests."""

import functools
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from ..text.prompts import turn_segments
from .choices import Choice, Piece
from .errors import ApiError, from_value_error
from .fields import WritingFields
from .prompts import Prompt, PromptEncoder
from .requests import ChatBody, TextBody
from .settled import THINK_BEGIN, THINK_END, Thinking
from .worker import TextRequest, Worker


class Composer:
    """Makes requests to a worker of what was asked.

    Args:
        worker: that writes.
        tokenizer: of its model. It is not for several threads, and so neither is this.
        max_prompt_tokens (`int`, *optional*): of the longest prompt; if absent, as far as the context goes.
    """

    def __init__(self, worker: Worker, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int | None = None):
        self.worker, self.tokenizer, self.generation_config = worker, tokenizer, worker.generation_config
        own_stop = self.generation_config.stop_strings or []
        self.own_stop_strings = [own_stop] if isinstance(own_stop, str) else list(own_stop)
        self.encoder = PromptEncoder(tokenizer, worker.model.config, self.generation_config, worker.max_tokens)
        self.encoder.max_prompt_tokens = max_prompt_tokens
        vocabulary = tokenizer.get_vocab()
        self.may_think = THINK_END in vocabulary or THINK_END in str(tokenizer.chat_template)

    def compose(self, body: TextBody, post: Callable[[Piece], None]) -> tuple[list[Prompt], list[TextRequest]]:
        """The prompts, and a request that listens for each text of the answer: `n` of each prompt.

        Nothing is queued yet. `post` is called in the worker's thread.

        Raises:
            ApiError: names the field that cannot be honoured.
        """
        prompts = self.encoder.chat(body) if isinstance(body, ChatBody) else self.encoder.completions(body)
        settings = self.settings(body)
        requests = []
        for prompt in prompts:
            if prompt.max_new_tokens is not None:
                settings = settings | {"max_new_tokens": prompt.max_new_tokens}
            for request in self.prepare(prompt, settings, body.n):
                request.shows_drafts = body.has_drafts
                request.listener = self._choice(len(requests), request, prompt, body, post)
                requests.append(request)
        return prompts, requests

    def prepare(self, prompt: Prompt, settings: dict, count: int = 1) -> list[TextRequest]:
        """Requests for `count` texts on a prompt, not queued yet.

        Raises:
            ApiError: names the setting that cannot be honoured.
        """
        segment = None
        if prompt.messages is not None:
            segment = functools.partial(turn_segments, self.tokenizer, prompt.messages, prompt.input_ids)
        try:
            return self.worker.prepare(prompt.input_ids, settings, prompt.first, count, segment)
        except ValueError as error:
            raise from_value_error(error) from error

    def settings(self, body: WritingFields) -> dict:
        """Arguments of `generate`, but for the budget."""
        try:
            settings = body.decoding_settings | body.sampling_settings(bool(self.generation_config.do_sample))
        except ValueError as error:
            raise from_value_error(error) from error
        settings["stop_strings"] = None  # a choice knows the text, and cuts it there
        if body.logit_bias:
            settings["sequence_bias"] = self._sequence_bias(body.logit_bias)
        return settings

    def _choice(self, index: int, request: TextRequest, prompt: Prompt, body: TextBody, post) -> Choice:
        stop = body.stop_strings or self.own_stop_strings
        thinking = self._thinking(request, prompt) if isinstance(body, ChatBody) else None
        return Choice(index, request, prompt, self.tokenizer, stop, thinking, body.has_logprobs, post)

    def _thinking(self, request: TextRequest, prompt: Prompt) -> Thinking | None:
        """What divides a chat answer, where the checkpoint has `</think>`.

        It begins in thought if the prompt ends with `<think>`, or if the settings say what ends the thinking and the
        prompt has not ended it already.
        """
        end_ids = request.request.denoiser.config.end_think_token_ids
        if not (end_ids or self.may_think):
            return None
        end = self.tokenizer.decode(end_ids).strip() if end_ids else THINK_END
        before = self.tokenizer.decode(prompt.input_ids[-32:]).rstrip()
        return Thinking(before.endswith(THINK_BEGIN) or bool(end_ids) and not before.endswith(end), end)

    def _sequence_bias(self, logit_bias: dict[str, float]) -> list:
        for token_id in logit_bias:
            if not (token_id.isascii() and token_id.isdigit() and int(token_id) < self.encoder.vocab_size):
                raise ApiError(
                    400,
                    f"`logit_bias` must have token ids below {self.encoder.vocab_size} as keys, got {token_id!r}.",
                    "logit_bias",
                )
        return [[[int(token_id)], float(bias)] for token_id, bias in logit_bias.items()]
