"""ASGI middleware at the server's edge: a number for each request, and a limit to its size."""

import uuid

from starlette.exceptions import HTTPException


class RequestIds:
    """Gives each request an id, which the answer has as `x-request-id`."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message):
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, send_with_id)


class BodyLimit:
    """Refuses a request whose body has more bytes than this, before or while it is read."""

    def __init__(self, app, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope, receive, send):
        num_bytes = 0

        async def receive_limited():
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes:
                raise HTTPException(413, f"The body must have at most {self.max_bytes} bytes.")
            return message

        await self.app(scope, receive_limited if scope["type"] == "http" else receive, send)
