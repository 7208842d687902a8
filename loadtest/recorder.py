"""Notes what became of every request of a live run, as it happens; at its end a `Record`, which `live_results` judges.

Times are seconds from the start of the schedule, by the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt

from loadtest.client import Answered, Expired, Failed, PointUsed, Reply, Shed
from loadtest.outcomes import REASON_CODES, SHED_CODES, Outcome, Outcomes


@dataclass
class Tally:
    """What ended lately, for the progress bar.

    Attributes:
        gained: sum of the accuracies of the points of answers in time.
        labelled, right: answers to images with a known class, and those with that class.
        latency_s: of those that were not refused.
    """

    finished: int = 0
    shed: int = 0
    met: int = 0
    gained: float = 0.0
    labelled: int = 0
    right: int = 0
    latency_s: array[float] = field(default_factory=lambda: array("d"))


@dataclass(frozen=True, eq=False)
class Record:
    """N requests in the order in which they were due, sent or not.

    Attributes:
        start_s: of the schedule, on the monotonic clock.
        due_s, sent_s: (N,) NaN where it was not sent.
        send_latency_s: (N,) as `latency_s`, from the sending.
        gateway_met: (N,) bool, in time by the gateway's clock.
        failures: place and reason.
        outcomes: rungs are indices into `points`.
        cpu_s: processor time of the sending process.
        interrupted: stopped by hand.
    """

    start_s: float
    due_s: npt.NDArray[np.float64]
    sent_s: npt.NDArray[np.float64]
    send_latency_s: npt.NDArray[np.float64]
    gateway_met: npt.NDArray[np.bool_]
    failures: tuple[tuple[int, str], ...]
    outcomes: Outcomes
    points: tuple[PointUsed, ...]
    cpu_s: float
    interrupted: bool

    @property
    def sent(self) -> npt.NDArray[np.bool_]:
        """(N,)"""
        return ~np.isnan(self.sent_s)


class Recorder:
    """Columns of a live run.

    Arguments:
        grace_s: beyond the deadline; an answer within both is in time.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._due_s, self._deadline_s, self._label = array("d"), array("d"), array("q")
        self._sent_s, self._latency_s, self._send_latency_s = array("d"), array("d"), array("d")
        self._queue_s, self._inference_s = array("d"), array("d")
        self._outcome, self._reason, self._rung = array("B"), array("B"), array("h")
        self._right, self._gateway_met = array("B"), array("B")
        self._failures: list[tuple[int, str]] = []
        self._points: dict[PointUsed, int] = {}
        self._tally = Tally()
        self.finished = 0

    def expect(self, due_s: Iterable[float], deadline_s: Iterable[float], labels: Iterable[int]) -> None:
        """Room for more requests, in the order in which they are due.

        Arguments:
            deadline_s: from the time when it is due.
            labels: class index of the image that is sent, -1 where it is unknown.
        """
        before = len(self._due_s)
        for column, values in ((self._due_s, due_s), (self._deadline_s, deadline_s)):
            column.extend(values)
        self._label.extend(labels)
        more = len(self._due_s) - before
        for times in (self._sent_s, self._latency_s, self._send_latency_s, self._queue_s, self._inference_s):
            times.extend(array("d", [np.nan]) * more)
        for codes in (self._reason, self._right, self._gateway_met):
            codes.extend(bytes(more))
        self._outcome.extend(bytes([Outcome.unfinished]) * more)
        self._rung.extend(array("h", [-1]) * more)

    def sent(self, index: int, now: float) -> None:
        """Request `index` is about to be written to its connection."""
        self._sent_s[index] = now

    def ended(self, index: int, reply: Reply, now: float) -> None:
        """`reply` was there at `now`."""
        latency_s, tally = now - self._due_s[index], self._tally
        deadline_s = self._deadline_s[index] + self._grace_s
        self.finished += 1
        tally.finished += 1
        match reply:
            case Shed():
                self._outcome[index] = SHED_CODES[reply.reason]
                tally.shed += 1
                return
            case Answered():
                met = latency_s <= deadline_s
                self._outcome[index] = Outcome.met if met else Outcome.late
                self._rung[index] = self._points.setdefault(reply.point, len(self._points))
                self._reason[index] = REASON_CODES[reply.reason]
                self._queue_s[index], self._inference_s[index] = reply.queue_s, reply.inference_s
                self._gateway_met[index] = reply.deadline_met
                if met:
                    tally.met += 1
                    tally.gained += reply.point.accuracy or 0.0
                if self._label[index] >= 0:
                    self._right[index] = right = reply.index == self._label[index]
                    tally.labelled += 1
                    tally.right += right
            case Expired() | Failed():
                self._outcome[index] = Outcome.expired if isinstance(reply, Expired) else Outcome.failed
                if isinstance(reply, Failed):
                    self._failures.append((index, reply.why))
                latency_s = max(latency_s, deadline_s)  # who waits in vain waits no shorter than who gets it late
        self._latency_s[index] = latency_s
        self._send_latency_s[index] = latency_s - (self._sent_s[index] - self._due_s[index])
        tally.latency_s.append(latency_s)

    def take_tally(self) -> Tally:
        """What ended since the last call."""
        tally, self._tally = self._tally, Tally()
        return tally

    def record(self, start_s: float, cpu_s: float, *, interrupted: bool) -> Record:
        """Everything."""
        no_batches = Outcomes.empty(0)
        return Record(
            start_s,
            np.array(self._due_s),
            np.array(self._sent_s),
            np.array(self._send_latency_s),
            np.array(self._gateway_met, np.bool_),
            tuple(self._failures),
            Outcomes(
                np.array(self._outcome, np.uint8),
                np.array(self._deadline_s),
                np.array(self._rung, np.int16),
                np.array(self._reason, np.uint8),
                np.array(self._queue_s),
                np.array(self._latency_s),
                np.array(self._inference_s),
                np.array(self._label) >= 0,
                np.array(self._right, np.bool_),
                no_batches.batch_size,
                no_batches.decision_s,
            ),
            tuple(self._points),
            cpu_s,
            interrupted,
        )


def interleaved(records: Sequence[Record]) -> Record:
    """One of R records, of which the r-th holds every R-th request from the r-th on. Rungs are those of all."""
    step, size = len(records), sum(len(record.due_s) for record in records)
    points = tuple(dict.fromkeys(point for record in records for point in record.points))
    outcomes = Outcomes.empty(size)
    columns = {name: np.empty(size) for name in ("due_s", "sent_s", "send_latency_s")}
    gateway_met = np.empty(size, np.bool_)
    failures = []
    for first, record in enumerate(records):
        for each in fields(Outcomes):
            if each.name not in ("rung", "batch_size", "decision_s"):
                getattr(outcomes, each.name)[first::step] = getattr(record.outcomes, each.name)
        codes = np.array([*map(points.index, record.points), -1], np.int16)  # a rung of -1, no answer, reads the last
        outcomes.rung[first::step] = codes[record.outcomes.rung]
        for name, column in columns.items():
            column[first::step] = getattr(record, name)
        gateway_met[first::step] = record.gateway_met
        failures += [(first + step * index, why) for index, why in record.failures]
    return Record(
        start_s=records[0].start_s,
        **columns,
        gateway_met=gateway_met,
        failures=tuple(failures),
        outcomes=outcomes,
        points=points,
        cpu_s=sum(record.cpu_s for record in records),
        interrupted=any(record.interrupted for record in records),
    )
