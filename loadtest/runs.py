"""Reports under the names that tables and pages call them by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtest.errors import ReportError
from loadtest.report import Report
from loadtest.report_file import read_report


@dataclass(frozen=True)
class Run:
    """A report and its name, which is unique among those shown together."""

    name: str
    report: Report


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Named after their files, with as many folders as tell them apart.

    Raises:
        ReportError: a file is no report, or stands there twice.
    """
    full = [path.resolve().with_suffix("") for path in paths]
    if len(set(full)) < len(full):
        raise ReportError(f"every report may stand once, got {', '.join(map(str, paths))}")
    names: list[str] = []
    depth = 0
    while len(set(names)) < len(paths):
        depth += 1
        names = ["/".join(path.parts[-depth:]) for path in full]
    return [Run(name, read_report(path)) for name, path in zip(names, paths, strict=True)]
