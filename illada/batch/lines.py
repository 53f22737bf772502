"""A line of a batch: which request it is, and the record that answers it."""

import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from ..serving.errors import from_validation
from ..serving.fields import Body

MAX_LINE_BYTES = 2**24
_BLANK_BYTES = b" \t\r\n"
_PLAIN_ENDPOINTS = {"messages": "/v1/chat/completions", "prompt": "/v1/completions"}


@dataclass(frozen=True)
class Line:
    """A line that is not blank.

    Attributes:
        number (`int`): in the file, from 1.
        text (`bytes`): without white space around it; of a line that is too long, the beginning.
    """

    number: int
    text: bytes

    @cached_property
    def digest(self) -> int:
        """Of number and text: what an answer is known by. Above 0 and below 2**64."""
        data = b"%d:%b" % (self.number, self.text)
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") or 1

    def record(self, custom_id: Any, response: dict | None = None, error: dict | None = None) -> dict:
        """The answer to the line, in OpenAI's form, and the line's number."""
        head = {"id": f"batch_req_{self.digest:016x}", "custom_id": custom_id, "line": self.number}
        return {**head, "response": response, "error": error}


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a file that are not blank, one at a time in memory."""
    with path.open("rb") as file:
        for number in count(1):
            text = rest = file.readline(MAX_LINE_BYTES + 1)
            if not text:
                return
            while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE_BYTES + 1)
            text = (text.removeprefix(b"\xef\xbb\xbf") if number == 1 else text).strip(_BLANK_BYTES)
            if text:
                yield Line(number, text)


class BadLine(Exception):
    """A line that is no request; the message is one sentence."""

    def __init__(self, message: str, custom_id: Any = None):
        super().__init__(message)
        self.custom_id = custom_id

    def as_json(self) -> dict:
        return {"code": "invalid_line", "message": str(self)}


class Envelope(Body):
    """A line in OpenAI's form."""

    custom_id: str
    method: Literal["POST"]
    url: str
    body: dict


class PlainId(Body):
    """What a plain line has beside its body."""

    id: str | int | None = None


@dataclass(frozen=True)
class Call:
    """What a line asks for: `body`, posted to `url`."""

    custom_id: str | int | None
    url: str
    body: dict


def parse(line: Line, endpoints: Collection[str]) -> Call:
    """The request of a line, in OpenAI's form or plain.

    Args:
        endpoints (`Collection[str]`): what `url` may be.

    Raises:
        BadLine: says what is wrong with it.
    """
    fields = _load(line)
    given = fields.get("custom_id", fields.get("id"))
    custom_id = given if isinstance(given, str | int) else None
    try:
        call = _call(fields)
    except ValidationError as error:
        faults = [{**fault, "loc": ("line", *fault["loc"])} for fault in error.errors()]
        raise BadLine(from_validation(RequestValidationError(faults)).message, custom_id) from error
    except BadLine as error:
        raise BadLine(str(error), custom_id) from error
    if call.url not in endpoints:
        raise BadLine(f"`url` must be one of {', '.join(sorted(endpoints))}, got {call.url[:100]!r}.", custom_id)
    if call.body.get("stream"):
        raise BadLine("`stream` must be left out or false in a batch, got true.", custom_id)
    return call


def _load(line: Line) -> dict:
    if len(line.text) > MAX_LINE_BYTES:
        raise BadLine(f"A line must have at most {MAX_LINE_BYTES} bytes.")
    try:
        fields = json.loads(line.text.decode())
    except UnicodeDecodeError as error:
        raise BadLine("The line is not valid UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise BadLine(f"The line is not valid JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise BadLine(f"A line must be a JSON object, got {line.text[:100].decode(errors='replace')!r}.")
    return fields


def _call(fields: dict) -> Call:
    if fields.keys() & Envelope.model_fields:
        envelope = Envelope.model_validate(fields)
        return Call(envelope.custom_id, envelope.url, envelope.body)
    for name, url in _PLAIN_ENDPOINTS.items():
        if name in fields:
            body = {key: value for key, value in fields.items() if key != "id"}
            return Call(PlainId.model_validate({"id": fields.get("id")}).id, url, body)
    raise BadLine("A line must have `prompt`, `messages`, or `custom_id`, `method`, `url` and `body`.")


def dump(value: Any) -> bytes:
    """JSON in one line; what UTF-8 cannot have, half a surrogate pair, is escaped."""
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()
