"""One Triton server as the choice among several sees it: breaker, window and what is in flight. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Iterable

from server.backends.triton.breaker import Breaker
from server.backends.triton.failure import Failure
from server.backends.triton.window import Window

# Weight of the newest batch in the mean that `expected_s` uses. Chosen, not tuned.
_SMOOTHING = 0.1


class Endpoint:
    """Arguments:
        name: a label of the metrics.
        cap_s: of the breaker's backoff.

    Attributes:
        in_flight: batches.
        started: batches so far.
    """

    def __init__(self, name: str, cap_s: float) -> None:
        self.name = name
        self.breaker = Breaker(cap_s)
        self.window = Window(1)
        self.in_flight = self.started = 0
        self._instances = 1
        self._ratio: float | None = None  # usual time over the profile's

    @property
    def capacity(self) -> int:
        """Batches that it may have in flight: none while open, the trial while half open."""
        return {"open": 0, "half_open": 1, "closed": self.window.size}[self.breaker.state]

    def serves(self, instances: int) -> None:
        """The server's model has so many instances."""
        if instances != self._instances:
            self._instances, self.window = instances, Window(instances)

    def start(self) -> int:
        """Returns how many are in flight now."""
        self.in_flight += 1
        self.started += 1
        return self.in_flight

    def finish(self) -> None:
        """However it went."""
        self.in_flight -= 1

    def answered(self, seconds: float, profiled_s: float, batch_size: int, in_flight: int) -> None:
        """A batch was.

        Arguments:
            profiled_s: what the profile says that it takes.
            in_flight: when it started.
        """
        ratio = seconds / profiled_s
        self._ratio = ratio if self._ratio is None else self._ratio + _SMOOTHING * (ratio - self._ratio)
        self.window.answered(ratio, batch_size, in_flight)
        self.breaker.answered()

    def failed(self, failure: Failure, now: float) -> None:
        """A batch or a probe did. A full queue is no sign of ill health."""
        if failure.overload:
            self.window.overloaded()
        if failure.reason != "queue_full":
            self.breaker.failed(now, for_certain=failure.for_certain)

    def expected_s(self, profiled_s: float) -> float:
        """How long a batch takes here, by the mean of late."""
        return profiled_s * (1.0 if self._ratio is None else self._ratio)


def choose(endpoints: Iterable[Endpoint], avoid: Endpoint | None = None) -> Endpoint | None:
    """The one that is least loaded for its window, of equals the one that got fewest batches; None when all are out.

    A full one is chosen where no other is left: windows may have shrunk since the batch was formed, and a retry comes
    on top. Its server's queue takes what its window does not.

    Arguments:
        avoid: the endpoint that has just failed.
    """
    usable = [
        endpoint
        for endpoint in endpoints
        if endpoint is not avoid
        and (endpoint.capacity if endpoint.breaker.state == "closed" else endpoint.capacity > endpoint.in_flight)
    ]
    return min(usable, key=lambda each: ((each.in_flight + 1) / each.capacity, each.started), default=None)
