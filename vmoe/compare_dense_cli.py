"""`python -m vmoe compare-dense`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from vmoe.compare_dense import RECIPE, Measured, Summary, all_runs, measure, summarise
from vmoe.data import FASHION_MNIST_DIRECTORY, load_images
from vmoe.figure import Panel, save_panels
from vmoe.options import DataOption, JsonOption, LimitTestOption, PlotOption
from vmoe.terminal import choose_autocast, choose_device, clear_errors, console, count_progress
from vmoe.train import Trainer
from vmoe.train_cli import default_preprocessing, run_with_progress


def compare_dense(
    output: Annotated[Path, typer.Option(help="Directory of the runs; finished ones are not trained again.")],
    data: DataOption = FASHION_MNIST_DIRECTORY,
    width: Annotated[list[int] | None, typer.Option(min=4, help="Hidden size; repeat. Default: 32 and 48.")] = None,
    blocks: Annotated[int, typer.Option(min=2)] = 4,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    epochs: int = RECIPE.epochs,
    batch_size: int = RECIPE.batch_size,
    learning_rate: float = RECIPE.learning_rate,
    limit: LimitTestOption = None,
    autocast: Annotated[str, typer.Option(help="bfloat16, none, or auto: bfloat16 where it is fast.")] = "auto",
    device: str = "auto",
    json_path: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Trains a V-MoE and a dense ViT per width and seed by one recipe; accuracy against operations."""
    with clear_errors():
        recipe = replace(
            RECIPE,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            autocast=choose_autocast(autocast, device),
        )
        measured: list[Measured] = []
        for run in all_runs(width or (32, 48), seeds):
            preprocessing = default_preprocessing(run.model_config(2, blocks))
            images, held_out = (load_images(data, preprocessing, train=part) for part in (True, False))
            config = run.model_config(len(images.labels), blocks)
            settings = replace(recipe, seed=run.seed)
            trainer = Trainer(config, settings, images, preprocessing, torch.device(choose_device(device)))
            console.print(run.name)
            run_with_progress(trainer, output / run.name, held_out, start=None, resume=True)
            with count_progress() as bar:
                task = bar.add_task("measure", total=None, status="")
                measured += measure(run, trainer, held_out, limit=limit, advance=partial(bar.advance, task))
        summaries = summarise(measured)
        _print(summaries, measured[0].num_images)
        if json_path is not None:
            report = {
                "data": str(data), "recipe": asdict(recipe), "blocks": blocks, "torch": torch.__version__,
                "runs": [asdict(each) for each in measured], "summary": [asdict(each) for each in summaries],
            }  # fmt: skip
            json_path.write_text(json.dumps(report, indent=2))
        if plot is not None:
            _plot(plot, summaries)


def _print(summaries: Sequence[Summary], num_images: int) -> None:
    table = Table(
        "model", "width", "C", "K", "parameters", "accuracy", "deviation", "inference", "training",
        title=f"{num_images} images, {summaries[0].num_seeds} seeds; MFLOPs per image, TFLOPs of the run",
    )  # fmt: skip
    for each in summaries:
        c, k = ("-", "-")
        if each.point is not None:
            c, k = f"{each.point.capacity_factor:g}", str(each.point.num_selected_experts)
        deviation = "-" if each.deviation is None else f"{100 * each.deviation:.2f}"
        table.add_row(
            each.kind, str(each.width), c, k, f"{each.parameters:,}", f"{100 * each.accuracy:.2f} %", deviation,
            f"{each.inference_flops / 1e6:.2f}", f"{each.training_flops / 1e12:.1f}",
        )  # fmt: skip
    console.print(table)


def _plot(path: Path, summaries: Sequence[Summary]) -> None:
    """Left: the dense models as one line, the ladder of every V-MoE. Right: what training took, at the full point."""
    inference: dict[str, list[tuple[float, float, float]]] = {}
    training: dict[str, list[tuple[float, float, float]]] = {}
    full = {each.width: each.point for each in summaries if each.kind == "sparse"}  # the ladder's last
    for each in summaries:
        height, bar = 100 * each.accuracy, 100 * (each.deviation or 0)
        name = "dense ViT" if each.kind == "dense" else f"V-MoE, width {each.width}"
        inference.setdefault(name, []).append((each.inference_flops / 1e6, height, bar))
        if each.kind == "dense" or each.point == full[each.width]:
            name = "dense ViT" if each.kind == "dense" else "V-MoE"
            training.setdefault(name, []).append((each.training_flops / 1e12, height, bar))
    panels = [Panel("inference, MFLOPs per image", inference), Panel("training, TFLOPs", training)]
    save_panels(path, panels, y_label="accuracy, %")
