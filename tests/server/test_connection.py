"""Clients that leave while their image waits, over real sockets."""

from __future__ import annotations

import asyncio
import io
import os
import socket

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.server import ServerState

from server.connection import Connection
from tests.server.conftest import FakeBackend, Serve
from tests.server.virtual_clock import VirtualClockLoop

HEAD = b"POST /classify?deadline_ms=9000 HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"


def png(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def connect(client: httpx.Client) -> socket.socket:
    url = httpx.URL(str(client.base_url))
    return socket.create_connection((url.host, url.port or 80))


def wait_until_inferring(backend: FakeBackend, batches: int = 1) -> None:
    while len(backend.batches) < batches:
        os.sched_yield()


def wait_for(client: httpx.Client, line: str) -> None:
    while line not in client.get("/metrics").text:
        os.sched_yield()


@pytest.mark.parametrize("side", [8, 300])  # one packet, and several
def test_client_when_it_leaves_during_inference_then_its_request_ends(
    serve_fake: Serve, backend: FakeBackend, side: int
) -> None:
    body = png(side)
    with serve_fake() as client:
        backend.gate.clear()
        with connect(client) as connection:
            connection.sendall(HEAD % len(body) + body)
            wait_until_inferring(backend)
        wait_for(client, 'vmoe_requests_total{budget="auto",status="499"} 1.0')
        assert "vmoe_in_flight_requests 0.0" in client.get("/metrics").text
        backend.gate.set()


def test_client_when_it_leaves_while_its_image_waits_then_it_is_never_inferred(
    serve_fake: Serve, backend: FakeBackend
) -> None:
    body = png(8)
    with serve_fake() as client:
        backend.gate.clear()
        with connect(client) as first:
            first.sendall(HEAD % len(body) + body)
            wait_until_inferring(backend)
            with connect(client) as second:
                second.sendall(HEAD % len(body) + body)
                wait_for(client, "vmoe_queue_images 1.0")
            wait_for(client, "vmoe_queue_images 0.0")
            backend.gate.set()
            assert first.recv(100).startswith(b"HTTP/1.1 200")
        assert len(backend.batches) == 1


def test_client_when_it_leaves_after_its_answer_then_nothing_is_cancelled(serve_fake: Serve) -> None:
    body = png(8)
    with serve_fake() as client:
        with httpx.Client(base_url=client.base_url) as other:  # one connection
            for _ in range(2):
                assert other.post("/classify", content=body, headers={"Content-Type": "image/png"}).status_code == 200
        text = client.get("/metrics").text
        assert 'vmoe_requests_total{budget="auto",status="200"} 2.0' in text
        assert 'status="499"' not in text


def test_client_when_it_sends_requests_ahead_then_all_are_answered_in_order(serve_fake: Serve) -> None:
    body = png(300)
    with serve_fake() as client, connect(client) as connection:
        head = HEAD.replace(b"\r\n\r\n", b"\r\nX-Request-ID: request-%d\r\n\r\n")
        connection.sendall(b"".join(head % (len(body), number) + body for number in range(3)))
        connection.settimeout(10)
        found = b""
        while found.count(b"HTTP/1.1 200") < 3:
            found += connection.recv(65536)
    places = [found.index(b"x-request-id: request-%d" % number) for number in range(3)]
    assert places == sorted(places)


class Wire(asyncio.Transport):
    """Remembers what is written, and whether the connection reads."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = True
        self.written: list[bytes] = []

    def get_extra_info(self, name: str, default: object = None) -> object:
        return default

    def is_closing(self) -> bool:
        return b"closed" in self.written

    def close(self) -> None:
        if not self.is_closing():
            self.closed_s = asyncio.get_running_loop().time()
        self.written.append(b"closed")

    def write_eof(self) -> None:
        self.written.append(b"eof")

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True

    def write(self, data: bytes) -> None:  # type: ignore[override]
        self.written.append(data)


def accept(app: ASGIApp, state: ServerState, wire: Wire) -> Connection:
    config = uvicorn.Config(app, http=Connection, ws="none", log_config=None)
    config.load()
    connection = Connection(config, state, {}, asyncio.get_running_loop())
    connection.connection_made(wire)
    return connection


async def exchange(app: ASGIApp, *requests: bytes) -> Wire:
    """Lets an application answer, as far as it gets without waiting for anything from outside."""
    state, wire = ServerState(), Wire()
    connection = accept(app, state, wire)
    for request in requests:
        connection.data_received(request)
    for _ in range(10):
        await asyncio.sleep(0)
    for task in state.tasks:
        task.cancel()
    connection.connection_lost(None)
    return wire


def start(**headers: str) -> Message:
    return {
        "type": "http.response.start",
        "status": 200,
        "headers": [(name.encode().replace(b"_", b"-"), value.encode()) for name, value in headers.items()],
    }


def body(data: bytes, *, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize("ahead", [0, 1])
def test_connection_when_a_large_body_is_complete_then_it_reads_on_unless_requests_wait(ahead: int) -> None:
    """Only who reads sees the end of a connection; only who does not read keeps requests ahead out of memory."""

    async def never(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.Event().wait()

    large = bytes(70_000)  # uvicorn stops reading at 64 KiB of a body
    wire = asyncio.run(exchange(never, *[HEAD % len(large) + large] * (1 + ahead)))
    assert wire.reads == (not ahead)


def test_connection_when_an_answer_has_a_body_then_head_and_body_leave_in_one_piece() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start(content_length="2"))
        await send(body(b"ok"))

    first, second, *_ = asyncio.run(exchange(app, GET, GET)).written
    assert first == second
    assert first.startswith(b"HTTP/1.1 200 OK\r\n")
    assert first.endswith(b"\r\n\r\nok")


@pytest.mark.parametrize(("method", "length"), [(b"HEAD", "2"), (b"GET", "0")])
def test_connection_when_an_answer_has_no_body_then_its_head_leaves(method: bytes, length: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start(content_length=length))
        await send(body(b"ok" if length == "2" else b""))

    head, *rest = asyncio.run(exchange(app, GET.replace(b"GET", method))).written
    assert head.endswith(b"\r\n\r\n")
    assert rest == [b"closed"]


def test_connection_when_an_answer_comes_in_pieces_then_each_leaves_when_it_is_sent() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start(content_length="6"))
        for piece in (b"ab", b"cd", b"ef"):
            await send(body(piece, more=piece != b"ef"))

    head, *rest = asyncio.run(exchange(app, GET)).written
    assert head.endswith(b"\r\n\r\nab")
    assert rest == [b"cd", b"ef", b"closed"]


def test_connection_when_an_application_breaks_behind_the_head_then_it_leaves_before_the_end() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start(content_length="2"))
        raise ZeroDivisionError

    head, *rest = asyncio.run(exchange(app, GET)).written
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert set(rest) == {b"closed"}


def test_connection_when_a_client_waits_for_100_continue_then_it_gets_it_at_once() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()

    request = HEAD.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n") % 3
    assert asyncio.run(exchange(app, request)).written[0] == b"HTTP/1.1 100 Continue\r\n\r\n"


async def answers(scope: Scope, receive: Receive, send: Send) -> None:
    await send(start(content_length="2"))
    await send(body(b"ok"))


@pytest.mark.parametrize(
    ("pieces", "closed_s"),
    [
        ([], 10),
        ([(3, b"G"), (6, b"ET / HT"), (9, b"TP/1.1\r\n")], 10),
        ([(3, GET)], 8),  # idle for five seconds
        ([(3, GET), (5, b"GET / HT"), (14, b"TP/1.1\r\n")], 15),
        ([(3, GET), (5, b"\r\n")], 15),
        ([(3, GET), (5, GET[:9]), (14, GET[9:])], 19),
        ([(3, HEAD % 99), (5, b"x"), (14, b"x")], 17),  # answered, and the body still comes: two seconds more
    ],
)
def test_connection_when_no_head_is_complete_in_ten_seconds_then_it_is_closed(
    pieces: list[tuple[float, bytes]], closed_s: float
) -> None:
    async def main() -> float:
        wire = Wire()
        connection = accept(answers, ServerState(), wire)
        loop = asyncio.get_running_loop()
        for at_s, piece in pieces:
            loop.call_at(at_s, connection.data_received, piece)
        await asyncio.sleep(100)
        connection.connection_lost(None)
        return wire.closed_s

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        assert runner.run(main()) == closed_s


def test_connection_when_a_request_takes_long_then_it_stays() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(60)
        await answers(scope, receive, send)

    async def main() -> Wire:
        wire, state = Wire(), ServerState()
        connection = accept(slow, state, wire)
        connection.data_received(GET)
        await asyncio.gather(*state.tasks)
        assert not wire.is_closing()
        connection.connection_lost(None)
        return wire

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        assert runner.run(main()).written[0].endswith(b"ok")


@pytest.mark.parametrize("sent", [0, 70_000, 200_000])  # nothing more, more than uvicorn reads on its own, all
def test_connection_when_it_ends_before_a_body_does_then_it_takes_the_rest_for_two_seconds(sent: int) -> None:
    async def refuses(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(start(content_length="2", connection="close"))
        await send(body(b"no"))

    async def main() -> None:
        wire, state = Wire(), ServerState()
        connection = accept(refuses, state, wire)
        connection.data_received(HEAD % 270_000 + bytes(70_000))
        await asyncio.gather(*state.tasks)
        assert wire.written[0].endswith(b"no")
        assert wire.written[1:] == [b"eof"]
        assert wire.reads
        connection.data_received(bytes(sent) + (GET if sent == 200_000 else b""))
        assert wire.reads
        assert not state.tasks  # no other request is begun
        assert wire.is_closing() == (sent == 200_000)
        await asyncio.sleep(10)
        assert wire.closed_s == (0 if sent == 200_000 else 2)
        connection.connection_lost(None)

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(main())


LONG = GET.replace(b"\r\n\r\n", b"\r\nX: " + b"y" * 70_000 + b"\r\n\r\n")
MANY = GET.replace(b"\r\n\r\n", b"\r\nX: y" * 40_000 + b"\r\n\r\n")


@pytest.mark.parametrize(
    "pieces",
    [
        [LONG],
        [LONG[place : place + 10_000] for place in range(0, len(LONG), 10_000)],
        [GET[:-4], *[b"x" * 10_000] * 7],
        [MANY],
        [GET.replace(b"GET / ", b"GET /" + b"z" * 70_000 + b" ")],
    ],
)
def test_connection_when_a_head_is_too_large_then_it_is_refused(pieces: list[bytes]) -> None:
    written = asyncio.run(exchange(answers, *pieces)).written
    answer, end = written[:2]
    assert answer.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
    assert answer.endswith(b"\r\n\r\nthe head of the request has too many bytes; at most 65536 are accepted")
    assert end == b"closed"


def test_connection_when_only_bodies_or_requests_ahead_are_large_then_they_are_answered() -> None:
    large = bytes(200_000)
    written = asyncio.run(exchange(answers, HEAD % len(large) + large + GET[:9], GET[9:])).written
    assert b"".join(written).count(b"HTTP/1.1 200") == 2
    head = GET.replace(b"\r\n\r\n", b"\r\nX: " + b"y" * 60_000 + b"\r\n\r\n")
    assert b"".join(asyncio.run(exchange(answers, head)).written).count(b"HTTP/1.1 200") == 1
