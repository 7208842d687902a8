"""A server's processes as the kernel counts them (Linux): the one that was started, and all that it started.

Of memory, private pages are in one process alone; a shared page counts by its share (PSS), so that sums over processes
are what they take together.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_KIB: Final = 1024


@dataclass(frozen=True)
class Memory:
    """Resident bytes of one process.

    Attributes:
        total: RSS; proportional: PSS.
        private: in this process alone.
        shared: also in others, or from files that others may map.
    """

    total: int
    proportional: int
    private: int

    @property
    def shared(self) -> int:
        return self.total - self.private


def members(pid: int) -> list[int]:
    """`pid` and its descendants that live."""
    parents = {each: int(fields[1]) for each, fields in _stats().items()}
    found = [pid] if pid in parents else []
    for member in found:  # grows meanwhile
        found += [child for child, parent in parents.items() if parent == member]
    return found


def cpu_s(pid: int) -> float:
    """User and system time of all members so far; what ended members took is lost unless they were waited for."""
    stats = _stats()
    return sum(sum(map(int, stats[each][11:15])) for each in members(pid) if each in stats) / _TICKS_PER_S


def memory(pid: int) -> Memory:
    """Of process `pid` alone."""
    kib: dict[str, int] = {}
    for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        kib[name] = int(value.split()[0])
    private = kib["Private_Clean"] + kib["Private_Dirty"] + kib.get("Private_Hugetlb", 0)
    return Memory(_KIB * kib["Rss"], _KIB * kib["Pss"], _KIB * private)


def send(pid: int, number: signal.Signals) -> None:
    """A signal to all members."""
    for each in members(pid):
        try:
            os.kill(each, number)
        except ProcessLookupError:
            continue  # it has just ended


def _stats() -> dict[int, list[str]]:
    """Fields of proc_pid_stat(5) after the name, by process: state, parent, ..."""
    found = {}
    for path in _PROC.glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        if fields[0] != "Z":
            found[int(path.parent.name)] = fields
    return found
