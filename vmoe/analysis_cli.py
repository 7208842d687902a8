"""Commands that analyse models instead of making them; `vmoe.cli` adds them to its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import typer
from PIL import Image
from rich.table import Table

from vmoe.checkpoint import Checkpoint, load_checkpoint
from vmoe.class_subset import match_classes
from vmoe.config import Routing
from vmoe.data import FASHION_MNIST_DIRECTORY, DataError, LabelledImages, load_images
from vmoe.kept_patches import kept_patches, save_patches_figure
from vmoe.operating_point import OperatingPoint, parse_point
from vmoe.options import DataOption, JsonOption, LimitOption, PlotOption
from vmoe.preprocess import fit
from vmoe.routing_analysis import LayerRouting, analyse_routing, save_routing_figure
from vmoe.sizes import ALL_NAMES, REPORTED_EXPERTS, markdown, named_sizes
from vmoe.sweep import SweepPoint, SweepSettings, num_passes
from vmoe.sweep import sweep as run_sweep
from vmoe.sweep_figure import save_sweep_figure
from vmoe.sweep_report import sweep_markdown
from vmoe.terminal import choose_device, clear_errors, console, count_progress

app = typer.Typer()
SWEEP = SweepSettings()
PICTURED = (0.1, 0.25, 0.5, 0.75, 1.0)  # C of show-routing: from where little is left to where nothing is dropped


@app.command()
def sizes(
    model: Annotated[list[str] | None, typer.Option(help="S/32, ..., H/14, 15B; repeat. Default all.")] = None,
    last: Annotated[list[int] | None, typer.Option(help="'Last n' placements; repeat. Default 2 and 5.")] = None,
    every: Annotated[list[int] | None, typer.Option(help="'Every n' placements; repeat. Default 2.")] = None,
    num_experts: int = REPORTED_EXPERTS,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The table of docs/sizes.md.")] = False,
    json_path: JsonOption = None,
) -> None:
    """Parameters and FLOPs per image of the paper's models, without allocating weights."""
    with clear_errors():
        rows = named_sizes(model or ALL_NAMES, last or (2, 5), every or (2,), num_experts)
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


@app.command()
def sweep(
    checkpoint: Annotated[list[Path], typer.Argument(help="Sparse models, and dense ones as lines to compare with.")],
    data: DataOption = FASHION_MNIST_DIRECTORY,
    capacity_factor: Annotated[list[float] | None, typer.Option(help="C; repeat. Default 0.05 to 2.")] = None,
    selected_experts: Annotated[list[int] | None, typer.Option(help="K; repeat. Default 1 to 4.")] = None,
    routing: Annotated[list[str] | None, typer.Option(help="bpr or vanilla; repeat. Default both.")] = None,
    group_images: Annotated[
        list[int] | None, typer.Option(help="Images per routing group; repeat. Default 1 and 16.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Shufflings of the images for groups of several.")] = SWEEP.seeds,
    limit: LimitOption = None,
    resamples: Annotated[int, typer.Option(help="Of the bootstrap behind the intervals.")] = SWEEP.resamples,
    device: str = "auto",
    json_path: JsonOption = None,
    markdown_path: Annotated[Path | None, typer.Option("--markdown", help="Write tables here.")] = None,
    plot: PlotOption = None,
) -> None:
    """Accuracy against C for both queue orders, several K and group sizes, without training anything."""
    with clear_errors():
        settings = SweepSettings(
            tuple(capacity_factor or SWEEP.capacity_factors), tuple(selected_experts or SWEEP.selected_experts),
            _routings(routing), tuple(group_images or SWEEP.group_images), seeds, limit, resamples,
        )  # fmt: skip
        loaded = {_model_name(path, checkpoint): load_checkpoint(path) for path in checkpoint}
        images = {name: _test_images(data, model) for name, model in loaded.items()}
        passes = {name: num_passes(model.config, settings) for name, model in loaded.items()}
        sweeps: dict[str, list[SweepPoint]] = {}
        with count_progress() as bar:
            for name, model in loaded.items():
                total = passes[name] * settings.num_images(len(images[name]))
                advance = partial(bar.advance, bar.add_task(name, total=total, status=""))
                on = torch.device(choose_device(device))
                sweeps[name] = run_sweep(model, images[name], settings, device=on, advance=advance)
        for name, points in sweeps.items():
            for group in dict.fromkeys(point.group_images for point in points):
                console.print(_sweep_table(name, [point for point in points if point.group_images == group]))
        if json_path is not None:
            report = {
                "data": str(data), "settings": asdict(settings), "torch": torch.__version__,
                "models": {name: [asdict(point) for point in points] for name, points in sweeps.items()},
            }  # fmt: skip
            json_path.write_text(json.dumps(report, indent=1))
        if markdown_path is not None:
            markdown_path.write_text(sweep_markdown(sweeps))
        if plot is not None:
            save_sweep_figure(plot, sweeps)


