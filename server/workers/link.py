"""A worker's end of the pipe to its supervisor, in its event loop."""

from __future__ import annotations

import asyncio
import itertools
import logging
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Final, Protocol

from server.policy_file import ActivePolicy, PolicyError, PolicyText
from server.workers.messages import Applied, Apply, Failed, FromWorker, Go, Reload, Share, Shared, Stop, ToWorker, Warm

logger = logging.getLogger(__name__)

# Chosen, not tuned: a worker that has just been started reads its messages within a second or two.
_SHARED_S: Final = 10.0


class Follower(Protocol):
    """What a gateway does on the supervisor's word."""

    def go(self) -> None: ...

    async def follow(self, policy: PolicyText) -> None: ...


class Stoppable(Protocol):
    """What a server does; none of it waits, since messages come that it would wait for."""

    def reload(self) -> None: ...

    def drain(self) -> None: ...

    def stop(self) -> None: ...


class Link:
    """Belongs to one event loop.

    Attributes:
        replaces: another worker that has died: connections are better off with its siblings until this one is warm.
        policy: in force among the siblings; None for that of the settings.
        lost: the supervisor is gone.
    """

    def __init__(self, pipe: Connection, policy: PolicyText | None, *, replaces: bool) -> None:
        self._pipe, self.policy, self.replaces = pipe, policy, replaces
        self.lost = False
        self._inbox: asyncio.Queue[ToWorker | None] = asyncio.Queue()
        self._shares: dict[int, asyncio.Event] = {}
        self._keys = itertools.count()

    def warm(self, policy: ActivePolicy) -> None:
        """Could serve; `Follower.go` follows."""
        self._send(Warm(policy.as_text))

    def failed(self) -> None:
        """Will never serve."""
        self._send(Failed())

    async def share(self, policy: ActivePolicy) -> None:
        """Returns when it is in force in all workers, this one included."""
        key, done = next(self._keys), asyncio.Event()
        self._shares[key] = done
        self._send(Share(key, policy.as_text))
        try:
            async with asyncio.timeout(_SHARED_S):
                await done.wait()
        except TimeoutError:
            logger.warning("policy from %s: a worker has not put it in force within %g s", policy.source, _SHARED_S)
        finally:
            del self._shares[key]

    async def listen(self, gateway: Follower, server: Stoppable) -> None:
        """Does what the supervisor says, until cancelled. Stops the server when that is gone."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._pipe.fileno(), self._receive)
        try:
            while (message := await self._inbox.get()) is not None:
                match message:
                    case Go():
                        gateway.go()
                    case Apply(number, policy):
                        await self._apply(gateway, policy)
                        self._send(Applied(number))
                    case Shared(key):
                        if (done := self._shares.get(key)) is not None:  # else it took too long
                            done.set()
                    case Reload():
                        server.reload()
                    case Stop():
                        server.drain()
            self.lost = True
            logger.error("the supervisor is gone, so this worker stops")
            server.stop()
        finally:
            loop.remove_reader(self._pipe.fileno())

    def _receive(self) -> None:
        """A whole message: the supervisor writes it at once."""
        try:
            self._inbox.put_nowait(self._pipe.recv())
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())
            self._inbox.put_nowait(None)

    def _send(self, message: FromWorker) -> None:
        with suppress(OSError):  # the supervisor is gone, which `listen` hears as well
            self._pipe.send(message)

    async def _apply(self, gateway: Follower, policy: PolicyText) -> None:
        try:
            await gateway.follow(policy)
        except PolicyError as error:  # it suited a sibling, but not the bundle as this worker found it
            logger.error("%s; the policy in force stays in this worker", error)
