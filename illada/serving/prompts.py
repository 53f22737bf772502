"""Token ids of a request, and which of them its answer shows."""

from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..generation_config import MaskedDiffusionGenerationConfig
from ..prompts import DEFAULT_MAX_NEW_TOKENS
from ..text.blanks import spell_blanks
from ..text.prompts import encode_prompt, sent_messages
from .errors import ApiError
from .requests import ChatBody, CompletionBody, TextBody


@dataclass
class Prompt:
    """What the model is asked to write on.

    Attributes:
        input_ids (`list[int]`): the text so far, in which each [MASK] is a blank to fill.
        first (`int`): where the answer begins.
        end (`int`, *optional*): where it ends; if absent it is continued, by `max_new_tokens` at most.
        max_new_tokens (`int`, *optional*): if absent, as many as the checkpoint says.
        messages (`list[dict]`, *optional*): of which the text was made by the chat template.
    """

    input_ids: list[int]
    first: int
    end: int | None = None
    max_new_tokens: int | None = None
    messages: list[dict] | None = None


class PromptEncoder:
    """Encodes requests for one model.

    Args:
        max_tokens (`int`, *optional*): the most that a prompt and its answer may have together, if the server sets a
            limit below the model's positions.

    Raises:
        ApiError: names the field of the request that cannot be honoured.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        generation_config: MaskedDiffusionGenerationConfig,
        max_tokens: int | None = None,
    ):
        self.tokenizer, self.generation_config = tokenizer, generation_config
        self.config = config
        self.mask_token_id = generation_config.mask_token_id
        self.vocab_size, self.num_positions = config.vocab_size, config.max_position_embeddings
        self.max_prompt_tokens: int | None = None
        self.limit = f"the model has {self.num_positions} positions"
        if max_tokens is not None and max_tokens < self.num_positions:
            self.num_positions, self.limit = max_tokens, f"this server takes {max_tokens} tokens at a time"

    def chat(self, body: ChatBody) -> list[Prompt]:
        """The conversation by the chat template."""
        if self.tokenizer.chat_template is None:
            raise ApiError(400, "This model has no chat template: ask /v1/completions.", "messages")
        messages = sent_messages([message.for_template() for message in body.messages], self.config)
        try:
            input_ids = encode_prompt(self.tokenizer, messages, chat=True)
        except TemplateError as error:
            raise ApiError(400, f"The model's chat template refuses the messages: {error}.", "messages") from error
        if self.mask_token_id in input_ids:
            raise ApiError(400, "`messages` must not have a blank, [MASK]: /v1/completions fills blanks.", "messages")
        budget = self._budget(body, len(input_ids))
        return [Prompt(input_ids, len(input_ids), max_new_tokens=budget, messages=messages)]

    def completions(self, body: CompletionBody) -> list[Prompt]:
        """Each prompt of the request."""
        return [self._between(body, prompt) if body.suffix else self._after(body, prompt) for prompt in body.prompts]

    def _after(self, body: CompletionBody, prompt: str | list[int]) -> Prompt:
        """A prompt that is continued. Blanks in it are filled first, and then the answer is the whole text."""
        input_ids = self._encode(prompt)
        budget = self._budget(body, len(input_ids))
        has_blanks = self.mask_token_id in input_ids
        if budget == 0 and not has_blanks:
            raise ApiError(400, "`max_tokens` must be above 0 for a prompt without blanks, got 0.", "max_tokens")
        if has_blanks and body.echo is False:
            raise ApiError(400, "`echo` must not be false for a prompt with blanks: they would be lost.", "echo")
        return Prompt(input_ids, 0 if has_blanks or body.echo else len(input_ids), max_new_tokens=budget)

    def _between(self, body: CompletionBody, prompt: str | list[int]) -> Prompt:
        """A blank of `max_tokens` between prompt and suffix; it is the answer."""
        before, after = self._encode(prompt), self._tokenize(body.suffix, "suffix", add_special_tokens=False)
        if self.mask_token_id in before + after:
            raise ApiError(400, "`suffix` needs a prompt without blanks: the blank is between the two.", "suffix")
        if body.echo:
            raise ApiError(400, "`echo` must not be true with `suffix`.", "echo")
        self._budget(body, len(before) + len(after))
        end = len(before) + body.max_tokens
        return Prompt([*before, *[self.mask_token_id] * body.max_tokens, *after], len(before), end, 0)

    def _encode(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, list) and max(prompt) >= self.vocab_size:
            reason = f"`prompt` must have token ids below {self.vocab_size}, got {max(prompt)}."
            raise ApiError(400, reason, "prompt")
        input_ids = prompt if isinstance(prompt, list) else self._tokenize(prompt, "prompt")
        if not input_ids:
            raise ApiError(400, "`prompt` must have some text, got none.", "prompt")
        return input_ids

    def _tokenize(self, text: str, name: str, **settings) -> list[int]:
        try:
            spelled = spell_blanks(text, self.tokenizer.convert_ids_to_tokens(self.mask_token_id))
        except ValueError as error:
            raise ApiError(400, f"`{name}`: {error}", name) from error
        return self.tokenizer(spelled, **settings)["input_ids"]

    def check_length(self, num_tokens: int, field: str, min_room: int = 0) -> int:
        """How many tokens there is room for after a prompt of so many.

        Raises:
            ApiError: names the field, if the prompt is too long.
        """
        room = self.num_positions - num_tokens
        reason = None
        if self.max_prompt_tokens is not None and num_tokens > self.max_prompt_tokens:
            reason = f"`{field}` must have at most {self.max_prompt_tokens} tokens, got {num_tokens}."
        elif room < min_room:
            reason = f"`{field}` has {num_tokens} tokens, and {self.limit}."
        if reason is not None:
            raise ApiError(400, reason, field, "context_length_exceeded")
        return room

    def _budget(self, body: TextBody, prompt_length: int) -> int | None:
        """What the response may add to a prompt of so many tokens."""
        name, budget = body.budget
        field = "messages" if isinstance(body, ChatBody) else "prompt"
        room = self.check_length(prompt_length, field, 0 if budget == 0 else 1)
        if budget is not None and budget > room:
            raise ApiError(
                400,
                f"`{name}` must be at most {room}, got {budget}: {self.limit}, and the prompt takes {prompt_length}.",
                name,
                "context_length_exceeded",
            )
        if budget == 0 and isinstance(body, ChatBody):
            raise ApiError(400, f"`{name}` must be above 0, got 0.", name)
        own = self.generation_config.max_new_tokens
        if own is None and self.generation_config.max_length is None:
            own = DEFAULT_MAX_NEW_TOKENS
        return room if budget is None and own is not None and own > room else budget
