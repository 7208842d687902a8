"""An HTTP server in a thread of its own that answers like a gateway, after latencies that the test knows.

Without a capacity every request is answered `service_s` after it came, except while the server stalls: who comes in
[from, until) is answered `service_s` after `until`. Stalls count from the first request.

With one it serves one request after the other, `service_s` each, and refuses who would find `most_waiting` others.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from server.schemas import BudgetBody, Model, Models, PolicyBody, QueueState

SERVICE_S = 0.02
ANSWER = (
    b'{"predictions": [{"index": 9, "label": "Ankle boot", "probability": 0.9}], "operating_point": '
    b'{"capacity_factor": 1.0, "num_selected_experts": 2, "slots": [13], "accuracy": 0.9, "relative_compute": 1.0}, '
    b'"reason": "ceiling", "deadline_met": true, "times": {"queue_ms": 1.0, "inference_ms": 2.0, '
    b'"decode_ms": 0.1, "total_ms": 3.0}}'
)
_REFUSAL = (b"503 Service Unavailable", b'{"code": "overloaded"}')
_MODELS = Models(
    models=[
        Model(
            name="model",
            version="1",
            labels=["T-shirt/top", "Ankle boot"],
            image_size=(28, 28),
            channels=1,
            max_selected_experts=2,
            max_capacity_factor=1.0,
            points=[],
            budgets={},
        )
    ]
)
_POLICY = PolicyBody(
    policy="fixed",
    parameters={},
    quantile=0.9,
    source="test",
    max_batch_size=1,
    workers=1,
    budgets={"auto": BudgetBody(floor=None, ceiling=None, deadline_ms=100.0, weight=1.0)},
    state=QueueState(
        waiting_images=0, waiting_bytes=0, oldest_ms=0.0, running_batches=0, arrival_rate_hz=0.0, latency_scale=1.0
    ),
)
DESCRIPTIONS = {
    b"/v1/models": _MODELS.model_dump_json().encode(),
    b"/v1/policy": _POLICY.model_dump_json().encode(),
}


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
        method, _, rest = head.partition(b" ")
        if found and method == b"GET":
            self._received = b""
            self._transport.write(http_reply(b"200 OK", DESCRIPTIONS[rest.partition(b" ")[0]]))
            return
        if not found or len(body) < int(head.lower().partition(b"content-length:")[2].split()[0]):
            return
        self._received = b""
        answer_s, answer = self._stall.answer_at_s()
        self._stall.loop.call_at(answer_s, self._answer, http_reply(*answer))

    def _answer(self, reply: bytes) -> None:
        self._stall.answered_s.append(self._stall.loop.time())
        self._transport.write(reply)


def http_reply(status: bytes, content: bytes) -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(content), content)


class _Stall:
    def __init__(self, from_s: float, until_s: float, answer: tuple[bytes, bytes], answered_s: list[float]) -> None:
        self.loop, self.answer, self.answered_s = asyncio.new_event_loop(), answer, answered_s
        self._from_s, self._until_s = from_s, until_s
        self._first_s: float | None = None
        self.transports: set[asyncio.Transport] = set()

    def answer_at_s(self) -> tuple[float, tuple[bytes, bytes]]:
        now = self.loop.time()
        self._first_s = self._first_s or now
        since_s = now - self._first_s
        stalled = self._from_s <= since_s < self._until_s
        return SERVICE_S + (self._first_s + self._until_s if stalled else now), self.answer


class _Queue(_Stall):
    """One after the other."""

    def __init__(self, service_s: float, most_waiting: int) -> None:
        super().__init__(0.0, 0.0, (b"200 OK", ANSWER), [])
        self._service_s, self._most_waiting, self._free_s = service_s, most_waiting, 0.0

    def answer_at_s(self) -> tuple[float, tuple[bytes, bytes]]:
        now = self.loop.time()
        if self._free_s - now > self._most_waiting * self._service_s:
            return now, _REFUSAL
        self._free_s = max(self._free_s, now) + self._service_s
        return self._free_s, self.answer


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
    with _running(_Stall(from_s, until_s, answer, [] if answered_s is None else answered_s)) as url:
        yield url


@contextmanager
def queueing_server(service_s: float, most_waiting: int) -> Iterator[str]:
    """The URL of a running server that can answer 1 / `service_s` requests a second."""
    with _running(_Queue(service_s, most_waiting)) as url:
        yield url


@contextmanager
def _running(stall: _Stall) -> Iterator[str]:
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
