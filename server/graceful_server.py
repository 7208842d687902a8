"""uvicorn, with signals that an operator expects.

    SIGTERM, SIGINT    unready first, still listening; finish what is inside; close. A second one closes at once
    SIGHUP             read policy.toml again

uvicorn's own reaction to SIGTERM closes the listener before anything else: load balancers would meet a refused
connection where they should read an unready answer.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Coroutine
from types import FrameType
from typing import Any

import uvicorn

from server.gateway import Gateway
from server.policy_file import PolicyError
from server.workers.link import Link

logger = logging.getLogger(__name__)


class GracefulServer(uvicorn.Server):
    """Serves one gateway.

    Arguments:
        delay_s, drain_timeout_s: see `Gateway.drain`.
        link: to the supervisor, where there is one.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        gateway: Gateway,
        delay_s: float,
        drain_timeout_s: float,
        link: Link | None = None,
    ) -> None:
        super().__init__(config)
        self._link = link
        self._gateway, self._delay_s, self._drain_timeout_s = gateway, delay_s, drain_timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself holds them weakly
        self._stopping = False

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        if self._link is not None:
            self._start(self._link.listen(self._gateway, self))
        has_signals = threading.current_thread() is threading.main_thread()
        if has_signals:
            self._loop.add_signal_handler(signal.SIGHUP, self.reload)
        try:
            await super().serve(sockets)
        finally:
            if has_signals:
                self._loop.remove_signal_handler(signal.SIGHUP)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if sockets is not None and self._link is None:  # of sockets that others made uvicorn says nothing
            self._log_started_message(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)  # notes the signal, to raise it again when all is closed
        self.should_exit = False
        self.stop()

    def reload(self) -> None:
        """As SIGHUP does."""
        self._start(self._reload())

    def drain(self) -> None:
        """As the first SIGTERM does; it may have come already."""
        if not self._stopping:
            self.stop()

    def stop(self) -> None:
        """As SIGTERM does. From any thread."""
        if self._loop is None or self._stopping:
            self.should_exit = self.force_exit = True
            return
        self._stopping = True
        self._loop.call_soon_threadsafe(self._start, self._drain())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _drain(self) -> None:
        try:
            await self._gateway.drain(self._delay_s, self._drain_timeout_s)
        finally:
            self.should_exit = True

    async def _reload(self) -> None:
        try:
            await self._gateway.reload_policy()
        except PolicyError as error:
            logger.error("%s; the policy in force stays", error)
