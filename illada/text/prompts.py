"""A prompt as token ids: by the chat template where there is one, else as plain text."""

from itertools import pairwise

from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict], chat: bool | None = None) -> list[int]:
    """Token ids of a prompt that a response is to follow.

    Args:
        prompt (`str` or `list[dict]`): one message or a text to continue, or the messages of a conversation, each
            with `role` and `content`.
        chat (`bool`, *optional*): whether to use the chat template; if absent, whether the tokenizer has one. Without
            it, a conversation is its last message's text.

    Raises:
        ValueError: if `chat` is true and the tokenizer has no chat template.
    """
    if chat is None:
        chat = tokenizer.chat_template is not None
    if not chat:
        return tokenizer(prompt if isinstance(prompt, str) else prompt[-1]["content"])["input_ids"]
    if tokenizer.chat_template is None:
        raise ValueError("`chat` needs a checkpoint with a chat template, and this one has none.")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def turn_segments(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], input_ids: list[int], block_length: int
) -> list[int]:
    """Lengths of the segments of a conversation's prompt, `prompt_segments` of `generate`: a function of the messages.

    Each answer is cut into blocks of `block_length` tokens, from where it was to begin, as it was written; what is
    between two answers is one segment, and so is what follows the last (which is not in the list). An answer that the
    chat template renders in another way once it is not the last is not cut.

    Args:
        messages (`list[dict]`): that `input_ids` are the prompt of, by the chat template.
    """
    ends = [0]
    for index, message in enumerate(messages):
        if index == 0 or message["role"] != "assistant":
            continue
        start, end = (
            tokenizer.apply_chat_template(messages[:count], add_generation_prompt=is_open, return_dict=False)
            for count, is_open in ((index, True), (index + 1, False))
        )
        if ends[-1] < len(start) < len(end) and input_ids[: len(end)] == end and end[: len(start)] == start:
            ends += [*range(len(start), len(end), block_length), len(end)]
    return [end - start for start, end in pairwise(ends) if end > start]


def sent_messages(messages: list[dict], config: PreTrainedConfig) -> list[dict]:
    """The messages that a checkpoint is sent for an answer to the last one.

    All of them, or, if the checkpoint's `config.single_turn` says that it never saw a conversation, the system message
    and the last message.

    Args:
        messages (`list[dict]`): each with `role` and `content`.
    """
    if not getattr(config, "single_turn", False):
        return messages
    return [message for message in messages[:-1] if message["role"] == "system"] + messages[-1:]
