"""Checks of one setting each: a `ValueError` that names the field, its value and what is allowed; `None` is unset."""

import math
from collections.abc import Callable, Iterable
from typing import Any


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_integer(name: str, value: Any, minimum: int):
    if value is not None and not (is_integer(value) and value >= minimum):
        raise ValueError(f"`{name}` must be an integer of at least {minimum}, got {value!r}.")


def check_flag(name: str, value: Any):
    if not isinstance(value, (bool, type(None))):
        raise ValueError(f"`{name}` must be True or False, got {value!r}.")


def check_choice(name: str, value: Any, choices: Iterable[str]):
    if value is not None and value not in tuple(choices):
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_number(name: str, value: Any, allowed: str, is_allowed: Callable[[float], bool]):
    if value is None:
        return
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not (is_number and is_allowed(value)):
        raise ValueError(f"`{name}` must be a number {allowed}, got {value!r}.")


def check_token_ids(name: str, value: Any, may_be_empty: bool = True):
    if value is not None and not (_are_token_ids(value) and (value or may_be_empty)):
        raise ValueError(f"`{name}` must be a list of token ids, got {value!r}.")


def check_strings(name: str, value: Any):
    strings = [value] if isinstance(value, str) else value
    if value is not None and not (
        isinstance(strings, (list, tuple)) and strings and all(isinstance(text, str) and text for text in strings)
    ):
        raise ValueError(f"`{name}` must be a string or a list of strings, none empty, got {value!r}.")


def check_bad_words(name: str, value: Any):
    """Lists of one token each."""
    if value is None:
        return
    are_words = isinstance(value, list) and all(isinstance(word, list) and _are_token_ids(word) for word in value)
    if not (value and are_words):
        raise ValueError(f"`{name}` must be a list of lists of one token id, not empty, got {value!r}.")
    for word in value:
        _check_single(name, word)


def check_token_biases(name: str, value: Any):
    """`{(token,): bias}` or `[[[token], bias], ...]`, as Transformers has them."""
    if value is None:
        return
    is_list = isinstance(value, list) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value)
    pairs = value.items() if isinstance(value, dict) else value if is_list else ()
    tokens_type = tuple if isinstance(value, dict) else list
    if not pairs or not all(isinstance(tokens, tokens_type) and _are_token_ids(tokens) for tokens, _ in pairs):
        raise ValueError(
            f"`{name}` must be {{(token id,): bias}} or [[[token id], bias], ...], not empty, got {value!r}."
        )
    for tokens, bias in pairs:
        _check_single(name, tokens)
        if not (isinstance(bias, float) and bias < math.inf):
            raise ValueError(f"`{name}` must have biases that are floats below infinity, got {bias!r} for {tokens}.")


def _are_token_ids(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(is_integer(token_id) and token_id >= 0 for token_id in value)


def _check_single(name: str, tokens: list[int] | tuple[int, ...]):
    if len(tokens) != 1:
        raise ValueError(
            f"`{name}` must have sequences of one token, got {tokens}: a longer one depends on the tokens before its "
            "last, which may be written later."
        )
