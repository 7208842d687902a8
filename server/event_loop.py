"""The gateway's event loop: uvloop's, where there is one, with a clock that can be measured with.

uvloop's own `time()` has a resolution of 1 ms and stands still during an iteration of the loop (MagicStack/uvloop#359).
A batch of a small model takes 2 ms: the latency model would learn from rounding, and answers would carry it.
"""

from __future__ import annotations

import asyncio
import sys
import time

if sys.platform == "win32":
    EventLoop = asyncio.ProactorEventLoop
else:
    import uvloop

    class EventLoop(uvloop.Loop):
        """Timers keep their resolution of 1 ms."""

        def time(self) -> float:
            """The clock that uvloop rounds."""
            return time.monotonic()
