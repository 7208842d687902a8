"""CSV files of any length, row by row, with complaints that name file and line. Limits bound what a bad file costs."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

from loadtest.errors import TraceError

# Chosen, not tuned: the largest public trace that we know has 16.8 million rows (Azure LLM inference 2024, code); this
# many take 480 MB as a trace.
MOST_ROWS: Final = 20_000_000
_LONGEST_LINE: Final = 1 << 16  # chosen, not tuned: a file without line ends must not be read as one line


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a file, and how to complain about it."""

    path: Path
    line: int
    cells: dict[str, str]

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.path}, line {self.line}"

    def text(self, column: str) -> str:
        """Empty where there is no such column."""
        return self.cells.get(column, "").strip()

    def number(self, column: str, *, above: float = -math.inf) -> float:
        """NaN where the cell is empty."""
        text = self.text(column)
        if not text:
            return math.nan
        try:
            value = float(text)
        except ValueError as error:
            raise TraceError(f"{self.place}: {column} must be a number, got {text!r}") from error
        if not (math.isfinite(value) and value > above):
            raise TraceError(f"{self.place}: {column} must be finite and above {above:g}, got {text}")
        return value

    def needed(self, column: str) -> float:
        """A number that may not be left out."""
        value = self.number(column)
        if math.isnan(value):
            raise TraceError(f"{self.place}: {column} is empty; every request needs it, in seconds")
        return value


class CsvRows:
    """An open file. Iterate over its rows once; blank lines are skipped.

    Attributes:
        header: names of the columns, in order.
    """

    def __init__(self, path: Path, file: TextIO, most: int) -> None:
        self._path, self._most = path, most
        self._reader = csv.reader(self._lines(file))
        self.header = [name.strip() for name in next(self._reader, [])]

    def __iter__(self) -> Iterator[Row]:
        if len(set(self.header)) < len(self.header):
            raise TraceError(f"{self._path}, line 1: every column may stand once, got {', '.join(self.header)}")
        count = 0
        for cells in self._reader:
            if not cells:
                continue
            row = Row(self._path, self._reader.line_num, dict(zip(self.header, cells, strict=False)))
            if len(cells) != len(self.header):
                raise TraceError(f"{row.place}: {len(cells)} cells under a header of {len(self.header)}")
            count += 1
            if count > self._most:
                raise TraceError(f"{row.place}: a trace may have {self._most:,} requests; cut the file")
            yield row

    def _lines(self, file: TextIO) -> Iterator[str]:
        number = 0
        while line := file.readline(_LONGEST_LINE):
            number += 1
            if len(line) == _LONGEST_LINE and not line.endswith("\n"):
                raise TraceError(f"{self._path}, line {number}: longer than {_LONGEST_LINE:,} characters; is this CSV?")
            yield line


@contextmanager
def open_csv(path: Path, most: int = MOST_ROWS) -> Iterator[CsvRows]:
    """Opens a file and reads its header.

    Raises:
        TraceError: the file cannot be read, also later, while rows are taken.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield CsvRows(path, file, most)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"cannot read {path}: {error}") from error
