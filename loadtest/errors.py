"""Errors of the load tests. The command line prints their message and exits with 1; nothing else catches them.

LoadtestError            the run cannot start as asked
├── GeneratorFailed      a process of the generator ended before its requests did
├── ReportError          a file that is no report of this version
├── TargetError          nobody serves at the URL
├── TraceError           the trace file, with file and line
├── ObjectiveUnreached   tuning found no policy that does what was asked for
└── UnsuitableBundle     the bundle lacks what a simulation needs
"""

from __future__ import annotations


class LoadtestError(ValueError):
    """The message says what was wrong, the value seen, and what would be right."""


class GeneratorFailed(LoadtestError):
    """Requests that were due are lost, and with them the run."""


class ReportError(LoadtestError):
    """A report that cannot be read."""


class TargetError(LoadtestError):
    """A URL at which no gateway answers."""


class TraceError(LoadtestError):
    """A trace that cannot be used."""


class ObjectiveUnreached(LoadtestError):
    """No policy does what was asked for."""


class UnsuitableBundle(LoadtestError):
    """A bundle that cannot be simulated."""
