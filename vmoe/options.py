"""Options that several commands of `python -m vmoe` have, as types of their arguments; the defaults stand there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DataOption = Annotated[Path, typer.Option(help="IDX directory or image folder.")]
MeanOption = Annotated[
    str | None, typer.Option(help="Of pixels scaled to 0..1, per channel, instead of the source's: 0.485,0.456,0.406.")
]
StdOption = Annotated[str | None, typer.Option(help="Per channel, as --mean.")]
LimitOption = Annotated[int | None, typer.Option(help="Only the first images.")]
LimitTestOption = Annotated[int | None, typer.Option(min=1, help="Only the first test images.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint that stands there.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the results here.")]
PlotOption = Annotated[Path | None, typer.Option(help="Write a plot here (PNG or SVG).")]
