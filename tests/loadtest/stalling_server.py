"""An HTTP server in a thread of its own that answers like a gateway, after latencies that the test knows.

Every request is answered `service_s` after it came, except while the server stalls: who comes in [from, until) is
answered `service_s` after `until`. Stalls count from the first request.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SERVICE_S = 0.02
ANSWER = (
    b'{"predictions": [{"index": 9, "label": "Ankle boot", "probability": 0.9}], "operating_point": '
    b'{"capacity_factor": 1.0, "num_selected_experts": 2, "slots": [13], "accuracy": 0.9, "relative_compute": 1.0}, '
    b'"reason": "ceiling", "deadline_met": true, "times": {"queue_ms": 1.0, "inference_ms": 2.0}}'
)


class _Connection(asyncio.Protocol):
    def __init__(self, stall: _Stall) -> None:
        self._stall, self._received = stall, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._stall.transports.add(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._stall.transports.discard(self._transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found or len(body) < int(head.lower().partition(b"content-length:")[2].split()[0]):
            return
        self._received = b""
        status, content = self._stall.answer
        reply = b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(content), content)
        self._stall.loop.call_at(self._stall.answer_at_s(), self._answer, reply)

    def _answer(self, reply: bytes) -> None:
        self._stall.answered_s.append(self._stall.loop.time())
        self._transport.write(reply)


class _Stall:
    def __init__(self, from_s: float, until_s: float, answer: tuple[bytes, bytes], answered_s: list[float]) -> None:
        self.loop, self.answer, self.answered_s = asyncio.new_event_loop(), answer, answered_s
        self._from_s, self._until_s = from_s, until_s
        self._first_s: float | None = None
        self.transports: set[asyncio.Transport] = set()

    def answer_at_s(self) -> float:
        now = self.loop.time()
        self._first_s = self._first_s or now
        since_s = now - self._first_s
        return SERVICE_S + (self._first_s + self._until_s if self._from_s <= since_s < self._until_s else now)


@contextmanager
def stalling_server(
    from_s: float = 0.0,
    until_s: float = 0.0,
    answer: tuple[bytes, bytes] = (b"200 OK", ANSWER),
    answered_s: list[float] | None = None,
) -> Iterator[str]:
    """The URL of a running server.

    Arguments:
        answer: status line and body.
        answered_s: gets the monotonic time of every answer.
    """
    stall = _Stall(from_s, until_s, answer, [] if answered_s is None else answered_s)
    server = stall.loop.run_until_complete(stall.loop.create_server(lambda: _Connection(stall), "127.0.0.1", 0))
    thread = threading.Thread(target=stall.loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        stall.loop.call_soon_threadsafe(stall.loop.stop)
        thread.join()
        server.close()
        for transport in tuple(stall.transports):
            transport.abort()
        while stall.transports:
            stall.loop.run_until_complete(asyncio.sleep(0))
        stall.loop.run_until_complete(server.wait_closed())
        stall.loop.close()
