"""An event loop on a virtual clock: when nothing is ready, time jumps to the next timer. Nothing ever sleeps.

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(main())

For code that waits for nothing but timers of its own loop: with threads and sockets no clock can be virtual.
"""

from __future__ import annotations

import asyncio
import selectors


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """Starts at 0 s.

    Raises, from `run_forever`:
        RuntimeError: nothing is ready and no timer is set, so nothing could ever happen again.
    """

    def __init__(self) -> None:
        self._now_s = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self._now_s

    def jump(self) -> None:
        """To the next timer."""
        if not self._scheduled:
            raise RuntimeError("deadlock: every task waits, and no timer is set")
        # Exactly there: adding the time that is left to the time now would differ in the last bit.
        self._now_s = max(self._now_s, self._scheduled[0].when())


class _JumpingSelector(selectors.SelectSelector):
    """Where a selector would wait, lets the clock jump. Sockets are polled: the loop has one to wake itself."""

    def __init__(self, loop: VirtualClockLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and (timeout is None or timeout > 0):
            self._loop.jump()
        return ready
