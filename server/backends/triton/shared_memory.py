"""Images in shared memory in place of the message, for a server on this host: regions, and who may write into which.

A region belongs to one call at a time, and only an answer shows that the server has read it. After any other end (a
timeout, a cancellation, a lost connection) it may still be about to, so the region is never written again: it is given
up and a new one takes its place. The server keeps the old memory, with the old images, until it agrees to let it go.

A segment has a name only until the server has mapped it. From then on nothing is left in /dev/shm, however gateway and
server end. This, and memory that is there before anybody writes (where /dev/shm is full, a write into a page that is
not there kills the process), is why `tritonclient.utils.shared_memory` is not used.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from server.backends.base import BackendError
from server.backends.triton.failure import CallFailed

logger = logging.getLogger(__name__)

# Where Linux has what shm_open(3) opens, see shm_overview(7).
SEGMENTS: Final = Path("/dev/shm")
# Older servers unmap a region that a request is about to read, and crash over it
# (https://github.com/triton-inference-server/server/pull/7567).
_OLDEST: Final = (2, 50)
# At close, for the server to finish with what was given up. Chosen, not tuned: longer than most batches.
_CLOSE_S: Final = 1.0
_CLOSE_STEP_S: Final = 0.05


class Registry(Protocol):
    """What a server maps. Both raise `CallFailed`."""

    async def register(self, name: str, size_bytes: int) -> None: ...

    async def unregister(self, name: str) -> None:
        """Does nothing where the name is unknown."""


class Region:
    """A new segment, readable by this user; raises OSError where there is no memory for it.

    Attributes:
        name: of the segment and, for the server, of the region; no other process has it.
    """

    def __init__(self, size_bytes: int) -> None:
        self.name = f"vmoe_gateway_{os.getpid()}_{uuid.uuid4().hex}"  # containers repeat process ids
        self._path = SEGMENTS / self.name
        descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size_bytes)
            self._memory = mmap.mmap(descriptor, size_bytes)
        except BaseException:
            self.unlink()
            raise
        finally:
            os.close(descriptor)

    def holds(self, values: npt.NDArray[Any]) -> bool:
        return values.nbytes <= len(self._memory)

    def write(self, values: npt.NDArray[Any]) -> None:
        np.copyto(np.ndarray(values.shape, values.dtype, self._memory), values)

    def unlink(self) -> None:
        """Takes the name away; whoever has mapped the memory keeps it."""
        self._path.unlink()

    def close(self) -> None:
        self._memory.close()


class SharedImages:
    """The regions of one server.

    Arguments:
        registry: the server's.
        size_bytes: of a region; 0 leaves all images in the message.
    """

    def __init__(self, registry: Registry, size_bytes: int) -> None:
        self._registry, self._size_bytes = registry, size_bytes
        self._free: list[Region] = []
        self._lent = 0
        self._given_up: list[str] = []  # names of what the server may have mapped

    @contextmanager
    def lend(self) -> Iterator[Region | None]:
        """For one call, which has been answered when the block ends without an exception; None where all are lent."""
        if not self._free:
            yield None
            return
        region = self._free.pop()
        self._lent += 1
        try:
            yield region
        except BaseException:
            self._give_up(region)
            raise
        else:
            self._free.append(region)
        finally:
            self._lent -= 1

    async def refill(self, count: int, *, fresh: bool) -> None:
        """Lets go of what was given up, and replaces it.

        Arguments:
            count: of regions, free and lent. With those that wait to be let go they are never more than twice as many.
            fresh: the server may be another process than it was, which knows none of the regions.

        Raises:
            CallFailed
            BackendError: the server cannot share memory with this process. Unless `fresh`, images go in the message
                instead.
        """
        if not self._size_bytes:
            return
        while fresh and self._free:
            self._give_up(self._free.pop())
        await self._let_go()
        try:
            while len(self._free) + self._lent < count and len(self._given_up) <= count:
                await self._add()
        except BackendError as error:
            if fresh:
                raise
            logger.debug("images go in the message: %s", error)

    async def close(self) -> None:
        """No region is lent."""
        while self._free:
            self._give_up(self._free.pop())
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self._let_go()
                while self._given_up:
                    await asyncio.sleep(_CLOSE_STEP_S)
                    await self._let_go()
        except (CallFailed, TimeoutError) as error:
            # A server that has gone has nothing mapped; one that still reads lets go of it when it stops.
            logger.debug("%d shared memory regions stay registered: %s", len(self._given_up), error)

    async def _add(self) -> None:
        try:
            region = Region(self._size_bytes)
        except OSError as error:
            raise BackendError(
                f"triton_shared_memory needs {self._size_bytes} bytes more of shared memory, and {SEGMENTS} has not "
                f"got them: {error}"
            ) from error
        try:
            await self._registry.register(region.name, self._size_bytes)
        except BaseException as error:
            self._give_up(region)  # an attempt that was cancelled may have succeeded
            if isinstance(error, CallFailed) and error.failure.reason == "model":
                raise BackendError(
                    f"triton_shared_memory is on, and the server cannot map a segment of this process: "
                    f"{error.failure.detail}; it must run on this host, see this {SEGMENTS}, and be of the same user, "
                    f"or the setting be off"
                ) from error
            raise
        finally:
            region.unlink()
        self._free.append(region)

    def _give_up(self, region: Region) -> None:
        region.close()
        self._given_up.append(region.name)

    async def _let_go(self) -> None:
        for name in tuple(self._given_up):
            try:
                await self._registry.unregister(name)
            except CallFailed as error:
                if "in use" not in error.failure.detail:
                    raise
            else:  # done, or to be done when the last request that reads it has ended (2.52 and newer)
                self._given_up.remove(name)


def check_version(version: str) -> None:
    """Raises `BackendError` for a server that is not safe to share memory with."""
    if tuple(map(int, version.split(".")[:2])) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise BackendError(f"triton_shared_memory needs Triton {oldest} or newer, and the server is {version}")
