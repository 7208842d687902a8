"""A trace: who arrives when, asking for what. As columns in memory, as CSV on disk.

    arrival_s,budget,deadline_ms,image
    0.013,auto,,shirt.png
    0.094,low,50,

Seconds from the start, ascending. `budget`, `deadline_ms` and `image` are optional, as columns and in every row:
without them a request is of budget `auto`, has the budget's own deadline, and may send any image. Traces in formats of
others: `loadtest.public_traces`.
"""

from __future__ import annotations

import csv
import hashlib
import logging
import math
from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loadtest.csv_rows import MOST_ROWS, CsvRows, Row, open_csv
from loadtest.errors import TraceError
from server.budgets import DEFAULT_BUDGET

COLUMNS = ("arrival_s", "budget", "deadline_ms", "image")
_CHUNK = 1 << 16

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Trace:
    """N requests.

    Attributes:
        arrival_s: (N,) float64, from the start of the trace, ascending.
        budget: (N,) int32 index into `budgets`.
        budgets: names.
        deadline_s: (N,) float64 from the arrival; NaN where the budget's own holds.
        image: (N,) int32 index into `images`; -1 where any image will do.
        images: names.
    """

    arrival_s: npt.NDArray[np.float64]
    budget: npt.NDArray[np.int32]
    budgets: tuple[str, ...]
    deadline_s: npt.NDArray[np.float64]
    image: npt.NDArray[np.int32]
    images: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        arrival_s: npt.ArrayLike,
        budget: npt.ArrayLike | None = None,
        budgets: Sequence[str] = (DEFAULT_BUDGET,),
        deadline_s: npt.ArrayLike | None = None,
        image: npt.ArrayLike | None = None,
        images: Sequence[str] = (),
    ) -> Trace:
        """From arrivals; one budget, its own deadline and any image unless told otherwise."""
        arrivals = np.asarray(arrival_s, np.float64)
        size = len(arrivals)
        if not (np.isfinite(arrivals).all() and (arrivals >= 0).all() and (np.diff(arrivals) >= 0).all()):
            raise TraceError("arrivals must be finite, 0 or later, and ascending")
        return cls(
            arrivals,
            np.zeros(size, np.int32) if budget is None else np.asarray(budget, np.int32),
            tuple(budgets),
            np.full(size, np.nan) if deadline_s is None else np.asarray(deadline_s, np.float64),
            np.full(size, -1, np.int32) if image is None else np.asarray(image, np.int32),
            tuple(images),
        )

    def __len__(self) -> int:
        return len(self.arrival_s)

    def part(self, keep: slice | npt.NDArray[np.bool_] | npt.NDArray[np.intp], start_s: float = 0.0) -> Trace:
        """Some of the requests, on a clock that starts `start_s` later."""
        return replace(
            self,
            arrival_s=self.arrival_s[keep] - start_s,
            budget=self.budget[keep],
            deadline_s=self.deadline_s[keep],
            image=self.image[keep],
        )

    @property
    def duration_s(self) -> float:
        """From the start to the last arrival."""
        return float(self.arrival_s[-1]) if len(self) else 0.0

    @property
    def sha256(self) -> str:
        """Of the content: the same requests give the same digest, whatever the file looks like."""
        digest = hashlib.sha256(repr((self.budgets, self.images)).encode())
        for column in (self.arrival_s, self.budget, self.deadline_s, self.image):
            digest.update(column.tobytes())
        return digest.hexdigest()


def read_trace(path: Path, budgets: Collection[str] | None = None, most: int = MOST_ROWS) -> Trace:
    """Reads a CSV file row by row: 24 bytes of memory per request.

    Arguments:
        budgets: those that exist; None accepts any name.
        most: requests.

    Raises:
        TraceError: the file cannot be read or holds something else than a trace.
    """
    columns = array("d"), array("i"), array("d"), array("i")
    names: tuple[dict[str, int], dict[str, int]] = ({}, {})
    with open_csv(path, most) as file:
        for arrival_s, row in _arrivals(path, file, columns[0]):
            columns[0].append(arrival_s)
            columns[1].append(_budget(row, names[0], budgets))
            columns[2].append(row.number("deadline_ms", above=0.0) / 1000)
            image = row.text("image")
            columns[3].append(names[1].setdefault(image, len(names[1])) if image else -1)
    return Trace(
        np.array(columns[0], np.float64),
        np.array(columns[1], np.int32),
        tuple(names[0]),
        np.array(columns[2], np.float64),
        np.array(columns[3], np.int32),
        tuple(names[1]),
    )


def write_trace(path: Path, trace: Trace) -> None:
    """Writes what `read_trace` reads; only the columns that say something. Times to the nanosecond."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        asked = (
            True,
            trace.budgets != (DEFAULT_BUDGET,),
            not np.isnan(trace.deadline_s).all(),
            bool((trace.image >= 0).any()),
        )
        writer.writerow([name for name, wanted in zip(COLUMNS, asked, strict=True) if wanted])
        for start in range(0, len(trace), _CHUNK):
            part = slice(start, start + _CHUNK)
            rows = zip(
                trace.arrival_s[part].tolist(),
                trace.budget[part].tolist(),
                trace.deadline_s[part].tolist(),
                trace.image[part].tolist(),
                strict=True,
            )
            for arrival_s, budget, deadline_s, image in rows:
                cells = (
                    f"{arrival_s:.9f}",
                    trace.budgets[budget],
                    "" if math.isnan(deadline_s) else f"{1000 * deadline_s:.9g}",
                    trace.images[image] if image >= 0 else "",
                )
                writer.writerow([cell for cell, wanted in zip(cells, asked, strict=True) if wanted])


def _arrivals(path: Path, file: CsvRows, arrivals: Sequence[float]) -> Iterator[tuple[float, Row]]:
    """Rows with checked arrivals."""
    header = file.header
    if "arrival_s" not in header:
        raise TraceError(f"{path}, line 1: a trace needs a column arrival_s, got {', '.join(header) or 'nothing'}")
    if unknown := [name for name in header if name not in COLUMNS]:
        logger.warning("%s: columns %s mean nothing here (known: %s)", path, unknown, ", ".join(COLUMNS))
    for row in file:
        arrival_s = row.needed("arrival_s")
        if arrival_s < 0:
            raise TraceError(f"{row.place}: arrival_s counts from the start and must be at least 0, got {arrival_s:g}")
        if arrivals and arrival_s < arrivals[-1]:
            raise TraceError(f"{row.place}: arrival_s must not go back, got {arrival_s:.9g} after {arrivals[-1]:.9g}")
        yield arrival_s, row


def _budget(row: Row, codes: dict[str, int], known: Collection[str] | None) -> int:
    name = row.text("budget") or DEFAULT_BUDGET
    if name not in codes:
        if known is not None and name not in known:
            raise TraceError(f"{row.place}: unknown budget {name!r}; the policy has {', '.join(known)}")
        codes[name] = len(codes)
    return codes[name]
