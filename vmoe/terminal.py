"""What the commands of `python -m vmoe` share: progress bars, devices, output that exists already, errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vmoe.atomic_directory import is_taken
from vmoe.console import open_console
from vmoe.errors import CheckpointError

console = open_console()


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


def check_output(directory: Path, *, overwrite: bool) -> None:
    """Before any work is done for a checkpoint in `directory`.

    Raises:
        CheckpointError: it would replace something, and that is no checkpoint or may not be replaced.
    """
    if not is_taken(directory):
        return
    if not overwrite:
        raise CheckpointError(f"{directory} exists: --overwrite replaces it, another directory leaves it alone")
    if not (directory / "model.safetensors").is_file():
        raise CheckpointError(f"--overwrite replaces checkpoints, and {directory} is none: give another directory")


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Bad input and a diverged run end with one line and exit code 1, not with a traceback."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:  # CheckpointError, ConfigError, DataError: ValueErrors
        typer.echo(f"error: {error}", err=True)  # not through rich, which reads brackets as markup
        raise typer.Exit(1) from error
