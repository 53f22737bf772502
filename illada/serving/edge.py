"""ASGI middleware at the server's edge: an id for each request, the last resort for faults, and a limit to bodies."""

import asyncio
import re
import time
import uuid

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .errors import ApiError
from .metrics import Metrics
from .service import log_failure

_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class RequestLog:
    """Gives each request an id, counts it, and answers with a 500 where nothing else was answered.

    The id is the request's own `x-request-id`, if it has one of at most 128 letters, digits and `_.:-`; the answer has
    it too.
    """

    def __init__(self, app, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        begun, status = time.monotonic(), None

        async def send_with_id(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = status or 499
        except asyncio.CancelledError:  # the server is ending, and has waited as long as it was to
            if status is None:
                failure = ApiError(503, "The server is ending.")
                await JSONResponse(failure.body(), failure.status)(scope, receive, send_with_id)
        except Exception as error:
            failure = log_failure(request_id, error)
            if status is None:
                await JSONResponse(failure.body(), failure.status)(scope, receive, send_with_id)
        finally:
            endpoint = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(endpoint, str(status or 499)).inc()
            self.metrics.seconds.labels(endpoint).observe(time.monotonic() - begun)


class BodyLimit:
    """Refuses a request whose body has more bytes than this, or takes more seconds than this to arrive.

    Of a body that is too large the rest is read and dropped, as far as `DRAINED` bytes and seconds go: a client that
    is still sending would see a broken connection in place of the answer.
    """

    DRAINED_BYTES, DRAINED_SECONDS = 2**27, 10

    def __init__(self, app, max_bytes: int, timeout: float):
        self.app, self.max_bytes, self.timeout = app, max_bytes, timeout

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun, num_bytes, is_complete = time.monotonic(), 0, False

        async def receive_limited():
            nonlocal num_bytes, is_complete
            if is_complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, begun + self.timeout - time.monotonic()))
            except asyncio.TimeoutError as error:
                raise HTTPException(408, f"The body must arrive within {self.timeout:g} seconds.") from error
            num_bytes += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if num_bytes > self.max_bytes:
                if not is_complete:
                    await self._drain(receive)
                raise HTTPException(413, f"The body must have at most {self.max_bytes} bytes.")
            return message

        await self.app(scope, receive_limited, send)

    async def _drain(self, receive):
        async def drain():
            left = self.DRAINED_BYTES
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return

        try:
            await asyncio.wait_for(drain(), self.DRAINED_SECONDS)
        except asyncio.TimeoutError:
            pass
