"""Commands that analyse models instead of making them; `vmoe.cli` adds them to its own."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from vmoe.sizes import REPORTED_EXPERTS, markdown, named_sizes
from vmoe.terminal import clear_errors, console

app = typer.Typer()


@app.command()
def sizes(
    last: Annotated[list[int] | None, typer.Option(help="'Last n' placements; repeat. Default 2 and 5.")] = None,
    every: Annotated[list[int] | None, typer.Option(help="'Every n' placements; repeat. Default 2.")] = None,
    num_experts: int = REPORTED_EXPERTS,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The table of docs/sizes.md.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
) -> None:
    """Parameters and FLOPs per image of the paper's models, without allocating weights."""
    with clear_errors():
        rows = named_sizes(last or (2, 5), every or (2,), num_experts)
        if as_markdown:
            typer.echo(markdown(rows))
        else:
            table = Table("model", "placement", "parameters", "reported", "GFLOPs (1.05, 2)", "GFLOPs (0.25, 1)")
            for row in rows:
                reported = "" if row.reported_millions is None else f"{row.reported_millions:.1f} M"
                flops = (f"{row.flops_full / 1e9:.1f}", f"{row.flops_cheap / 1e9:.1f}")
                table.add_row(row.name, row.placement, f"{row.parameters / 1e6:.1f} M", reported, *flops)
            console.print(table)
        if json_path is not None:
            json_path.write_text(json.dumps([asdict(row) for row in rows], indent=2))
