"""uvicorn's connection, with limits for the heads of requests, an end that lets the last answer arrive, and two changes
that spare each request some work (docs/request-path.md).

A head has a limit of time, whether it comes slowly or not at all, and one of size. uvicorn has neither before the first
request of a connection, or once a head has begun.

After an answer that closes the connection the rest of an upload is taken for a while and forgotten: bytes that nobody
has read reset a connection that is closed, and the answer may be lost with it.

It tells a request's handler at once that its client has gone. ASGI tells it only to who waits in `receive`: a task more
per request, made and cancelled.

It sends the head of an answer together with the first piece of its body. uvicorn writes them one after the other, and
uvloop makes a system call, and the client a turn of its loop, of each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, cast

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Chosen, not tuned: as long as an upload may take by default, and more than any browser or proxy sends.
_HEAD_S: Final = 10.0
_HEAD_BYTES: Final = 64 << 10
_TOO_LARGE: Final = b"the head of the request has too many bytes; at most %d are accepted" % _HEAD_BYTES

# Chosen, not tuned: for a client that hears the end to stop sending; uvicorn's own shutdown waits longer.
_LINGER_S: Final = 2.0

_LEAVE = "leave"  # in the state of a request's scope


def when_client_leaves(scope: Scope, leave: Callable[[], None] | None) -> None:
    """`leave` is called if the connection is lost from now on; None takes that back.

    To be called when the body has been read, with no wait in between: before that, `receive` tells.
    """
    scope["state"][_LEAVE] = leave


class Connection(HttpToolsProtocol):
    """For `uvicorn.Config(http=...)`."""

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._joined = _Joined(transport, self._lingers)
        self.transport = cast(asyncio.Transport, self._joined)
        self._heads = 0  # that have begun
        self._in_head = self._too_large = False
        self._head_bytes = 0  # in pieces that hold nothing else
        self._head_timer: asyncio.TimerHandle | None = None
        self._await_head()

    def data_received(self, data: bytes) -> None:
        head = self._heads if self._in_head else None
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head and self._heads == head:
            self._head_bytes += len(data)
            if self._head_bytes > _HEAD_BYTES:
                self._refuse_head()
                return
        if self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._await_head()  # the rest of it; uvicorn has ended its limit for idle connections

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._heads += 1
        self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self.transport.is_closing():  # nothing more is answered
            return
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > _HEAD_BYTES:
            self._too_large = True
            raise ValueError(_TOO_LARGE.decode())  # the way out of the parser; `send_400_response` follows
        self._stop_timer()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        if self._too_large:
            self._refuse_head()
        else:
            super().send_400_response(msg)

    def _lingers(self) -> bool:
        """At the end, for the rest of a body. Starts to."""
        if self.cycle is None or not self.cycle.more_body or not self.cycle.response_complete:
            return False
        self.flow.resume_reading()
        self.loop.call_later(_LINGER_S, self._joined.all_read)
        return True

    def _refuse_head(self) -> None:
        self.transport.write(
            b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain; charset=utf-8\r\n"
            b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (len(_TOO_LARGE), _TOO_LARGE)
        )
        self.transport.close()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(_HEAD_S, self.transport.close)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def on_message_complete(self) -> None:
        super().on_message_complete()
        # A large body has paused reading, and who does not read does not see that the connection is lost. Requests that
        # wait for this one's answer have paused it for good reason.
        if not self.pipeline:
            self.flow.resume_reading()
        self._joined.all_read()

    def on_response_complete(self) -> None:
        self._joined.flush()  # an answer without a body
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)
        if self.cycle is not None and (leave := self.cycle.scope["state"].get(_LEAVE)) is not None:
            leave()


class _Joined:
    """A transport that holds the head of an answer back until something follows: more to write, the end of the answer,
    or of the connection. All else is the transport's.

    Arguments:
        lingers: asked when the connection is closed: only our direction is, until `all_read`.
    """

    def __init__(self, transport: asyncio.Transport, lingers: Callable[[], bool]) -> None:
        self._transport = transport
        self._head = b""
        self._lingers = lingers
        self._lingering = False

    def write(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(b"HTTP/1.1 ") and not data.startswith(
            b"HTTP/1.1 100 "
        ):  # the client waits for 100 Continue
            self._head = data
            return
        self._transport.write(data)

    def flush(self) -> None:
        if self._head:
            self.write(b"")

    def close(self) -> None:
        if self._lingering and not self._transport.is_closing():
            return
        self.flush()
        if not self._transport.is_closing() and self._lingers():
            self._lingering = True
            self._transport.write_eof()
        else:
            self._transport.close()

    def is_closing(self) -> bool:
        return self._lingering or self._transport.is_closing()

    def all_read(self) -> None:
        if self._lingering:
            self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
