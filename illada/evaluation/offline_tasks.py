"""The documents of the offline lm-eval tasks (`tasks/`): held-out examples of the families of the embedded model."""

import re
import zlib

from datasets import Dataset

from ..tiny.corpus import DIFFICULTIES, Example, held_out_examples
from ..tiny.tokenizer import SPECIAL_TOKENS

MASK_TOKEN = SPECIAL_TOKENS[-1]


def documents(families: list[str], num_documents: int, prompt_end: str = "", **metadata) -> dict[str, Dataset]:
    """`num_documents` held-out examples of each family, always the same; the harness's metadata is not used.

    With `prompt_end`, those among them whose prompts end with it.

    A document has the fields of [`Example`] and `masked_text`, its text with one [MASK] for each blank: in the
    families with blanks, each is one token of the embedded model's tokenizer.
    """
    examples = [example for family in families for example in held_out_examples(family, num_documents)]
    asked = [example for example in examples if example.prompt.endswith(prompt_end)]
    rows = [{**vars(example), "masked_text": _mask_blanks(example)} for example in asked]
    return {"test": Dataset.from_list(rows)}


def choice_documents(num_documents: int, **metadata) -> dict[str, Dataset]:
    """Word problems with four worked answers, `choices`, that differ in the last sum, and the right one's index."""
    rows = [
        {**vars(example), **_choices(example.text)} for example in held_out_examples("word_problem", num_documents)
    ]
    return {"test": Dataset.from_list(rows)}


def judge(document: dict, results: list[str]) -> dict[str, float]:
    """`acc` of a generated text, by the rules of the document's family."""
    blanks = tuple((start, end) for start, end in document["blanks"])
    example = Example(document["family"], document["prompt"], document["text"], blanks)
    return {"acc": float(example.is_correct(results[0]))}


def _mask_blanks(example: Example) -> str:
    pieces, end = [], 0
    for start, next_end in example.blanks:
        pieces.append(example.text[end:start])
        end = next_end
    return MASK_TOKEN.join([*pieces, example.text[end:]])


def _choices(text: str) -> dict:
    answer = int(re.search(r"(\d+)\.$", text)[1])
    largest = DIFFICULTIES["easy"].largest_number
    wrong = [number for number in range(answer - 3, answer + 4) if 0 <= number <= largest and number != answer]
    gold = zlib.crc32(text.encode()) % 4
    answers = wrong[:gold] + [answer] + wrong[gold:3]
    choices = [re.sub(r"\d+(\. The answer is )\d+\.$", rf"{number}\g<1>{number}.", text) for number in answers]
    return {"choices": choices, "gold": gold}
