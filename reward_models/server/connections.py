# SPDX-License-Identifier: Apache-2.0

"""
Connections of the reward server: how many are open, and how long one may take to send a request.

Uvicorn limits neither. It closes a connection that is idle after an answer, but waits without end for the first byte, the rest of
a head or the rest of a body. At the limit of open files, asyncio writes a traceback for each connection that it cannot accept.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
from functools import partial
from typing import Any

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.protocols.http.h11_impl import H11Protocol

from reward_models.server.arguments import ServerArguments


logger = logging.getLogger(__name__)

SECONDS_BETWEEN_WARNINGS = 60.0
# Connections that are refused before the event loop may do something else.
_REFUSALS_AT_ONCE = 64


class RareWarning:
    """
    Logs a warning at most once per [`SECONDS_BETWEEN_WARNINGS`], with the number of warnings that were left out.

    Args:
        message (`str`): The warning, in which `%s` stands for its cause.
    """

    def __init__(self, message: str) -> None:
        self._message = message
        self._last = -SECONDS_BETWEEN_WARNINGS
        self._num_left_out = 0

    def __call__(self, cause: Any) -> None:
        if time.monotonic() - self._last < SECONDS_BETWEEN_WARNINGS:
            self._num_left_out += 1
            return
        more = f" ({self._num_left_out} more since the last such warning)" if self._num_left_out else ""
        logger.warning(self._message + "%s", cause, more)
        self._last, self._num_left_out = time.monotonic(), 0


class BoundedListener(socket.socket):
    """
    A listening socket that closes new connections at once while too many are open or while no file can be opened. It refuses
    them in `accept`, because the event loop accepts thousands of connections before it lets a protocol close the first.

    Args:
        listener (`socket.socket`): A bound socket. Its file descriptor is taken over.
        max_connections (`int`): Largest number of open connections.
    """

    def __init__(self, listener: socket.socket, max_connections: int) -> None:
        super().__init__(fileno=listener.detach())
        self.max_connections = max_connections
        self._open: list[socket.socket] = []
        # Closed to accept and refuse a connection when no other file descriptor is left.
        self._spare: int | None = os.open(os.devnull, os.O_RDONLY)
        self._warn_full = RareWarning("there are %s open connections, which is max_connections: new ones are closed")
        self._warn_error = RareWarning("a connection cannot be accepted (%s), so it is closed")

    def accept(self) -> tuple[socket.socket, Any]:
        """
        Accept the next connection that is not refused.

        Raises:
            `BlockingIOError`: If no connection waits, or if many were refused.
        """
        for _ in range(_REFUSALS_AT_ONCE):
            try:
                connection, address = super().accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                raise
            except OSError as error:
                self._warn_error(error)
                self._refuse_with_spare()
                continue
            if self._has_room():
                self._open.append(connection)
                return connection, address
            connection.close()
            self._warn_full(self.max_connections)
        raise BlockingIOError("connections were refused")

    def close(self) -> None:
        """Close the socket."""
        super().close()
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None

    def _has_room(self) -> bool:
        if len(self._open) >= self.max_connections:
            # A closed socket has the file number -1.
            self._open = [connection for connection in self._open if connection.fileno() >= 0]
        return len(self._open) < self.max_connections

    def _refuse_with_spare(self) -> None:
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
        # Another thread can take the descriptor. Then the connection waits until one is free.
        with contextlib.suppress(OSError):
            super().accept()[0].close()
        with contextlib.suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY)
        if self._spare is None:
            time.sleep(0.01)


class DeadlineProtocol(H11Protocol):
    """
    Uvicorn's HTTP protocol with deadlines. A connection is closed if

    - it has sent no complete head `request_timeout` seconds after it was made, or after its last answer;
    - its answer is not sent twice `request_timeout` seconds after the head, in which the application answers within the first;
    - the rest of a body does not come soon after the answer, which was then an error.

    Args:
        request_timeout (`float`): Seconds.
        *args, **kwargs: As for uvicorn's protocol.
    """

    def __init__(self, *args: Any, request_timeout: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.request_timeout = request_timeout
        self._deadline: asyncio.TimerHandle | None = None
        self._is_answering = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Start the deadline of the first head."""
        super().connection_made(transport)
        self._close_after(self.request_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the deadline."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Start the deadline of the answer once a head is complete."""
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete and not self._is_answering:
            self._is_answering = True
            self._close_after(2 * self.request_timeout)

    def on_response_complete(self) -> None:
        """Start the deadline of the next head, or of the rest of a body that nobody waits for."""
        self._is_answering = False
        seconds = self.request_timeout
        self._close_after(min(seconds, self.timeout_keep_alive) if self.cycle.more_body else seconds)
        # Handles a request that has come already, so it is last.
        super().on_response_complete()

    def _close_after(self, seconds: float) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if not self.transport.is_closing():
            # Closing without abortion would wait for a client that does not read its answer.
            self._deadline = self.loop.call_later(seconds, self.transport.abort)


def make_server(app: Any, args: ServerArguments) -> uvicorn.Server:
    """
    Make uvicorn's server of an application, with the deadlines of [`DeadlineProtocol`].

    Args:
        app (`ASGIApp`): The application.
        args ([`ServerArguments`]): Address and limits.
    """
    config = uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        # Other event loops accept connections without the listener's `accept`.
        loop="asyncio",
        http=partial(DeadlineProtocol, request_timeout=args.request_timeout),
        ws="none",
        # The request log has a line per request already.
        access_log=False,
        timeout_graceful_shutdown=args.shutdown_timeout,
    )
    return uvicorn.Server(config)


def serve(app: Any, args: ServerArguments) -> None:
    """
    Run an application until the process is told to stop.

    Args:
        app (`ASGIApp`): The application.
        args ([`ServerArguments`]): Address and limits.

    Raises:
        `SystemExit`: If the address cannot be listened at or the application does not start.
    """
    server = make_server(app, args)
    listener = server.config.bind_socket()
    listener.set_inheritable(False)
    with BoundedListener(listener, args.connection_limit) as bounded, contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[bounded])
    if not server.started:
        sys.exit(STARTUP_FAILURE)
