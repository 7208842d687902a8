"""What the commands share on the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer

from loadtest.errors import LoadtestError


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """A message instead of a traceback for what the user can mend."""
    try:
        yield
    except LoadtestError as error:
        typer.echo(f"error: {error}", err=True)  # not through rich, which reads brackets as markup
        raise typer.Exit(1) from error
