"""Libraries of the package's extras: what to say where one is missing. Torch-free."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

_OURS = ("exporter", "loadtest", "server", "vmoe")


def install_command(extra: str) -> str:
    """What installs `extra`, in the clone: the package is on no index."""
    return f"pip install -c constraints.txt -e '.[{extra}]'"


@contextlib.contextmanager
def needs_extra(extra: str, who: str) -> Iterator[None]:
    """Around imports: a missing library ends the program with one line and exit code 2, not with a traceback.

    Raises:
        ModuleNotFoundError: what is missing is a module of ours, which no extra brings.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in _OURS:
            raise
        print(f"error: {who} needs {error.name}: {install_command(extra)}", file=sys.stderr)
        raise SystemExit(2) from error