@app.command("show-routing")
def show_routing(
    checkpoint: Annotated[Path, typer.Argument(help="A sparse model.")],
    plot: Annotated[Path, typer.Option(help="Write the pictures here (PNG or SVG).")],
    image: Annotated[
        list[str] | None, typer.Option(help="Number of a test image or an image file; repeat. Default 0 to 3.")
    ] = None,
    data: DataOption = FASHION_MNIST_DIRECTORY,
    capacity_factor: Annotated[list[float] | None, typer.Option(help="C; repeat. Default 0.1 to 1.")] = None,
    selected_experts: Annotated[int | None, typer.Option(help="K; default: the model's own.")] = None,
    layer: Annotated[int, typer.Option(help="MoE layer, counted from 0; -1 is the last.")] = -1,
) -> None:
    """Draws which patches of images at least one expert processes, at several C."""
    with clear_errors():
        loaded = load_checkpoint(checkpoint)
        layers = () if loaded.config.moe is None else loaded.config.moe.layers
        trained = loaded.config.operating_point
        selected = selected_experts or (trained.num_selected_experts if trained else 1)
        points = [OperatingPoint(c, selected) for c in capacity_factor or PICTURED]
        pixels = np.stack([_picture(text, data, loaded) for text in image or map(str, range(4))])
        kept = kept_patches(loaded, pixels, points)
        if not -len(layers) <= layer < len(layers):
            raise typer.BadParameter(f"--layer must be below {len(layers)}, the number of MoE layers, got {layer}")
        save_patches_figure(plot, pixels, kept[:, layer], points)
        table = Table("C", "K", "patches processed", title=f"block {layers[layer]}, {len(pixels)} images")
        for point, share in zip(points, kept[:, layer].mean((1, 2, 3)), strict=True):
            table.add_row(f"{point.capacity_factor:g}", str(selected), f"{100 * share:.1f} %")
        console.print(table)


@app.command("routing-analysis")
def routing_analysis(
    checkpoint: Annotated[Path, typer.Argument(help="A sparse model.")],
    data: DataOption = FASHION_MNIST_DIRECTORY,
    point: Annotated[str | None, typer.Option(help="Operating point as C,K; default: the model's own.")] = None,
    limit: LimitOption = None,
    device: str = "auto",
    json_path: JsonOption = None,
    plot: Annotated[Path | None, typer.Option(help="Write heat maps here (PNG or SVG).")] = None,
) -> None:
    """How far experts specialise in classes, their load, and what is dropped, per MoE layer."""
    with clear_errors():
        loaded = load_checkpoint(checkpoint)
        images = _test_images(data, loaded)
        with count_progress() as bar:
            task = bar.add_task("analyse", total=min(limit or len(images), len(images)), status="")
            layers = analyse_routing(
                loaded, images, None if point is None else parse_point(point),
                limit=limit, device=torch.device(choose_device(device)), advance=partial(bar.advance, task),
            )  # fmt: skip
        console.print(_routing_table(layers))
        if json_path is not None:
            report = {
                "data": str(data), "point": point, "limit": limit, "labels": loaded.labels,
                "torch": torch.__version__, "layers": [asdict(layer) for layer in layers],
            }  # fmt: skip
            json_path.write_text(json.dumps(report, indent=1))
        if plot is not None:
            save_routing_figure(plot, layers, loaded.labels)


def _routings(names: Sequence[str] | None) -> tuple[Routing, ...]:
    known: dict[str, Routing] = {"bpr": "bpr", "vanilla": "vanilla"}
    if unknown := [name for name in names or () if name not in known]:
        raise typer.BadParameter(f"routing must be bpr or vanilla, got {unknown[0]!r}")
    return tuple(known[name] for name in names) if names else SWEEP.routings


def _model_name(path: Path, all_paths: Sequence[Path]) -> str:
    """The run's name for `runs/NAME/checkpoint`, else the directory's; the whole path where that is not unique."""
    short = [each.parent.name if each.name == "checkpoint" else each.name for each in all_paths]
    name = short[list(all_paths).index(path)]
    return name if name and short.count(name) == 1 else str(path)


def _test_images(data: Path, loaded: Checkpoint) -> LabelledImages:
    return match_classes(load_images(data, loaded.preprocessing, train=False), loaded.labels)


def _picture(text: str, data: Path, loaded: Checkpoint) -> npt.NDArray[np.uint8]:
    """Pixels (H, W, C) of a test image by its number, or of a file."""
    if not text.isdigit():
        with Image.open(text) as opened:
            return fit(opened, loaded.preprocessing)
    images = load_images(data, loaded.preprocessing, train=False)
    if int(text) >= len(images):
        raise DataError(f"image {text} does not exist, the data have the images 0 to {len(images) - 1}")
    pixels: npt.NDArray[np.uint8] = images.read(np.array([int(text)]))[0][0]
    return pixels


def _sweep_table(name: str, points: Sequence[SweepPoint]) -> Table:
    first = points[0]
    if first.point is None:
        table = Table("accuracy", "95 %", title=f"{name} (dense), {first.num_images} images")
        low, high = 100 * first.accuracy.low, 100 * first.accuracy.high
        table.add_row(f"{100 * first.accuracy.mean:.2f} %", f"{low:.2f} to {high:.2f}")
        return table
    columns = {(p.routing, p.point.num_selected_experts): p for p in points if p.point}
    rows: dict[float, list[str]] = {}
    for p in points:
        assert p.point is not None
        half = 50 * (p.accuracy.high - p.accuracy.low)
        rows.setdefault(p.point.capacity_factor, []).append(f"{100 * p.accuracy.mean:.2f} ± {half:.2f}")
    title = f"{name}, {first.group_images} image(s) per group, {first.num_images} images: accuracy in %"
    table = Table("C", *(f"{routing}, K = {k}" for routing, k in columns), title=title)
    for capacity_factor, cells in rows.items():
        table.add_row(f"{capacity_factor:g}", *cells)
    return table


def _routing_table(layers: Sequence[LayerRouting]) -> Table:
    table = Table("block", "dependence", "by chance", "least load", "most load", "dropped", "unserved tokens")
    for layer in layers:
        shares = (min(layer.load), max(layer.load), layer.dropped, layer.unserved)
        percent = [f"{100 * share:.1f} %" for share in shares]
        table.add_row(str(layer.block), f"{layer.dependence:.3f}", f"{layer.chance:.3f}", *percent)
    return table
