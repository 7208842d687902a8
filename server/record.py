"""Writes the arrivals of POST /classify to a file, as a trace that `python -m loadtest` reads.

    arrival_s,budget,deadline_ms        arrival_s counts from the first row, deadline_ms is empty for the budget's own
    0.000000,auto,
    0.081225,low,50

One row per image, at the time of its request's headers: when a client would send it again. Refused requests are part of
the load and have their rows; a body that broke off, or was none, has nothing to send again and gets none. Rows stand in
order of arrival, so each waits for the uploads that began before its own. What the columns cannot say is left out: a
request with a point of its own counts as one of budget `auto`, `min_accuracy` is not kept. Nothing of the client and
nothing of its images is written.

The file is written from a thread, once a second and at the end. Whatever goes wrong with it ends the recording with a
line in the log and leaves whole rows; it never disturbs serving.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from server.budgets import DEFAULT_BUDGET
from server.errors import QueueFull
from server.metrics import CUSTOM

logger = logging.getLogger(__name__)

_HEADER: Final = b"arrival_s,budget,deadline_ms\n"
_PERIOD_S: Final = 1.0  # what a crash may lose; chosen, not tuned
_MAX_PENDING: Final = 200_000  # arrivals in memory, some 20 MB, where the disk hangs; chosen, not tuned


class RecordError(ValueError):
    """A recording that cannot begin; the message names the file."""


class Arrival:
    """A request whose upload may still be on its way.

    Attributes:
        images: None until it is known.
    """

    __slots__ = ("arrival_s", "budget", "deadline_ms", "images")

    def __init__(self, arrival_s: float, budget: str, deadline_ms: float | None) -> None:
        self.arrival_s, self.budget, self.deadline_ms = arrival_s, budget, deadline_ms
        self.images: int | None = None

    def uploaded(self, images: int) -> None:
        """Only the first call counts."""
        if self.images is None:
            self.images = images


class Recorder:
    """One recording.

    Arguments:
        path: must not exist.
        max_bytes: where the recording ends.

    Raises:
        RecordError: the file cannot be created.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path, self._max_bytes = path, max_bytes
        try:
            # Unbuffered: what a write did not take is known at once, not at some later flush.
            self._file = path.open("xb", buffering=0)
        except FileExistsError as error:
            raise RecordError(f"record: {path} exists and would be overwritten; name another file") from error
        except OSError as error:
            raise RecordError(f"record: cannot create {path}: {error.strerror}") from error
        self._first_s: float | None = None
        self._pending: deque[Arrival] = deque()
        self._size_bytes = 0  # of whole rows in the file
        self._stopped = asyncio.Event()  # by a failure, the limit or `close`
        self._writing: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to write; call it in the event loop."""
        self._writing = asyncio.create_task(self._write_now_and_then(), name="record")
        logger.info("recording arrivals to %s, up to %d bytes", self._path, self._max_bytes)

    @contextmanager
    def arrival(self, arrival_s: float, budget: str, deadline_ms: float | None) -> Iterator[Arrival]:
        """Holds the request's place in the order; the caller says how many images came with the upload.

        Arguments:
            arrival_s: on any clock; not before that of the last call.
            deadline_ms: None for the budget's own.
        """
        arrival = Arrival(arrival_s, DEFAULT_BUDGET if budget == CUSTOM else budget, deadline_ms)
        if len(self._pending) == _MAX_PENDING:
            logger.error(
                "recording to %s ends: the disk is %d arrivals behind; serving goes on", self._path, _MAX_PENDING
            )
            self._end()
        if not self._stopped.is_set():
            self._pending.append(arrival)
        try:
            yield arrival
        except QueueFull:
            arrival.uploaded(1)  # refused before all of the body was read: one image at least
            raise
        finally:
            arrival.uploaded(0)

    async def close(self) -> None:
        """Writes what is left. A file without a row is removed: it would only be in the way of the next start."""
        self._stopped.set()
        if self._writing is not None:
            await self._writing
        await asyncio.to_thread(self._finish)

    async def _write_now_and_then(self) -> None:
        while not self._stopped.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), _PERIOD_S)
            await self._write()

    async def _write(self) -> None:
        """Hands the rows whose turn it is to a thread."""
        rows = []
        while self._pending and self._pending[0].images is not None:
            rows.append(self._pending.popleft())
        if rows and not await asyncio.to_thread(self._append, rows):
            self._end()

    def _end(self) -> None:
        self._stopped.set()
        self._pending.clear()

    def _append(self, rows: list[Arrival]) -> bool:
        """False once the recording has ended."""
        if self._file.closed:
            return False
        lines = [self._line(row) for row in rows if row.images]
        if lines and not self._size_bytes:
            lines.insert(0, _HEADER)
        size_bytes = self._size_bytes
        data = bytearray()
        full = False
        for line in lines:
            full = size_bytes + len(data) + len(line) > self._max_bytes
            if full:
                break
            data += line
        try:
            taken, why = self._file.write(data), "the disk takes no more"
        except OSError as error:
            taken, why = 0, str(error.strerror)
        self._size_bytes += taken
        if taken < len(data):
            logger.error("recording to %s ends: %s; serving goes on", self._path, why)
            self._size_bytes += data.rfind(b"\n", 0, taken) + 1 - taken  # whole rows only
            self._file.truncate(self._size_bytes)
            self._file.close()
            return False
        if full:
            logger.warning(
                "recording to %s ends at record_max_bytes (%d); serving goes on", self._path, self._max_bytes
            )
            self._file.close()
        return not full

    def _line(self, row: Arrival) -> bytes:
        if self._first_s is None:
            self._first_s = row.arrival_s
        deadline_ms = "" if row.deadline_ms is None else f"{row.deadline_ms:.9g}"
        return f"{row.arrival_s - self._first_s:.6f},{row.budget},{deadline_ms}\n".encode() * (row.images or 0)

    def _finish(self) -> None:
        self._file.close()
        if not self._size_bytes:
            self._path.unlink(missing_ok=True)
