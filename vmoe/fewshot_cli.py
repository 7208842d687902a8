"""`python -m vmoe fewshot`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Column, Table

from vmoe.checkpoint import load_checkpoint, save_checkpoint
from vmoe.class_subset import ClassSubset, choose_classes
from vmoe.data import FASHION_MNIST_DIRECTORY, DataError, LabelledImages, load_images
from vmoe.fewshot import FewShotResult, calibrated, few_shot, with_head
from vmoe.figure import Panel, save_panels
from vmoe.operating_point import parse_point
from vmoe.options import DataOption, JsonOption, LimitTestOption, OverwriteOption, PlotOption
from vmoe.terminal import check_output, choose_device, clear_errors, console, count_progress

SHOTS = (1, 5, 10, 25)  # the paper's
HELD_OUT = "held-out"


def fewshot(
    checkpoint: Annotated[list[Path], typer.Argument(help="Directories with model.safetensors and config.json.")],
    data: DataOption = FASHION_MNIST_DIRECTORY,
    shots: Annotated[list[int], typer.Option(min=1, help="Images per class; repeat for several.")] = SHOTS,  # type: ignore[assignment]
    seeds: Annotated[int, typer.Option(min=1, help="Draws of the images.")] = 5,
    classes: Annotated[
        str | None,
        typer.Option(help="Classes to tell apart: 5-9, or held-out for those that no checkpoint was trained on."),
    ] = None,
    validation: Annotated[
        int, typer.Option(min=1, help="Further images per class that choose the strength of the regularisation.")
    ] = 50,
    point: Annotated[str | None, typer.Option(help="Operating point as C,K; default: each model's own.")] = None,
    limit: LimitTestOption = None,
    save: Annotated[
        Path | None, typer.Option(help="Write the first seed's head for the most shots and its backbone here.")
    ] = None,
    overwrite: OverwriteOption = False,
    device: str = "auto",
    json_path: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Accuracy of linear heads fitted in closed form to a few images per class, on frozen features."""
    with clear_errors():
        if save is not None and len(checkpoint) > 1:
            raise typer.BadParameter(f"--save takes one checkpoint, got {len(checkpoint)}")
        if save is not None:
            check_output(save, overwrite=overwrite)
        known = {label for path in checkpoint for label in load_checkpoint(path).labels}
        shots = sorted(set(shots))
        runs: dict[str, tuple[FewShotResult, ...]] = {}
        for path in checkpoint:
            loaded = load_checkpoint(path)
            chosen, held_out = (
                _choose(load_images(data, loaded.preprocessing, train=part), classes, known) for part in (True, False)
            )
            with count_progress() as bar:
                task = bar.add_task(str(path), total=None, status="features")
                transfer = few_shot(
                    loaded, chosen, held_out, shots, seeds, validation,
                    point=None if point is None else parse_point(point), limit=limit,
                    device=torch.device(choose_device(device)), advance=partial(bar.update, task),
                )  # fmt: skip
            runs[str(path)] = transfer.results
            num_images = len(transfer.test.targets)
            if save is not None:
                head = calibrated(transfer.head, transfer.validation)
                save_checkpoint(save, with_head(loaded, head, chosen.labels))
        _print(runs, chosen.labels, num_images)
        if json_path is not None:
            report = {
                "data": str(data), "classes": chosen.labels, "seeds": seeds, "validation_per_class": validation,
                "point": point, "test_images": num_images, "torch": torch.__version__,
                "results": {path: [asdict(result) for result in results] for path, results in runs.items()},
            }  # fmt: skip
            json_path.write_text(json.dumps(report, indent=2))
        if plot is not None:
            series = {
                path: [(result.shots, 100 * result.mean, 100 * (result.deviation or 0)) for result in results]
                for path, results in runs.items()
            }
            save_panels(plot, [Panel("images per class", series, logarithmic=True)], y_label="accuracy, %")


def _choose(images: LabelledImages, classes: str | None, known: set[str]) -> LabelledImages:
    if classes != HELD_OUT:
        return choose_classes(images, classes)
    numbers = tuple(number for number, label in enumerate(images.labels) if label not in known)
    if len(numbers) < 2:
        raise DataError(f"{len(numbers)} classes of the data were held out of training, at least 2 are needed")
    return ClassSubset(images, numbers)


def _print(runs: dict[str, tuple[FewShotResult, ...]], labels: Sequence[str], num_images: int) -> None:
    table = Table(
        Column("checkpoint", overflow="fold"),
        "shots",
        "accuracy",
        "deviation",
        "l2",
        title=f"{len(labels)} classes, {num_images} images",
    )
    for path, results in runs.items():
        for result in results:
            deviation = "-" if result.deviation is None else f"{100 * result.deviation:.2f}"
            table.add_row(path, str(result.shots), f"{100 * result.mean:.2f} %", deviation, f"{result.l2:g}")
    console.print(table)
