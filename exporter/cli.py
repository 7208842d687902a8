"""`python -m exporter`: a trained checkpoint becomes a bundle that the gateway and Triton serve, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.table import Table
from typer.core import TyperGroup

from exporter import options
from exporter.bundle import Bundle, Manifest, StorageType, Target
from exporter.figure import draw_points
from exporter.measure import measure_bundle, time_together
from exporter.triton_config import TritonOptions
from exporter.triton_directory import write_model_directory, write_triton_files
from vmoe.architecture import Hints, parse_image_size
from vmoe.atomic_directory import is_taken
from vmoe.console import open_console
from vmoe.extras import needs_extra
from vmoe.operating_point import parse_point
from vmoe.preprocess import parse_channel_values

if TYPE_CHECKING:
    from exporter.plan import Plan


class _ExportByDefault(TyperGroup):
    """`python -m exporter CHECKPOINT` is `python -m exporter export CHECKPOINT`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # typer brings its own click, whose names are private
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = ["export", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_ExportByDefault, add_completion=False, help="Without a command: export.")
console = open_console(stderr=True)


@app.command()
def export(
    checkpoint: options.Checkpoint = None,
    name: options.Name = None,
    out: options.Out = Path("model_repository"),
    images: options.Images = None,
    dtype: options.Dtype = "float32",
    calibration_images: options.CalibrationImages = None,
    target: options.Target = "cpu",
    input_type: options.Input = "uint8",
    config: options.Config = None,
    image_size: options.ImageSize = None,
    num_selected_experts: options.NumSelectedExperts = None,
    capacity_factor: options.CapacityFactor = None,
    routing: options.Routing = None,
    router: options.Router = None,
    positions: options.Positions = None,
    group_images: options.GroupImages = 1,
    point: options.Points = None,
    max_selected_experts: options.MaxSelectedExperts = None,
    labels: options.Labels = None,
    mean: options.Mean = None,
    std: options.Std = None,
    fit: options.Fit = None,
    crop_fraction: options.CropFraction = None,
    tolerance: options.Tolerance = None,
    min_agreement: options.MinAgreement = 0.95,
    threads: options.Threads = 0,
    rounds: options.Rounds = None,
    parity_images: options.ParityImages = None,
    dry_run: options.DryRun = False,
    profile_only: options.ProfileOnly = False,
    profile_with: options.ProfileWith = None,
    triton_backend: options.TritonBackend = "onnxruntime",
    triton_device: options.TritonDevice = "cpu",
    triton_instances: options.TritonInstances = 1,
    triton_queue_timeout_s: options.TritonQueueTimeout = 0.0,
    triton_packed_weights: options.TritonPackedWeights = None,
    triton_only: options.TritonOnly = False,
    triton_repository: options.TritonRepository = None,
) -> None:
    """Exports CHECKPOINT to OUT/NAME: ONNX graph, manifest with measured accuracy and latency, Triton config."""
    with _clear_errors():
        if triton_repository is not None and not triton_only:
            raise typer.BadParameter("--triton-repository goes with --triton-only")
        if triton_only and (checkpoint is not None or profile_only):
            raise typer.BadParameter("--triton-only takes neither CHECKPOINT nor --profile-only")
        _check_profile(checkpoint, images, rounds, profile_only=profile_only, profile_with=profile_with)
        if profile_only and name is None:
            raise typer.BadParameter("--profile-only needs --name: the bundle that it measures is OUT/NAME")
        name = name or options.DEFAULT_NAME
        triton = TritonOptions(
            triton_backend,
            triton_device,
            triton_instances,
            threads,
            triton_queue_timeout_s,
            None if triton_packed_weights is None else PurePosixPath(triton_packed_weights),
        )
        if triton_only:
            _write_triton(out / name, triton, triton_repository)
            return
        if profile_only:
            _profile([out / each for each in (name, *(profile_with or ()))], images, threads, rounds)
            return

        # Imports torch. Measuring a bundle must work where it is served, and there is no torch there.
        with needs_extra("export", "exporting"):
            from exporter.export import ExportOptions, export_checkpoint, plan_export

        hints = Hints(
            image_size=None if image_size is None else parse_image_size(image_size),
            num_selected_experts=num_selected_experts,
            capacity_factor=capacity_factor,
            router=router,
            routing=routing,
            position_embedding=positions,
        )
        if dry_run:
            _print_plan(plan_export(checkpoint, hints, config, dtype))
            return
        if checkpoint is None:
            raise typer.BadParameter(
                "CHECKPOINT is missing (only --profile-only, --triton-only and --dry-run go without)"
            )
        _check_dtype(dtype, calibration_images, target)
        wanted = ExportOptions(
            checkpoint=checkpoint,
            config=config,
            hints=hints,
            dtype=dtype,
            target=target,
            input_type=input_type,
            group_images=group_images,
            points=tuple(parse_point(text) for text in point or ()),
            max_selected_experts=max_selected_experts,
            mean=None if mean is None else parse_channel_values(mean),
            std=None if std is None else parse_channel_values(std),
            fit=fit,
            crop_fraction=crop_fraction,
            labels=labels,
            images=images,
            calibration_images=calibration_images,
            tolerance=tolerance,
            min_agreement=min_agreement,
            parity_images=parity_images,
            threads=threads,
            rounds=rounds,
            triton=triton,
        )
        _print_points(export_checkpoint(out / name, wanted, console))
        console.print(f"{out / name} is ready")


