"""Reads training data, files and data sets, in the shapes that are common, and checks every record."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import pandas
import pyarrow
import pyarrow.parquet
from huggingface_hub import HfApi

from ..text.loading import HUB_ID


@dataclass(frozen=True)
class Record:
    """One text to learn.

    Attributes:
        prompt: what stands before the text: messages, for the chat template, or plain text; empty for a document.
        text: what is learnt: the last message, which is the assistant's, a completion or a whole document.
        place: where it comes from, for messages about it: `chats.jsonl, line 7`.
        field: name of the fields that hold it, such as `messages` or `text`.
    """

    prompt: list[dict[str, str]] | str
    text: str
    place: str
    field: str


# Where records come from


def locate_data(source: str, argument: str = "source") -> str:
    """`source` itself, if it can be read: an existing file of a known kind, a folder, or an id on the Hub.

    Args:
        argument: what errors call it.

    Raises:
        ValueError: if it can be none of them.
    """
    path = Path(source)
    kinds = f"a {', '.join(FILES)} file, a data set's folder or its Hub id"
    if path.suffix in FILES:
        if not path.is_file():
            raise ValueError(f"`{argument}` must be {kinds}: {source}: no such file.")
    elif path.is_file() or not (path.is_dir() or HUB_ID.fullmatch(source)):
        raise ValueError(f"`{argument}` must be {kinds}, got {source!r}.")
    return source


def data_version(source: str) -> str:
    """A name of what `source` contains now: it changes with any of its files, or with the commit on the Hub."""
    path = Path(source)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = [Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names]
    else:
        return str(HfApi().dataset_info(source).sha)
    stats = sorted((str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def read_records(source: str) -> Iterator[Record]:
    """Reads the records of a file, or of a data set's `train` split.

    | fields | what is learnt |
    | --- | --- |
    | `messages` | the last message of a chat, the assistant's |
    | `prompt`, `completion` | the completion of a plain text, or of messages (`trl`) |
    | `conversations` | the last message of a chat with `from` and `value` (ShareGPT) |
    | `instruction`, `output`, maybe `input` | the output, as the answer to instruction and input (Alpaca) |
    | `text` | a plain document |

    Other fields are ignored, and so are blank lines of a file.

    Args:
        source: path of a `.jsonl`, `.json`, `.parquet` or `.csv` file, in UTF-8, or a folder or Hub id for
            `datasets.load_dataset`.

    Raises:
        ValueError: if the data are absent, empty or wrong; the message names the file, the line and the field.
    """
    path = Path(locate_data(source))
    is_empty = True
    for place, record in FILES[path.suffix](path) if path.suffix in FILES else _rows(source):
        is_empty = False
        yield _checked(record, place)
    if is_empty:
        raise ValueError(f"{source}: no records, at least one is needed.")


def _decoded(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8, {error.reason} at byte {error.start}.") from error


def _json_lines(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path}, line {number}"
            text = _decoded(line, place)
            if not text.strip():
                continue
            try:
                yield place, json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: not JSON, {error.msg} at column {error.colno}.") from error


def _json(path: Path) -> Iterator[tuple[str, object]]:
    """A list of records; files of this name with a record in each line are common, too."""
    text = _decoded(path.read_bytes(), str(path))
    if not text.lstrip().startswith("["):
        yield from _json_lines(path)
        return
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON, {error.msg} at column {error.colno}.") from error
    for number, record in enumerate(records, start=1):
        yield f"{path}, record {number}", record


def _csv(path: Path) -> Iterator[tuple[str, object]]:
    try:
        chunks = pandas.read_csv(path, dtype=str, na_filter=False, encoding="utf-8-sig", chunksize=1024)
        rows = (row for chunk in chunks for row in chunk.to_dict("records"))
        for number, row in enumerate(rows, start=1):
            yield f"{path}, row {number}", row
    except ValueError as error:  # pandas' own are of this kind
        raise ValueError(f"{path}: not CSV in UTF-8, {error}.") from error


def _parquet(path: Path) -> Iterator[tuple[str, object]]:
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield f"{path}, row {number}", row
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not Parquet, {error}") from error


FILES = {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet, ".csv": _csv}
"""The files that are read, by their suffix."""


def _rows(source: str) -> Iterator[tuple[str, object]]:
    try:
        for number, row in enumerate(datasets.load_dataset(source, split="train", streaming=True), start=1):
            yield f"{source}, row {number}", row
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"{source}: no data set with a `train` split that can be read: {error}") from error


# What a record is


def _checked(record: object, place: str) -> Record:
    if not isinstance(record, dict):
        raise ValueError(f"{place}: must be an object with {_SHAPES_IN_WORDS}, got {type(record).__name__}.")
    for fields, read in SHAPES.items():
        if all(record.get(field) is not None for field in fields):
            prompt, text = read(record, place)
            return Record(prompt, text, place, " + ".join(fields))
    raise ValueError(f"{place}: must have {_SHAPES_IN_WORDS}, got {', '.join(map(str, record)) or 'no field'}.")


def _messages(record: dict, place: str) -> tuple[list[dict], str]:
    return _split_chat(record["messages"], "messages", place)


def _conversations(record: dict, place: str) -> tuple[list[dict], str]:
    turns = record["conversations"]
    if not isinstance(turns, list):
        raise ValueError(f"{place}: `conversations` must be a list, got {type(turns).__name__}.")
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") not in SPEAKERS:
            raise ValueError(f"{place}: `conversations[{index}].from` must be one of {', '.join(SPEAKERS)}.")
        _check_text(turn.get("value"), f"conversations[{index}].value", place)
    messages = [{"role": SPEAKERS[turn["from"]], "content": turn["value"]} for turn in turns]
    return _split_chat(messages, "conversations", place)


def _instruction(record: dict, place: str) -> tuple[list[dict], str]:
    for field in ("instruction", "output"):
        _check_text(record[field], field, place)
    content = record["instruction"]
    if record.get("input"):
        _check_text(record["input"], "input", place)
        content += "\n\n" + record["input"]
    return [{"role": "user", "content": content}], record["output"]


def _completion(record: dict, place: str) -> tuple[list[dict] | str, str]:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        if len(completion) != 1:
            raise ValueError(f"{place}: `completion` must be one message, got {len(completion)}.")
        return _split_chat([*prompt, *completion], "prompt + completion", place)
    for field in ("prompt", "completion"):
        _check_text(record[field], field, place)
    return prompt, completion


def _document(record: dict, place: str) -> tuple[str, str]:
    _check_text(record["text"], "text", place)
    return "", record["text"]


SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""ShareGPT's names of the roles."""

SHAPES = {
    ("messages",): _messages,
    ("prompt", "completion"): _completion,
    ("conversations",): _conversations,
    ("instruction", "output"): _instruction,
    ("text",): _document,
}
"""How each shape of a record is read, by its fields; the first whose fields are there."""

_SHAPES_IN_WORDS = " or ".join(" and ".join(f"`{field}`" for field in fields) for fields in SHAPES)


def _check_text(value: object, name: str, place: str):
    if not isinstance(value, str) or not value:
        raise ValueError(f"{place}: `{name}` must be a string that is not empty, got {value!r}.")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{place}: `{name}` contains half of a surrogate pair, which is no character.")


def _split_chat(messages: object, name: str, place: str) -> tuple[list[dict], str]:
    """The messages before the answer, and the answer."""
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError(f"{place}: `{name}` must be a list of two or more, a prompt and its answer.")
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            _check_text(message.get(key) if isinstance(message, dict) else None, f"{name}[{index}].{key}", place)
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{place}: `{name}[{len(messages) - 1}].role` must be 'assistant' in the last message, "
            f"got {messages[-1]['role']!r}."
        )
    return [dict(message) for message in messages[:-1]], messages[-1]["content"]
