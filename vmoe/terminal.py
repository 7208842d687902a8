"""What the commands of this package share: progress bar, choice of the device, errors as one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console()


def main_progress() -> Progress:
    """Bar with counts, remaining time and a free text field `status`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
    )


def device_name(name: str) -> str:
    """`cpu` or a CUDA device from what `--device` takes; `auto` is a GPU where there is one."""
    if name not in ("auto", "cpu") and not (name.startswith("cuda") and torch.cuda.is_available()):
        raise typer.BadParameter(f"device must be auto, cpu, or cuda on a machine with a GPU, got {name!r}")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Bad input and a diverged run end with one line and exit code 1, not with a traceback."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:  # CheckpointError, ConfigError, DataError: ValueErrors
        typer.echo(f"error: {error}", err=True)  # not through rich, which reads brackets as markup
        raise typer.Exit(1) from error
