"""From texts to batches: tokenised examples, the windows that they fill, and the collator."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import datasets
import jinja2
import torch
from datasets.exceptions import DatasetGenerationError
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from ..tiny.corpus import Example, training_examples
from .records import Record, read_records

CHUNK = 1024  # examples tokenised together
Encoded = tuple[list[int], int]
"""Token ids of an example, and how many of them are its prompt."""


def encode(tokenizer: PreTrainedTokenizerBase, examples: list[Example] | list[Record]) -> list[Encoded]:
    """Token ids of each example with one EOS at its end, and how many of them are the prompt.

    Messages are written by the chat template. A plain text begins with BOS, which counts as its prompt, like the
    prompt of a plain completion.
    """
    prompts = [_rendered_prompt(tokenizer, example) for example in examples]
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    text_ids = tokenizer([example.text for example in examples], add_special_tokens=False)["input_ids"]
    return [([*p, *t, tokenizer.eos_token_id], len(p)) for p, t in zip(prompt_ids, text_ids)]


def _rendered_prompt(tokenizer: PreTrainedTokenizerBase, example: Example | Record) -> str:
    messages = example.prompt
    if isinstance(example, Example) and messages:
        messages = [{"role": "user", "content": messages}]
    if isinstance(messages, str) or not messages:
        return (tokenizer.bos_token or "") + (messages or "")
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def windows(encoded: Iterable[Encoded], length: int) -> Iterator[dict[str, list]]:
    """Cuts the concatenation of an endless stream of examples into windows of `length` tokens.

    A window begins with an example and ends wherever its length says, so that the end of a canvas tells nothing about
    the end of an answer: a model trained on windows that end with EOS learns to squeeze every answer into the canvas.
    What is left of the last example is dropped.

    Yields:
        `input_ids` and `is_prompt`, two lists of `length`.
    """
    input_ids, is_prompt = [], []
    for ids, prompt_length in encoded:
        input_ids += ids
        is_prompt += _is_prompt(ids, prompt_length)
        if len(input_ids) >= length:
            yield {"input_ids": input_ids[:length], "is_prompt": is_prompt[:length]}
            input_ids, is_prompt = [], []


def pack(encoded: Iterable[Encoded], length: int, isolated: bool) -> Iterator[dict[str, list]]:
    """Cuts the concatenation of all examples into windows of `length` tokens; no token is lost or repeated.

    Windows begin and end wherever their length says. An example that does not end with its window goes on in the next.

    Args:
        encoded: as from [`encode`].
        length: of the windows; the last one may be shorter.
        isolated: whether every example (and every piece of one) is a segment of its own, whose position ids begin at
            0, as in pre-training; otherwise a window is one segment, as in iLLaDA's SFT.

    Yields:
        `input_ids`, `is_prompt` and `position_ids`, lists of equal length.
    """
    window = {"input_ids": [], "is_prompt": [], "position_ids": []}
    for ids, prompt_length in encoded:
        is_prompt = _is_prompt(ids, prompt_length)
        start = 0
        while start < len(ids):
            filled = len(window["input_ids"])
            end = min(len(ids), start + length - filled)
            first_position = 0 if isolated else filled
            window["input_ids"] += ids[start:end]
            window["is_prompt"] += is_prompt[start:end]
            window["position_ids"] += range(first_position, first_position + end - start)
            start = end
            if len(window["input_ids"]) == length:
                yield window
                window = {name: [] for name in window}
    if window["input_ids"]:
        yield window


def one_per_row(encoded: Iterable[Encoded]) -> Iterator[dict[str, list]]:
    """Every example as a row of its own, as in LLaDA's SFT; yields `input_ids`, `is_prompt` and `position_ids`."""
    for ids, prompt_length in encoded:
        yield {
            "input_ids": ids,
            "is_prompt": _is_prompt(ids, prompt_length),
            "position_ids": list(range(len(ids))),
        }


def _is_prompt(ids: list[int], prompt_length: int) -> list[bool]:
    return [True] * prompt_length + [False] * (len(ids) - prompt_length)


def encode_records(
    tokenizer: PreTrainedTokenizerBase, source: str, vocab_size: int, mask_token_id: int, max_length: int | None
) -> Iterator[Encoded]:
    """Reads, tokenises and checks the records of `source` (see [`read_records`]).

    Args:
        tokenizer: with a chat template, if the records are chats.
        source: a file or a data set.
        vocab_size: of the model.
        mask_token_id: id of [MASK], which must not occur in clean text.
        max_length: tokens that an example may have, EOS included; `None` if it may be cut.

    Raises:
        ValueError: if a record cannot be learnt; the message names the file, the line and the field.
    """
    records = read_records(source)
    while chunk := list(itertools.islice(records, CHUNK)):
        for record, (ids, prompt_length) in zip(chunk, _encode_checked(tokenizer, chunk)):
            place = f"{record.place}: `{record.field}`"
            if max(ids) >= vocab_size:
                raise ValueError(f"{place} holds token {max(ids)}, the model's vocabulary ends at {vocab_size - 1}.")
            if mask_token_id in ids:
                raise ValueError(f"{place} holds the mask token {mask_token_id}, which clean text must not.")
            if max_length is not None and len(ids) > max_length:
                raise ValueError(f"{place} has {len(ids)} tokens, at most {max_length} fit: shorten it.")
            yield ids, prompt_length


