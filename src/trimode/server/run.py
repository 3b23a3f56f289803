"""A server as a process: its socket, its connections, and its end.

On SIGTERM or Ctrl-C no request is taken any more, those that run go on for the grace period, and what is left then is told that the
server stops; a second signal ends the grace. Either way the process ends with status 0.
"""

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from trimode.errors import SettingError
from trimode.server.app import create_app
from trimode.server.limits import ServerLimits
from trimode.server.logs import log
from trimode.server.metrics import Metrics
from trimode.server.service import Service

__all__ = ["configured", "serve"]

CLOSING_S = 10.0
"""After the grace, so long for the last words to be sent."""


def serve(service: Service, *, host: str, port: int) -> None:
    """Serve until a signal comes. Raises SettingError when the address cannot be had."""
    config = configured(service)
    sockets = [_bound(config, host, port)]
    name, bound_port = sockets[0].getsockname()[:2]
    log(
        "serving",
        model=service.name,
        url=f"http://{f'[{name}]' if ':' in name else name}:{bound_port}",
        keys=len(service.keys),
    )
    _Server(config, service).run(sockets=sockets)
    log("stopped")


def configured(service: Service) -> uvicorn.Config:
    """How uvicorn serves it."""
    return uvicorn.Config(
        create_app(service),
        http=_guarded_protocol(service.limits, service.metrics),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=int(service.limits.idle_time_s),
        timeout_graceful_shutdown=int(service.limits.grace_s + CLOSING_S),
        h11_max_incomplete_event_size=65_536,
    )


def _bound(config: uvicorn.Config, host: str, port: int) -> Any:
    import socket

    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError):
        raise SettingError(f"The host {host!r} has no address. Use 127.0.0.1, or 0.0.0.0 for every network.") from None
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise SettingError(f"Cannot listen on {host} port {port}: {error.strerror}. Choose another --port.") from None
    # a burst larger than this waits for its turn in the clients
    sock.listen(config.backlog)
    sock.setblocking(False)
    return sock


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._stopping: asyncio.Task[None] | None = None
        self._is_hurried = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own would raise the signal again at the end, and the exit status with it
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        if self._stopping is None:
            self._service.is_draining = True
            self._stopping = asyncio.ensure_future(self._drain())
        else:
            self._is_hurried = True

    async def _drain(self) -> None:
        log("draining", running=self._service.num_calls, grace_s=self._service.limits.grace_s)
        # uvicorn closes the listening socket and idle connections now, and waits for the others
        self.should_exit = True
        end = time.monotonic() + self._service.limits.grace_s
        while self._service.num_calls and time.monotonic() < end and not self._is_hurried:
            await asyncio.sleep(0.05)
        if self._service.num_calls:
            log("grace is over", level=logging.WARNING, cancelled=self._service.num_calls)
            self._service.cancel_all()


def _guarded_protocol(limits: ServerLimits, metrics: Metrics) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol with two bounds that it lacks: how many connections, and how long one may say nothing."""
    num_open = 0

    class Guarded(H11Protocol):
        _waiting: asyncio.TimerHandle | None = None
        _is_counted = False

        def connection_made(self, transport: Any) -> None:
            nonlocal num_open
            if num_open >= limits.max_connections:
                transport.abort()
                # the rest of the protocol expects to have met its transport; with nothing to do it does nothing
                super().connection_made(transport)
                return
            num_open += 1
            self._is_counted = True
            metrics.connections.set(num_open)
            super().connection_made(transport)
            self._expect_request()

        def connection_lost(self, exc: Exception | None) -> None:
            nonlocal num_open
            if self._is_counted:
                num_open -= 1
                self._is_counted = False
                metrics.connections.set(num_open)
            self._stop_expecting()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None:
                # a whole head has come; for the body there is a clock of its own
                self._stop_expecting()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
                self._expect_request(limits.idle_time_s)

        def _expect_request(self, seconds: float = limits.body_time_s) -> None:
            self._stop_expecting()
            self._waiting = self.loop.call_later(seconds, self.transport.abort)

        def _stop_expecting(self) -> None:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None

    return Guarded
