"""Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

import re

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status (`int`): of HTTP.
        message (`str`): one sentence.
        param (`str`, *optional*): the field of the request that is at fault.
        code (`str`, *optional*): OpenAI's name of the error, where clients look for one.
        headers (`dict`, *optional*): further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def from_validation(error: RequestValidationError) -> ApiError:
    """The first faults of a request, in one sentence."""
    faults = error.errors()[:3]
    if faults[0]["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {faults[0]['ctx']['error']}.")
    param = next((str(part) for part in faults[0]["loc"][1:]), None)
    return ApiError(400, "; ".join(dict.fromkeys(map(_sentence, faults))) + ".", param)


def from_value_error(error: ValueError) -> ApiError:
    """A setting that `generate` refuses; its message names the setting first."""
    message = str(error).replace("`sequence_bias`", "`logit_bias`")
    name = re.search(r"`(\w+)`", message)
    return ApiError(400, message, name and name[1])


def _sentence(fault: dict) -> str:
    # Of a union, pydantic also names the type that it tried, such as `str` or `list[TextPart]`.
    parts = [part for part in map(str, fault["loc"][1:]) if re.fullmatch(r"\w+", part) and part != "str"]
    name = ".".join(parts)
    if fault["type"] == "extra_forbidden":
        return f"`{name}` is not a field of this request"
    if fault["type"] == "value_error" and "`" in fault["msg"]:
        return fault["msg"].removeprefix("Value error, ")  # names its fields itself
    what = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    what = f"{what[:1].lower()}{what[1:]}"
    got = "" if fault["type"] == "missing" else f", got {repr(fault['input'])[:100]}"
    return f"`{name}` {what}{got}" if name else f"The body {what}{got}"


def install_handlers(app: FastAPI):
    """Makes every error of the application one of OpenAI's form."""

    async def answer(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers)

    async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
        return await answer(request, from_validation(error))

    async def pass_on(request: Request, error: HTTPException) -> JSONResponse:
        of_routing = error.status_code in (404, 405)
        message = f"{error.detail}: {request.method} {request.url.path}." if of_routing else error.detail
        return await answer(request, ApiError(error.status_code, message, headers=error.headers))

    app.add_exception_handler(ApiError, answer)
    app.add_exception_handler(RequestValidationError, refuse)
    app.add_exception_handler(HTTPException, pass_on)
