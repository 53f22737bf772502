"""Writing blanks into text: `<[MASK]>` is a blank of one token, `<[MASK]*4>` one of four."""

import re

from transformers import PreTrainedTokenizerBase

_BLANK = re.compile(r" ?<\[MASK\](?:\*(\d+))?>")
MAX_BLANK_TOKENS = 2**20
"""The most that the blanks of a text may have together: a few characters can ask for any number."""


def check_blanks(text: str):
    """Raises a `ValueError` if `text` has no blank, or one of no tokens."""
    if not _BLANK.search(text):
        raise ValueError(f"`text` must contain a blank such as <[MASK]> or <[MASK]*4>, got {text!r}.")
    spell_blanks(text, "")


def encode_with_blanks(tokenizer: PreTrainedTokenizerBase, text: str, mask_token_id: int) -> list[int]:
    """Token ids of `text`, begun with BOS if the tokenizer has one, in which each blank is so many [MASK] ids.

    The space before a blank belongs to the blank, since tokens of byte-level vocabularies begin with their space.

    Raises:
        ValueError: if `text` has no blank, one of no tokens, or more than `MAX_BLANK_TOKENS` of them.
    """
    check_blanks(text)
    input_ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    pieces = _BLANK.split(text)  # text, length, text, length, ..., text
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            input_ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
        else:
            input_ids += [mask_token_id] * _length(piece, text)
    return input_ids


def spell_blanks(text: str, mask_token: str) -> str:
    """`text` with each blank written as so many `mask_token`, for a tokenizer that knows it as one token.

    Raises:
        ValueError: if a blank has no tokens, or all of them have more than `MAX_BLANK_TOKENS`.
    """
    if sum(blank_lengths(text)) > MAX_BLANK_TOKENS:
        raise ValueError(f"The blanks of a text must have at most {MAX_BLANK_TOKENS} tokens.")

    def spelled(blank: re.Match) -> str:
        return mask_token * _length(blank[1], text)

    return _BLANK.sub(spelled, text)


def blank_lengths(text: str) -> list[int]:
    """How many tokens each blank of `text` has, in order."""
    return [_length(blank[1], text) for blank in _BLANK.finditer(text)]


def cut_at_blanks(text: str) -> list[str]:
    """The pieces of `text` around its blanks, each with the space that is before a blank."""
    ends = [blank.end() for blank in _BLANK.finditer(text)]
    starts = [text.index("<", blank.start()) for blank in _BLANK.finditer(text)]
    return [text[begin:end] for begin, end in zip([0, *ends], [*starts, len(text)], strict=True)]


def fill_blanks(
    tokenizer: PreTrainedTokenizerBase, text: str, input_ids: list[int], filled_ids: list[int], mask_token_id: int
) -> str:
    """`text` with the tokens that were written into its blanks.

    Args:
        input_ids (`list[int]`): the prompt that contains the text, with `mask_token_id` for the tokens of its blanks.
        filled_ids (`list[int]`): the same prompt after the blanks were filled.
    """
    written = iter([new for old, new in zip(input_ids, filled_ids, strict=True) if old == mask_token_id])

    def filled(blank: re.Match) -> str:
        return tokenizer.decode([next(written) for _ in range(_length(blank[1], text))], skip_special_tokens=True)

    return _BLANK.sub(filled, text)


def _length(digits: str | None, text: str) -> int:
    length = int((digits or "1")[:10])  # more digits than these are too many tokens in any case
    if length < 1:
        raise ValueError(f"A blank must have at least one token, got {length} in {text!r}.")
    return length
