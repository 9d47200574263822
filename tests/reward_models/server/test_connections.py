# SPDX-License-Identifier: Apache-2.0

"""Connections that send no request, or not a whole one, and too many of them."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import resource
import select
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from reward_models.server.app import create_app
from reward_models.server.arguments import MAX_DEFAULT_CONNECTIONS, ServerArguments
from reward_models.server.connections import BoundedListener, RareWarning, make_server
from support.server_samples import wait_until


TIMEOUT = 0.4
HEAD = b"POST /score HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n"


@contextlib.contextmanager
def serving(**arguments: object) -> Iterator[int]:
    """The server as its command runs it, in a thread. Yields its port."""
    args = ServerArguments(judge="shapes", **arguments)
    server = make_server(create_app(args), args)
    server.config.timeout_graceful_shutdown = 0
    listener = BoundedListener(socket.create_server(("127.0.0.1", 0)), args.connection_limit)
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def connect(port: int, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(data)
    return connection


def is_open(connection: socket.socket) -> bool:
    """Whether the server has not closed a connection. What it sent before does not matter."""
    try:
        while select.select([connection], [], [], 0)[0]:
            if not connection.recv(4096):
                return False
    except ConnectionError:
        return False
    return True


def get_health(port: int) -> int:
    return httpx.get(f"http://127.0.0.1:{port}/health", timeout=30).status_code


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"P",
        b"POST /score HTTP/1.1\r\nhost: x\r\nx-a: ",
        HEAD + b"\r\n{",
        HEAD.replace(b"content-length: 1000", b"transfer-encoding: chunked") + b"\r\n1\r\n{\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /hea",
        b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n",
    ],
    ids=["no byte", "a byte", "half a head", "half a body", "half a chunked body", "half a second head", "no body"],
)
@pytest.mark.parametrize("drips", [False, True], ids=["silent", "a byte now and then"])
def test_connection_without_a_whole_request_is_closed(serving_briefly: int, data: bytes, drips: bool) -> None:
    start = time.monotonic()
    with connect(serving_briefly, data) as connection:
        while is_open(connection):
            assert time.monotonic() - start < 20 * TIMEOUT, "the connection stays open"
            if drips:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(b"x")
            time.sleep(TIMEOUT / 10)
    assert time.monotonic() - start > TIMEOUT / 2
    assert get_health(serving_briefly) == 200


@pytest.fixture(scope="module")
def serving_briefly() -> Iterator[int]:
    with serving(request_timeout=TIMEOUT) as port:
        yield port


def test_connection_that_is_used_stays_open(serving_briefly: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", serving_briefly, timeout=30)
    connection.connect()
    number = connection.sock.fileno()
    for _ in range(6):
        connection.request("GET", "/health")
        assert connection.getresponse().read() and connection.sock.fileno() == number
        time.sleep(TIMEOUT / 3)
    connection.close()


def test_client_that_does_not_read_its_answer_is_left(serving_briefly: int) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", serving_briefly))
        connection.settimeout(0.2)
        start = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - start < 20 * TIMEOUT:
                # Sending blocks once the server reads no further requests.
                with contextlib.suppress(TimeoutError):
                    connection.sendall(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n" * 1000)
            pytest.fail("the connection stays open")


def test_connections_beyond_the_limit_are_closed_at_once(caplog: pytest.LogCaptureFixture) -> None:
    with serving(max_connections=5) as port, contextlib.ExitStack() as stack:
        first = [stack.enter_context(connect(port)) for _ in range(5)]
        further = [stack.enter_context(connect(port)) for _ in range(100)]
        wait_until(lambda: not any(map(is_open, further)))
        assert all(map(is_open, first))
        first[0].close()
        wait_until(lambda: _answers(port))
        warnings = [record.getMessage() for record in caplog.records if "max_connections" in record.getMessage()]
        assert warnings == ["there are 5 open connections, which is max_connections: new ones are closed"]


def _answers(port: int) -> bool:
    try:
        return get_health(port) == 200
    except httpx.TransportError:
        return False


def test_out_of_files_the_server_goes_on_and_does_not_fill_its_log(caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with serving(max_connections=10_000) as port, contextlib.ExitStack() as stack:
        assert get_health(port) == 200
        clients = [stack.enter_context(socket.socket()) for _ in range(60)]
        used = set(map(int, os.listdir("/proc/self/fd")))
        limit = [number for number in range(10_000) if number not in used][10]
        try:
            # Clients and server share this process, so there are files for a few connections only.
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            for client in clients:
                client.connect(("127.0.0.1", port))
            wait_until(lambda: sum(map(is_open, clients)) <= 20)
            messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
            assert len(messages) == 1 and "Too many open files" in messages[0] and "\n" not in messages[0]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for client in clients:
                client.close()
        assert get_health(port) == 200


def test_number_of_connections_follows_from_the_limit_of_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, expected in ((256, 128), (10**6, MAX_DEFAULT_CONNECTIONS), (resource.RLIM_INFINITY, 1024), (1, 1)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert ServerArguments().connection_limit == expected
    assert ServerArguments(max_connections=7).connection_limit == 7


def test_warnings_are_counted_and_not_repeated(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    warn = RareWarning("refused: %s")
    for seconds in range(0, 121, 20):
        now = float(seconds)
        warn(seconds)
    assert [record.getMessage() for record in caplog.records] == [
        "refused: 0",
        "refused: 60 (2 more since the last such warning)",
        "refused: 120 (2 more since the last such warning)",
    ]
