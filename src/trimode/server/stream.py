"""Server-sent events that notice when nobody listens: a client that goes away, or takes nothing, frees what it held."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

__all__ = ["DONE", "HEARTBEAT", "ClientGone", "EventStream", "gone", "sse"]

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": still here\n\n"


class ClientGone(Exception):  # noqa: N818 - not a fault
    """Nobody is left to answer."""


def sse(data: dict[str, Any]) -> bytes:
    """One event."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"


async def gone(receive: Receive) -> None:
    """Returns when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """An ASGI response; `on_end` is called once, however it ends, with whether all was sent."""

    def __init__(
        self,
        pieces: AsyncIterator[bytes],
        *,
        send_time_s: float,
        on_end: Callable[[bool], None],
        headers: dict[str, str],
    ) -> None:
        super().__init__()
        self._pieces = pieces
        self._send_time_s = send_time_s
        self._on_end = on_end
        self._told = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
            **headers,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watching = asyncio.create_task(gone(receive))
        sending = asyncio.create_task(self._send_all(send))
        whole = False
        try:
            await asyncio.wait({watching, sending}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
                whole = True
        except (ClientGone, OSError):
            # without an end to the body, the connection is closed
            pass
        finally:
            # first: what still sends ends with its answers, whatever else it waits for
            self._on_end(whole)
            for task in (watching, sending):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task

    async def _send_all(self, send: Send) -> None:
        headers = [(name.encode(), value.encode("latin-1")) for name, value in self._told.items()]
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": headers})
        async for piece in self._pieces:
            await self._send(send, {"type": "http.response.body", "body": piece, "more_body": True})
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, message: Message) -> None:
        try:
            async with asyncio.timeout(self._send_time_s):
                await send(message)
        except TimeoutError:
            raise ClientGone from None
