"""What every request gets, whatever becomes of it: an id, a count in the metrics, and an answer.

Plain ASGI, outside everything else, so that refusals by the framework and unexpected exceptions pass through it too.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Callable
from typing import cast

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.metrics import INVALID, Metrics
from server.problems import build_problem, respond

logger = logging.getLogger(__name__)

CLASSIFY_PATH = "/classify"
_HEADER = b"x-request-id"  # as ASGI has names
# Goes into logs and headers: short, and no character that could forge a line.
_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


def request_id_of(scope: Scope) -> str:
    return cast(str, scope["state"]["request_id"])


def set_budget(scope: Scope, budget: str) -> None:
    """Names the label under which this request counts; `invalid` until then."""
    scope["state"]["budget"] = budget


class RequestContext:
    """ASGI middleware. Takes over an incoming X-Request-ID of a sane form, or makes one; every answer carries it.

    Arguments:
        leaving: the server is about to stop. Answers say so, or clients would keep a connection that closes.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, leaving: Callable[[], bool]) -> None:
        self._app, self._metrics, self._leaving = app, metrics, leaving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = next((value for name, value in scope["headers"] if name == _HEADER), b"")
        request_id = sent.decode() if _SANE_ID.fullmatch(sent) else os.urandom(16).hex()
        scope["state"] = {**scope.get("state", {}), "request_id": request_id, "budget": INVALID}
        if scope["path"] != CLASSIFY_PATH:
            await self._answer(scope, receive, send)
            return
        now = asyncio.get_running_loop().time
        started_s, status = now(), 500  # 500 stands when the server cancels the request at shutdown
        with self._metrics.request_in_flight():
            try:
                status = await self._answer(scope, receive, send)
            finally:
                self._metrics.request_done(scope["state"]["budget"], status, now() - started_s)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> int:
        """Returns the status that was sent."""
        request_id = request_id_of(scope)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (_HEADER, request_id.encode())]
                if self._leaving():
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:  # the last line of defence; the client learns nothing but the id
            logger.exception("request %s failed", request_id)
            if status:
                raise  # the answer has begun: the server must cut the connection
            problem = build_problem(500, "internal_error", "Internal error", "the error was logged", request_id)
            await respond(problem)(scope, receive, send_with_id)
        return status
