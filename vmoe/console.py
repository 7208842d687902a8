"""The console on which the command lines print. Torch-free."""

from __future__ import annotations

from typing import Final

from rich.console import Console

_UNBOUNDED: Final = 10_000  # columns; wider than any table of ours


def open_console(*, stderr: bool = False) -> Console:
    """Fits tables to a terminal; in a pipe or a file, which have no width, they lose no character."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=_UNBOUNDED)
