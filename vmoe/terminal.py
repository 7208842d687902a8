"""What the commands of `python -m vmoe` share: progress bars, the choice of a device, errors in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console()


def count_progress(*, disable: bool = False) -> Progress:
    """Bar with counts, remaining time and a free text field `status`; nothing when disabled."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
        disable=disable,
    )


def choose_autocast(name: str, device: str) -> str:
    """bfloat16 on GPUs and on CPUs that multiply it in hardware; elsewhere it is emulated and much slower."""
    if name != "auto":
        return name
    capabilities = torch.cpu.get_capabilities()
    fast = choose_device(device) != "cpu" or capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bfloat16" if fast else "none"


def choose_device(name: str) -> str:
    """`cpu`, `cuda` or `cuda:N` from what the user gave; `auto` is a GPU where there is one."""
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
