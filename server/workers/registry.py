"""The series of several workers as one: prometheus_client's multi-process mode.

Every worker keeps its values in files of a directory that all share, named after its number. `/metrics` of any worker
reads all of them and adds up. A worker that replaces another one goes on counting in its files, so nothing that was
counted is lost and the directory does not grow; gauges of a dead worker are removed (`forget`). What a single gateway
reads when it is scraped (length of the queue, and so on) has to stand in the files before somebody else is: it is
written four times a second.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, multiprocess, values
from prometheus_client.metrics_core import Metric

# Chosen, not tuned: well below any interval of scrapes, and a handful of writes each time.
_REFRESH_S: Final = 0.25


class SharedRegistry(CollectorRegistry):
    """Takes one worker's series, gives the sums over all of them. Made before the first series.

    Arguments:
        directory: shared by the workers and nobody else.
        number: of this worker; its successors have the same one.
    """

    def __init__(self, directory: Path, number: int) -> None:
        super().__init__()
        # As prometheus_client does on import where the variable is set then, but with the number for the process id.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
        values.ValueClass = values.MultiProcessValue(lambda: number)  # type: ignore[no-untyped-call]
        self._all = multiprocess.MultiProcessCollector(None, str(directory))  # type: ignore[no-untyped-call]
        self._updates: list[Callable[[], None]] = []

    def on_refresh(self, update: Callable[[], None]) -> None:
        """Calls `update` whenever values must be true: when this worker is scraped, and now and then for the others."""
        self._updates.append(update)

    async def keep_fresh(self) -> None:
        """Until cancelled."""
        while True:
            self._refresh()
            await asyncio.sleep(_REFRESH_S)

    def collect(self) -> Iterable[Metric]:
        self._refresh()
        found: Iterable[Metric] = self._all.collect()  # type: ignore[no-untyped-call]
        return found

    def _refresh(self) -> None:
        for update in self._updates:
            update()


def forget(directory: Path, number: int) -> None:
    """Removes the gauges of a worker that has ended."""
    multiprocess.mark_process_dead(number, str(directory))  # type: ignore[no-untyped-call]
