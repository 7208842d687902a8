"""The progress bar of a live run: how far, and the figures of the last requests."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loadtest.outcomes import Outcome

if TYPE_CHECKING:
    from loadtest.recorder import Recorder


class LiveProgress:
    """A line on the terminal; of the last 1,000 requests p99, shed, in time and effective accuracy."""

    def __init__(self, total: int, console: Console) -> None:
        columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))
        self._progress = Progress(*columns, console=console, transient=True, auto_refresh=False)
        self._task = self._progress.add_task("", total=total, figures="")
        self._last = (time.monotonic(), 0)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def update(self, recorder: Recorder) -> None:
        """Draws once; the caller says when, so that no thread of ours competes with the sending."""
        then_s, before = self._last
        self._last = (time.monotonic(), recorder.finished)
        rate_hz = (recorder.finished - before) / max(self._last[0] - then_s, 1e-9)
        figures = f"{rate_hz:5.0f}/s"
        if recorder.recent:
            latency_s, outcome, gained = map(np.array, zip(*recorder.recent, strict=True))
            known_s = latency_s[~np.isnan(latency_s)]
            p99 = f"{1000 * np.percentile(known_s, 99):.0f}" if len(known_s) else "-"
            figures += (
                f"  p99 {p99} ms  shed {100 * (outcome == Outcome.SHED).mean():.1f} %"
                f"  in time {100 * (outcome == Outcome.met).mean():.1f} %  eff. acc. {100 * gained.mean():.1f} %"
            )
        self._progress.update(self._task, completed=recorder.finished, figures=figures)
        self._progress.refresh()
