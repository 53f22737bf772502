"""Reads training data: JSONL files and anything that `datasets.load_dataset` takes, every record checked."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets


@dataclass(frozen=True)
class Record:
    """One text to learn.

    Attributes:
        prompt: the messages before the answer; empty for a plain document.
        text: the last message, which the assistant writes, or the whole document.
        place: where it comes from, for messages about it: `chats.jsonl, line 7`.
        field: name of the field that holds it, `messages` or `text`.
    """

    prompt: list[dict[str, str]]
    text: str
    place: str
    field: str


def read_records(source: str) -> Iterator[Record]:
    """Reads the records of a JSONL file, or of a data set's `train` split.

    A record has `messages`, a chat whose last message is the assistant's (the conversational format of `trl` and
    others), or `text`, a plain document. Other fields are ignored, and so are blank lines of a file.

    Args:
        source: path of a `.jsonl` file, or a folder or Hub id for `datasets.load_dataset`.

    Raises:
        ValueError: if the data are absent, empty or wrong; the message names the file, the line and the field.
    """
    is_empty = True
    for place, record in _jsonl(Path(source)) if source.endswith(".jsonl") else _rows(source):
        is_empty = False
        yield _checked(record, place)
    if is_empty:
        raise ValueError(f"{source}: no records, at least one is needed.")


def _jsonl(path: Path) -> Iterator[tuple[str, object]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                yield place, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: not JSON, {error.msg} at column {error.colno}.") from error


def _rows(source: str) -> Iterator[tuple[str, object]]:
    for number, row in enumerate(datasets.load_dataset(source, split="train", streaming=True), start=1):
        yield f"{source}, row {number}", row


def _checked(record: object, place: str) -> Record:
    if not isinstance(record, dict):
        raise ValueError(f"{place}: must be an object with `messages` or `text`, got {type(record).__name__}.")
    if record.get("messages") is not None:
        messages = record["messages"]
        _check_messages(messages, place)
        return Record([dict(message) for message in messages[:-1]], messages[-1]["content"], place, "messages")
    text = record.get("text")
    if text is None:
        raise ValueError(f"{place}: must have `messages` or `text`, got {', '.join(record) or 'no field'}.")
    if not isinstance(text, str) or not text:
        raise ValueError(f"{place}: `text` must be a string that is not empty, got {text!r}.")
    return Record([], text, place, "text")


def _check_messages(messages: object, place: str):
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError(f"{place}: `messages` must be a list of two or more, a prompt and its answer.")
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str) or not message[key]:
                raise ValueError(f"{place}: `messages[{index}].{key}` must be a string that is not empty.")
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{place}: `messages[{len(messages) - 1}].role` must be 'assistant' in the last message, "
            f"got {messages[-1]['role']!r}."
        )
