"""How many batches one endpoint gets at once, from how long they take. No I/O, no clock.

After TCP Vegas and the VegasLimit of Netflix's concurrency-limits. By Little's law, of n batches in flight that take t
each, where one that waits for nothing takes t0,

    waiting = n * (1 - t0 / t)

wait in the server's queue. A full window with less than LOW waiting grows by STEP_UP, one with more than HIGH shrinks
by STEP_DOWN, and a failure that tells of overload halves it. It begins at the number of the server's instances and
stays between 1 and twice as many. A second batch per instance is so kept only where network time would leave the
instance idle for about half as long as it computes; elsewhere it would wait in the server, out of any policy's reach.

Batches differ in size and operating points, so t is in units of the profile's time, and t0 is kept for each size: a low
quantile of t, which moves DOWN of the way to what is below it, and UP to what is above.
"""

from __future__ import annotations

from typing import Final

# Chosen by reckoning with one instance: a second batch that only waits makes `waiting` 1, one that hides as much
# network time as half the compute makes it 0.5.
LOW: Final = 0.5
HIGH: Final = 0.7
# Of the batches in flight: spread of latencies alone must not shrink a large window. t = 1.4 * t0 is still spread.
HIGH_SHARE: Final = 0.3
# A window that is too large by one is tried for one or two batches out of fifty.
STEP_UP: Final = 0.02
STEP_DOWN: Final = 0.25
DOWN: Final = 0.2
UP: Final = 0.002


class Window:
    """Attributes:
    limit: as the formula has it; `size` is the whole number below.
    most: that it can be.
    """

    def __init__(self, instances: int) -> None:
        self.limit = float(instances)
        self.most = 2 * instances
        self._least: dict[int, float] = {}  # t0 by batch size

    @property
    def size(self) -> int:
        return int(self.limit)

    def answered(self, ratio: float, batch_size: int, in_flight: int) -> None:
        """Learns from a batch.

        Arguments:
            ratio: measured time over the profile's.
            in_flight: batches when it started, itself included.
        """
        least = self._least.get(batch_size, ratio)
        least += (DOWN if ratio < least else UP) * (ratio - least)
        self._least[batch_size] = least
        waiting = in_flight * (1 - least / ratio)
        if waiting > max(HIGH, HIGH_SHARE * in_flight):
            self.limit = max(self.limit - STEP_DOWN, 1.0)
        elif waiting < LOW and in_flight >= self.size:
            self.limit = min(self.limit + STEP_UP, self.most)

    def overloaded(self) -> None:
        """A batch found the server's queue full, or took too long."""
        self.limit = max(self.limit / 2, 1.0)
