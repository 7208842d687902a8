"""The progress bar of a live run: how far, and the figures of the last requests."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from loadtest.recorder import Tally

# Chosen, not tuned: of 5 s, and drawn four times a second; shorter ones have no p99, longer ones hide what happens now.
_WINDOW_S = 5.0


class LiveProgress:
    """A line on the terminal: of the last 5 s answers per second, p99, shed, in time, effective and live accuracy."""

    def __init__(self, total: int | None, console: Console) -> None:
        columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))
        self._progress = Progress(*columns, console=console, transient=True, auto_refresh=False)
        self._task = self._progress.add_task("", total=total, figures="")
        self._recent: deque[tuple[float, Tally]] = deque()
        self._start_s = time.monotonic()
        self._finished = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def update(self, tally: Tally) -> None:
        """Draws once; the caller says when, so that no thread of ours competes with the sending."""
        now = time.monotonic()
        self._recent.append((now, tally))
        while self._recent[0][0] < now - _WINDOW_S:
            self._recent.popleft()
        self._finished += tally.finished
        span_s = min(now - self._start_s, _WINDOW_S)
        self._progress.update(self._task, completed=self._finished, figures=self._figures(span_s))
        self._progress.refresh()

    def _figures(self, span_s: float) -> str:
        tallies = [tally for _, tally in self._recent]
        finished = sum(tally.finished for tally in tallies)
        text = f"{finished / max(span_s, 1e-9):5.0f}/s"
        if not finished:
            return text
        latency_s = np.concatenate([np.array(tally.latency_s) for tally in tallies])
        # Not by a histogram, as in the report: recording in Python takes 7 us a value, and the sending waits meanwhile.
        p99 = f"{1000 * np.percentile(latency_s, 99):.0f}" if len(latency_s) else "-"
        shares = {name: 100 * sum(getattr(tally, name) for tally in tallies) for name in ("shed", "met", "gained")}
        text += (
            f"  p99 {p99} ms  shed {shares['shed'] / finished:.1f} %  in time {shares['met'] / finished:.1f} %"
            f"  eff. acc. {shares['gained'] / finished:.1f} %"
        )
        labelled = sum(tally.labelled for tally in tallies)
        return text + (f"  right {100 * sum(tally.right for tally in tallies) / labelled:.1f} %" if labelled else "")
