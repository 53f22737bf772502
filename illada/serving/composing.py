"""From the body of a request to the texts that are written for it, for the server and for files of requests."""

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from .answers import Choice, Piece
from .errors import ApiError, from_value_error
from .prompts import Prompt, PromptEncoder
from .requests import ChatBody, TextBody
from .worker import TextRequest, Worker


class Composer:
    """Makes requests to a worker of what was asked.

    Args:
        worker: that writes.
        tokenizer: of its model. It is not for several threads, and so neither is this.
    """

    def __init__(self, worker: Worker, tokenizer: PreTrainedTokenizerBase):
        self.worker, self.tokenizer, self.generation_config = worker, tokenizer, worker.generation_config
        own_stop = self.generation_config.stop_strings or []
        self.own_stop_strings = [own_stop] if isinstance(own_stop, str) else list(own_stop)
        self.encoder = PromptEncoder(tokenizer, worker.model.config, self.generation_config, worker.max_tokens)

    def compose(self, body: TextBody, post: Callable[[Piece], None]) -> tuple[list[Prompt], list[TextRequest]]:
        """The prompts, and a request that listens for each text of the answer: `n` of each prompt.

        Nothing is queued yet. `post` is called in the worker's thread.

        Raises:
            ApiError: names the field that cannot be honoured.
        """
        prompts = self.encoder.chat(body) if isinstance(body, ChatBody) else self.encoder.completions(body)
        settings = self._settings(body)
        requests = []
        for prompt in prompts:
            if prompt.max_new_tokens is not None:
                settings = settings | {"max_new_tokens": prompt.max_new_tokens}
            try:
                own = self.worker.prepare(prompt.input_ids, settings, prompt.first, body.n)
            except ValueError as error:
                raise from_value_error(error) from error
            for request in own:
                request.listener = self._choice(len(requests), request, prompt, body, post)
                requests.append(request)
        return prompts, requests

    def _settings(self, body: TextBody) -> dict:
        """Arguments of `generate`, but for the budget."""
        try:
            settings = body.decoding_settings | body.sampling_settings(bool(self.generation_config.do_sample))
        except ValueError as error:
            raise from_value_error(error) from error
        settings["stop_strings"] = None  # a choice knows the text, and cuts it there
        if body.logit_bias:
            settings["sequence_bias"] = self._sequence_bias(body.logit_bias)
        if body.seed is not None:
            settings["seed"] = body.seed % 2**63
        return settings

    def _choice(self, index: int, request: TextRequest, prompt: Prompt, body: TextBody, post) -> Choice:
        config = self.generation_config
        stop = body.stop_strings or self.own_stop_strings
        return Choice(index, request, prompt, self.tokenizer, stop, config.eos_token_ids, config.mask_token_id, post)

    def _sequence_bias(self, logit_bias: dict[str, float]) -> list:
        for token_id in logit_bias:
            if not (token_id.isascii() and token_id.isdigit() and int(token_id) < self.encoder.vocab_size):
                raise ApiError(
                    400,
                    f"`logit_bias` must have token ids below {self.encoder.vocab_size} as keys, got {token_id!r}.",
                    "logit_bias",
                )
        return [[[int(token_id)], float(bias)] for token_id, bias in logit_bias.items()]
