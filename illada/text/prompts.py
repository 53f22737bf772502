"""A prompt as token ids: by the chat template where there is one, else as plain text."""

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
