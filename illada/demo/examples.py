"""What a visitor can try on the embedded model: texts from its corpus that training never saw."""

import re

from huggingface_hub import ModelCard
from transformers import PreTrainedTokenizerBase

from ..tiny import EMBEDDED_MODEL
from ..tiny.corpus import FAMILIES, Example, held_out_examples


def _held_out() -> list[Example]:
    return [example for family in FAMILIES for example in held_out_examples(family, 6)]


def prompts() -> list[str]:
    """Two messages of each family that has any."""
    return [example.prompt for example in _held_out()[::3] if example.prompt]


def texts_with_blanks(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Two documents of each family that has any, with the blanks that a test of the model removes."""
    return [with_blanks(tokenizer, example) for example in _held_out()[::3] if not example.prompt]


def with_blanks(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """The example's text with blanks such as `<[MASK]*4>` in place of what a test removes."""
    text = example.text
    for start, end in reversed(example.blanks):
        text = f"{text[:start]}{blank(tokenizer, text[start:end])}{text[end:]}"
    return text


def blank(tokenizer: PreTrainedTokenizerBase, passage: str) -> str:
    """The blank of as many tokens as the passage has."""
    count = len(tokenizer.tokenize(passage))
    return "<[MASK]>" if count == 1 else f"<[MASK]*{count}>"


def spoiled_texts() -> list[str]:
    """Documents of which one number follows from the rest, and is written wrong by one."""
    spoiled = []
    for example in _held_out():
        (start, end), is_only = example.blanks[0], len(example.blanks) == 1
        number = example.text[start:end].strip()
        if is_only and not example.prompt and number.isdigit():
            spoiled.append(f"{example.text[:start]} {int(number) + 1}{example.text[end:]}")
    return spoiled


def measured_accuracy() -> str:
    """The figures of the model's card, in Markdown."""
    card = ModelCard.load(EMBEDDED_MODEL / "README.md").text
    return re.search(r"## Figures\s+(.*?)(?=\n## |\Z)", card, flags=re.DOTALL)[1]