@app.command()
def recover(
    bundle: Annotated[Path, typer.Argument(help="Directory of a bundle, such as model_repository/vmoe-fashion-mnist.")],
    output: Annotated[Path, typer.Option(help="New directory for the checkpoint.")],
) -> None:
    """Turns BUNDLE back into a checkpoint, to fine-tune, evaluate or export it."""
    with _clear_errors():
        with needs_extra("export", "recovering"):
            from exporter.recover import recover as checkpoint_of  # imports torch, see `export`
            from vmoe.checkpoint import save_checkpoint

        if is_taken(output):
            raise typer.BadParameter(f"{output} exists and is not an empty directory: give a new one")
        save_checkpoint(output, checkpoint_of(Bundle.load(bundle)))
        console.print(f"{output} is ready")


@app.command()
def plot(
    bundle: Annotated[Path, typer.Argument(help="Directory of a bundle.")],
    output: Annotated[Path, typer.Option(help="Picture; its suffix fixes the format.")],
) -> None:
    """Draws accuracy against latency of BUNDLE's operating points, as its manifest has them."""
    with _clear_errors():
        draw_points(Bundle.load(bundle).manifest).savefig(output, dpi=110)
        console.print(f"{output} is ready")


def _check_profile(
    checkpoint: Path | None,
    images: Path | None,
    rounds: int | None,
    *,
    profile_only: bool,
    profile_with: list[str] | None,
) -> None:
    if profile_with and not profile_only:
        raise typer.BadParameter("--profile-with goes with --profile-only")
    if profile_only and checkpoint is not None:
        raise typer.BadParameter("--profile-only measures OUT/NAME and takes no CHECKPOINT")
    if profile_with and (images is not None or rounds == 0):
        raise typer.BadParameter("--profile-with times bundles: it takes no --images and no --rounds 0")


def _check_dtype(dtype: StorageType, calibration_images: Path | None, target: Target) -> None:
    if (dtype == "int8") != (calibration_images is not None):
        raise typer.BadParameter("--dtype int8 and --calibration-images go together: scales come from images")
    if target == "cuda" and dtype != "float16":
        raise typer.BadParameter(f"--target cuda computes in float16, got --dtype {dtype}: give float16")


def _write_triton(directory: Path, triton: TritonOptions, repository: Path | None) -> None:
    """Triton's files of a bundle, there or with the model in another repository."""
    bundle = Bundle.load(directory)
    if repository is None:
        write_triton_files(directory, bundle.manifest, triton)
    else:
        write_model_directory(bundle, repository / directory.name, triton)
    console.print(f"Triton can mount {repository or directory.parent}")


def _profile(directories: list[Path], images: Path | None, threads: int, rounds: int | None) -> None:
    """Measures a bundle again, or times several in turn."""
    if len(directories) > 1:
        time_together(directories, threads, rounds, console)
        for directory in directories:
            _print_points(Bundle.load(directory, verify=False).manifest)
    else:
        (directory,) = directories
        _print_points(measure_bundle(directory, images, threads, rounds, console))
        console.print(f"{directory} is ready")


def _print_plan(planned: Plan) -> None:
    table = Table("part", "parameters", "MB", "experts", "MB per expert")
    for part in planned.parts:
        size_mb = part.num_parameters * planned.bytes_per_parameter / 1e6
        spread = ("-", "-") if part.copies == 1 else (str(part.copies), f"{size_mb / part.copies:,.1f}")
        table.add_row(part.name, f"{part.num_parameters:,}", f"{size_mb:,.1f}", *spread)
    table.add_section()
    table.add_row("all", f"{planned.num_parameters:,}", f"{planned.size_bytes / 1e6:,.1f}", "", "")
    console.print(table)


def _print_points(manifest: Manifest) -> None:
    table = Table("C", "K", "slots", "accuracy", "kept", "compute", "b1 ms", "b8 ms", title=manifest.name)
    for point in manifest.points:
        latency = {entry.batch_size: entry.median_s for entry in point.latency}
        table.add_row(
            f"{point.capacity_factor:g}",
            str(point.num_selected_experts),
            str(point.slots[0]),
            "-" if point.accuracy is None else f"{100 * point.accuracy:.2f} %",
            "-" if point.kept is None else f"{np.mean(point.kept):.2f}",
            f"{point.relative_compute:.2f}",
            *(f"{1000 * latency[size]:.2f}" if size in latency else "-" for size in (1, 8)),
            style="dim" if point.dominated else None,
        )
    console.print(table)


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    """Bad input ends with one line and exit code 1, not with a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:  # BundleError, CheckpointError, DataError, ParityError are ValueErrors
        typer.echo(f"error: {error}", err=True)  # not through rich, which reads brackets as markup
        raise typer.Exit(1) from error