def _encode_checked(tokenizer: PreTrainedTokenizerBase, records: list[Record]) -> list[Encoded]:
    try:
        return encode(tokenizer, records)
    except (jinja2.TemplateError, ValueError):
        for record in records:  # which one was it?
            try:
                encode(tokenizer, [record])
            except (jinja2.TemplateError, ValueError) as error:
                raise ValueError(
                    f"{record.place}: `{record.field}` does not fit the chat template: {error}"
                ) from error
        raise


def build_dataset(
    rows: Callable[..., Iterator[dict[str, list]]], streaming: bool = False, **arguments
) -> datasets.Dataset | datasets.IterableDataset:
    """A data set of the rows that `rows(**arguments)` yields, in the cache of `datasets` or streamed.

    The cache is found by `rows` and `arguments`: what `rows` reads and they do not show must be named by one of them,
    as by [`data_version`].

    Raises:
        ValueError: as raised by `rows`, which `datasets` would wrap in an error of its own.
    """
    if streaming:
        return datasets.IterableDataset.from_generator(rows, gen_kwargs=arguments)
    try:
        return datasets.Dataset.from_generator(rows, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None


class CorpusWindows(IterableDataset):
    """Windows over the endless stream of training examples; every iteration from the start gives the same.

    The stream cannot be divided: with several loader workers the first one reads it, and the others have nothing.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        seed: int,
        difficulty: str = "easy",
        opening: Mapping[str, int] | None = None,
    ):
        self.tokenizer, self.length, self.seed = tokenizer, length, seed
        self.difficulty, self.opening = difficulty, opening

    def __iter__(self) -> Iterator[dict[str, list]]:
        worker = get_worker_info()
        if worker is not None and worker.id > 0:
            return
        examples = training_examples(self.seed, self.difficulty, self.opening)
        chunks = (list(itertools.islice(examples, CHUNK)) for _ in itertools.count())
        encoded = itertools.chain.from_iterable(encode(self.tokenizer, chunk) for chunk in chunks)
        yield from windows(encoded, self.length)


@dataclass
class MaskedDiffusionCollator:
    """Makes a clean batch of rows of a data set; [`MaskedDiffusionTrainer`] adds the noise.

    Args:
        pad_token_id: fills short rows. EOS for LLaDA's SFT.
        learn_padding: whether the padding belongs to the text, and is learnt (LLaDA's SFT); otherwise it has no label
            and nobody sees it.
        pad_to_multiple_of: of the rows' common length.
    """

    pad_token_id: int
    learn_padding: bool = False
    pad_to_multiple_of: int = 1

    def __call__(self, features: list[dict[str, list]]) -> dict[str, torch.Tensor]:
        """Returns `input_ids`, `labels`, `position_ids` and `is_prompt`, each (B, S).

        A feature must have `input_ids`. Without `position_ids` a row is one segment, and without `is_prompt` it has no
        prompt; other fields are ignored.

        `labels` are the clean tokens, -100 at padding that is not learnt. A token of such padding is a segment of its
        own, for its position id is 0.
        """
        lengths = torch.tensor([len(feature["input_ids"]) for feature in features])
        length = -(-int(lengths.max()) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        columns = torch.arange(length).expand(len(features), -1)
        is_padding = columns >= lengths.unsqueeze(1)
        input_ids = _padded(features, "input_ids", length, self.pad_token_id)
        position_ids = (
            _padded(features, "position_ids", length, 0) if "position_ids" in features[0] else columns.clone()
        )
        return {
            "input_ids": input_ids,
            "labels": input_ids.clone() if self.learn_padding else input_ids.masked_fill(is_padding, -100),
            "position_ids": torch.where(is_padding, columns if self.learn_padding else 0, position_ids),
            "is_prompt": _padded(features, "is_prompt", length, False)
            if "is_prompt" in features[0]
            else torch.zeros_like(is_padding),
        }


def _padded(features: list[dict[str, list]], name: str, length: int, value: int | bool) -> torch.Tensor:
    rows = pad_sequence([torch.tensor(feature[name]) for feature in features], batch_first=True, padding_value=value)
    return torch.nn.functional.pad(rows, (0, length - rows.shape[1]), value=value)
