"""Command line of the vmoe package: train, evaluate and transfer."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from vmoe import compare_dense_cli, fewshot_cli, train_cli, upcycle_cli
from vmoe.analysis_cli import app as analysis
from vmoe.checkpoint import load_checkpoint
from vmoe.class_subset import match_classes
from vmoe.data import FASHION_MNIST_DIRECTORY, load_images
from vmoe.evaluate import evaluate as evaluate_points
from vmoe.operating_point import OperatingPoint, parse_point
from vmoe.options import DataOption, JsonOption, LimitOption
from vmoe.terminal import choose_device, clear_errors, console, count_progress

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Train, evaluate and transfer V-MoE models.")
app.add_typer(analysis)
app.command("train")(train_cli.train)
app.command("finetune")(train_cli.finetune)
app.command("fewshot")(fewshot_cli.fewshot)
app.command("upcycle")(upcycle_cli.upcycle)
app.command("compare-dense")(compare_dense_cli.compare_dense)

# The ladder that evaluation prints when none is given: from the cheapest useful point to beyond full capacity.
EVALUATION_POINTS = tuple(
    OperatingPoint(capacity_factor, k) for k in (1, 2) for capacity_factor in (0.125, 0.25, 0.5, 0.75, 1.0, 1.5)
)


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Directory with model.safetensors and config.json.")],
    data: DataOption = FASHION_MNIST_DIRECTORY,
    point: Annotated[
        list[str] | None, typer.Option(help="Operating point as C,K (for example 0.25,1); repeat for several.")
    ] = None,
    limit: LimitOption = None,
    device: str = "auto",
    json_path: JsonOption = None,
) -> None:
    """Prints top-1 accuracy and the share of assignments kept, per operating point."""
    with clear_errors():
        loaded = load_checkpoint(checkpoint)
        images = match_classes(load_images(data, loaded.preprocessing, train=False), loaded.labels)
        points: list[OperatingPoint | None] = [None]
        if loaded.config.moe is not None:
            points = [parse_point(text) for text in point] if point else list(EVALUATION_POINTS)
        model = loaded.model().to(choose_device(device))
        total = (len(images) if limit is None else min(limit, len(images))) * len(points)
        with count_progress() as bar:
            task = bar.add_task("evaluate", total=total, status="")
            results = evaluate_points(
                model, images, loaded.preprocessing, points, limit=limit, advance=lambda n: bar.advance(task, n)
            )
        table = Table("C", "K", "slots", "accuracy", "kept per MoE layer", title=f"{results[0].num_images} images")
        for result in results:
            c, k = (
                ("-", "-")
                if result.point is None
                else (f"{result.point.capacity_factor:g}", str(result.point.num_selected_experts))
            )
            slots = ", ".join(map(str, result.slots))
            table.add_row(c, k, slots, f"{100 * result.accuracy:.2f} %", "  ".join(f"{x:.3f}" for x in result.kept))
        console.print(table)
        if json_path is not None:
            json_path.write_text(json.dumps([asdict(result) for result in results], indent=2))
