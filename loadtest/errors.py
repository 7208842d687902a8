"""Errors of the load tests. The command line prints their message and exits with 1; nothing else catches them.

LoadtestError            the run cannot start as asked
├── ReportError          a file that is no report of this version
├── TargetError          nobody serves at the URL
├── TraceError           the trace file, with file and line
└── UnsuitableBundle     the bundle lacks what a simulation needs
"""

from __future__ import annotations


class LoadtestError(ValueError):
    """The message says what was wrong, the value seen, and what would be right."""


class ReportError(LoadtestError):
    """A report that cannot be read."""


class TargetError(LoadtestError):
    """A URL at which no gateway answers."""


class TraceError(LoadtestError):
    """A trace that cannot be used."""


class UnsuitableBundle(LoadtestError):
    """A bundle that cannot be simulated."""
