"""uvicorn's connection, which also tells a request's handler at once that its client has gone.

ASGI tells it only to who waits in `receive`: a task more per request, made and cancelled, some 20 microseconds each.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_LEAVE = "leave"  # in the state of a request's scope


def when_client_leaves(scope: Scope, leave: Callable[[], None] | None) -> None:
    """`leave` is called if the connection is lost from now on; None takes that back.

    To be called when the body has been read, with no wait in between: before that, `receive` tells.
    """
    scope["state"][_LEAVE] = leave


class Connection(HttpToolsProtocol):
    """For `uvicorn.Config(http=...)`."""

    def on_message_complete(self) -> None:
        super().on_message_complete()
        # A large body has paused reading, and who does not read does not see that the connection is lost. Requests that
        # wait for this one's answer have paused it for good reason.
        if not self.pipeline:
            self.flow.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.cycle is not None and (leave := self.cycle.scope["state"].get(_LEAVE)) is not None:
            leave()
