"""What stands before every route: a request's id, its log line, its count, the bounds on its body, the shape of refusals."""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Collection
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimode.server.faults import ApiError
from trimode.server.limits import ServerLimits
from trimode.server.logs import log
from trimode.server.metrics import Metrics
from trimode.server.stream import ClientGone

__all__ = ["Front", "read_body"]

CLIENT_GONE = 499
"""Told to nobody: the status in logs and counts of a request whose client went away (nginx's number)."""
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
]


class Front:
    """ASGI middleware. What a route adds to `scope["state"]["facts"]` gets into the log line."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        request_id = f"req-{secrets.token_hex(8)}"
        facts: dict[str, Any] = {}
        scope.setdefault("state", {})["facts"] = facts
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [*message.get("headers", []), *_HEADERS, (b"x-request-id", request_id.encode())]
                message = {**message, "headers": own}
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except (ClientGone, OSError):
            status = status or CLIENT_GONE
        except Exception as error:
            log("failed", level=logging.ERROR, error=error, id=request_id, path=scope["path"])
            if status == 0:
                await _reply(noted, ApiError(500, "The request failed: an error of the server's own."))
        finally:
            seconds = time.perf_counter() - start
            known = scope["path"] in self._paths
            self._metrics.note_reply(scope["path"] if known else "other", status or CLIENT_GONE, seconds)
            quiet = scope["path"] in ("/health", "/ready", "/metrics")
            log(
                "request",
                level=logging.DEBUG if quiet else logging.INFO,
                id=request_id,
                method=scope["method"],
                path=scope["path"] if known else None,
                status=status or CLIENT_GONE,
                seconds=round(seconds, 4),
                **facts,
            )


async def _reply(send: Send, fault: ApiError) -> None:
    body = json.dumps(fault.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": fault.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def read_body(request: Request, limits: ServerLimits) -> bytes:
    """The body, if it is JSON, small enough, and arrives in time. Raises ApiError 408, 413 or 415, ClientGone."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        # also what keeps a foreign page in somebody's browser from using a server without keys
        raise ApiError(415, f"The body must be JSON, sent as 'Content-Type: application/json'; got {kind[:100]!r}.")
    try:
        async with asyncio.timeout(limits.body_time_s):
            return await _whole(request, limits)
    except TimeoutError:
        raise ApiError(
            408, f"The body did not arrive within {limits.body_time_s:g} seconds.", headers={"Connection": "close"}
        ) from None


async def _whole(request: Request, limits: ServerLimits) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece = message.get("body", b"")
        size += len(piece)
        if size <= limits.max_body_bytes:
            pieces.append(piece)
        else:
            pieces.clear()
        if size > limits.max_discarded_bytes or not message.get("more_body", False):
            break
    if size > limits.max_body_bytes:
        raise ApiError(
            413,
            f"The body is larger than the {limits.max_body_bytes:,} bytes that are taken. Send less.",
            headers={"Connection": "close"},
        )
    return b"".join(pieces)
