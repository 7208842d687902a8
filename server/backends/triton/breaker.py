"""Whether an endpoint gets any batches. No I/O; the caller brings the time.

    open ── probe passed ──> half_open ── batch answered ──> closed
      ^────── probe failed, batch failed ──┘                    │
      ^────── `FAILURES` in a row, or one that leaves no doubt ─┘

It begins open: nobody has asked the server yet. While open, probes are due after a backoff that doubles up to a cap.
"""

from __future__ import annotations

from typing import Final, Literal

BreakerState = Literal["closed", "half_open", "open"]
BREAKER_STATES: Final[tuple[BreakerState, ...]] = ("closed", "half_open", "open")

FAILURES: Final = 3  # chosen, not tuned: one timeout may be the deadline's fault, three in a row are the server's
FIRST_BACKOFF_S: Final = 0.1  # chosen, not tuned: less than any server needs to start


class Breaker:
    """Arguments:
        cap_s: of the backoff.

    Attributes:
        state: `half_open` is for one trial.
        probe_at_s: when an open breaker is due for a probe.
    """

    def __init__(self, cap_s: float) -> None:
        self.state: BreakerState = "open"
        self.probe_at_s = 0.0
        self._cap_s = cap_s
        self._backoff_s = self._first_s = min(FIRST_BACKOFF_S, cap_s)
        self._failures = 0

    def probe_passed(self) -> None:
        if self.state == "open":
            self.state = "half_open"

    def answered(self) -> None:
        """By a batch. One that comes back after the breaker opened proves nothing about now."""
        if self.state == "open":
            return
        self.state, self._failures, self._backoff_s = "closed", 0, self._first_s

    def failed(self, now: float, *, for_certain: bool) -> None:
        """A probe or a batch failed.

        Arguments:
            for_certain: the next one would fail, too.
        """
        self._failures += 1
        if self.state == "closed" and not for_certain and self._failures < FAILURES:
            return
        if self.state == "open" and now < self.probe_at_s:
            return  # a batch that was under way when it opened
        self.state, self._failures = "open", 0
        self.probe_at_s = now + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, self._cap_s)
