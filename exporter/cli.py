"""`python -m exporter`: a trained checkpoint becomes a bundle that the gateway and Triton serve, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from exporter.bundle import Bundle, Manifest
from exporter.figure import draw_points
from exporter.measure import measure_bundle, time_together
from exporter.triton_config import TritonOptions
from exporter.triton_directory import write_model_directory, write_triton_files
from vmoe.architecture import Hints, parse_image_size
from vmoe.atomic_directory import is_taken
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
console = Console(stderr=True)


class DataType(StrEnum):
    """Storage of the weights; int8 is a quantisation of weights and activations."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    int8 = "int8"


class QueueOrder(StrEnum):
    """Order of an expert's queue."""

    bpr = "bpr"
    vanilla = "vanilla"


class RouterName(StrEnum):
    """Who chooses whom."""

    experts_per_item = "experts_per_item"
    items_per_expert = "items_per_expert"


class Positions(StrEnum):
    """Position embeddings that leave no parameters."""

    sincos2d = "sincos2d"
    none = "none"


class TargetName(StrEnum):
    """What runs the graph."""

    cpu = "cpu"
    cuda = "cuda"


class TritonBackendName(StrEnum):
    """What runs the graph in Triton."""

    onnxruntime = "onnxruntime"
    python = "python"


class TritonDeviceName(StrEnum):
    """Where Triton runs it."""

    cpu = "cpu"
    gpu = "gpu"


class Fitting(StrEnum):
    """How an image gets the model's size."""

    stretch = "stretch"
    center_crop = "center_crop"


class Input(StrEnum):
    """What the graph's `images` are."""

    uint8 = "uint8"
    float32 = "float32"


@app.command()
def export(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            help="Directory written by `python -m vmoe train`; prefix of a google-research/vmoe checkpoint; Orbax "
            "folder; .npz; state dict (.safetensors, .pt)."
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the bundle and of Triton's model.")] = "vmoe",
    out: Annotated[Path, typer.Option(help="Model repository.")] = Path("model_repository"),
    images: Annotated[
        Path | None, typer.Option(help="Labelled images (IDX directory or image folder) that give the accuracies.")
    ] = None,
    dtype: Annotated[
        DataType, typer.Option(help="Storage of the weights; int8 computes the large products in 8 bits.")
    ] = DataType.float32,
    calibration_images: Annotated[
        Path | None,
        typer.Option(help="With --dtype int8: images (as --images, but the training split) that give the scales."),
    ] = None,
    target: Annotated[
        TargetName,
        typer.Option(help="What runs the graph; cuda pads slots and needs --dtype float16, in which it computes."),
    ] = TargetName.cpu,
    input_type: Annotated[Input, typer.Option("--input", help="Pixels, or normalised floats.")] = Input.uint8,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Constructor arguments of the reference (JSON, bare or under `model`), instead of inference."
        ),
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(help="H or HxW; learned positions are interpolated when it is not the model's own.")
    ] = None,
    num_selected_experts: Annotated[int | None, typer.Option(min=1, help="K of the full operating point.")] = None,
    capacity_factor: Annotated[float | None, typer.Option(help="C of the full operating point.")] = None,
    routing: Annotated[QueueOrder | None, typer.Option(help="Whom a full expert serves.")] = None,
    router: Annotated[RouterName | None, typer.Option(help="Who chooses; parameters do not tell.")] = None,
    positions: Annotated[Positions | None, typer.Option(help="Positions of a model without a table of them.")] = None,
    group_images: Annotated[int, typer.Option(min=1, help="Images per routing group.")] = 1,
    point: Annotated[
        list[str] | None, typer.Option(help="Operating point C,K; repeat for several. Default: a ladder.")
    ] = None,
    max_selected_experts: Annotated[int | None, typer.Option(min=1, help="Largest K of the graph.")] = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="FILE|imagenet-1k", help="Class names, one per line, instead of the checkpoint's."),
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Of pixels scaled to 0..1, per channel: 0.485,0.456,0.406. Default: 0.5.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Per channel, as --mean.")] = None,
    fit: Annotated[Fitting | None, typer.Option(help="How an image gets the model's size.")] = None,
    crop_fraction: Annotated[
        float | None, typer.Option(help="With center_crop: side of the crop over the scaled shorter side.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest difference of logits from PyTorch's. Default: 1e-4; of their spread: int8 0.1, cuda 0.02."
        ),
    ] = None,
    min_agreement: Annotated[
        float,
        typer.Option(min=0, max=1, help="With int8 or cuda: share of images that must keep PyTorch's best class."),
    ] = 0.95,
    threads: Annotated[int, typer.Option(help="Threads of the runtime; 0 is all cores.")] = 0,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Timed runs per point and batch size; 0 measures no latency. Default: 100, fewer for a large model.",
        ),
    ] = None,
    parity_images: Annotated[
        int | None,
        typer.Option(
            min=1, help="Images on which graph and model are compared. Default: 256, fewer for a large model."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the parameters of CHECKPOINT or --config; export nothing."),
    ] = False,
    profile_only: Annotated[
        bool, typer.Option("--profile-only", help="Measure OUT/NAME again on this machine; export nothing.")
    ] = False,
    profile_with: Annotated[
        list[str] | None,
        typer.Option(help="With --profile-only: another bundle of the model, timed in the same run; may be repeated."),
    ] = None,
    triton_backend: Annotated[
        TritonBackendName, typer.Option(help="Triton's backend; python is for servers without ONNX Runtime's.")
    ] = TritonBackendName.onnxruntime,
    triton_device: Annotated[TritonDeviceName, typer.Option(help="Where Triton runs the model.")] = (
        TritonDeviceName.cpu
    ),
    triton_instances: Annotated[
        int, typer.Option(min=1, help="Copies of the model in Triton, per GPU with --triton-device gpu.")
    ] = 1,
    triton_queue_timeout_s: Annotated[
        float,
        typer.Option(min=0.0, help="Longest wait in Triton's queue; 0 sets no queue policy, see docs/triton.md."),
    ] = 0.0,
    triton_packed_weights: Annotated[
        str | None,
        typer.Option(
            metavar="DIRECTORY",
            help="Of the server: its instances write packed weights there once, and share them; backend python on cpu.",
        ),
    ] = None,
    triton_only: Annotated[
        bool,
        typer.Option("--triton-only", help="Write Triton's files of OUT/NAME again; export and measure nothing."),
    ] = False,
    triton_repository: Annotated[
        Path | None,
        typer.Option(help="With --triton-only: write them, and the model, to TRITON_REPOSITORY/NAME instead."),
    ] = None,
) -> None:
    """Exports CHECKPOINT to OUT/NAME: ONNX graph, manifest with measured accuracy and latency, Triton config."""
    with _clear_errors():
        triton = TritonOptions(
            triton_backend.value,
            triton_device.value,
            triton_instances,
            threads,
            triton_queue_timeout_s,
            None if triton_packed_weights is None else PurePosixPath(triton_packed_weights),
        )
        if triton_repository is not None and not triton_only:
            raise typer.BadParameter("--triton-repository goes with --triton-only")
        if profile_with and not profile_only:
            raise typer.BadParameter("--profile-with goes with --profile-only")
        if triton_only:
            if checkpoint is not None or profile_only:
                raise typer.BadParameter("--triton-only takes neither CHECKPOINT nor --profile-only")
            bundle = Bundle.load(out / name)
            if triton_repository is None:
                write_triton_files(bundle.directory, bundle.manifest, triton)
            else:
                write_model_directory(bundle, triton_repository / name, triton)
            console.print(f"Triton can mount {triton_repository or out}")
            return
        if profile_only:
            if checkpoint is not None:
                raise typer.BadParameter("--profile-only measures OUT/NAME and takes no CHECKPOINT")
            if profile_with:
                if images is not None or rounds == 0:
                    raise typer.BadParameter("--profile-with times bundles: it takes no --images and no --rounds 0")
                together = [name, *profile_with]
                time_together([out / each for each in together], threads, rounds, console)
                for each in together:
                    _print_points(Bundle.load(out / each, verify=False).manifest)
                return
            manifest = measure_bundle(out / name, images, threads, rounds, console)
        else:
            # Imports torch. Measuring a bundle must work where it is served, and there is no torch there.
            from exporter.export import ExportOptions, export_checkpoint, plan_export

            hints = Hints(
                image_size=None if image_size is None else parse_image_size(image_size),
                num_selected_experts=num_selected_experts,
                capacity_factor=capacity_factor,
                router=None if router is None else router.value,
                routing=None if routing is None else routing.value,
                position_embedding=None if positions is None else positions.value,
            )
            if dry_run:
                _print_plan(plan_export(checkpoint, hints, config, dtype.value))
                return
            if checkpoint is None:
                raise typer.BadParameter(
                    "CHECKPOINT is missing (only --profile-only, --triton-only and --dry-run go without)"
                )
            if (dtype is DataType.int8) != (calibration_images is not None):
                raise typer.BadParameter("--dtype int8 and --calibration-images go together: scales come from images")
            if target is TargetName.cuda and dtype is not DataType.float16:
                raise typer.BadParameter(f"--target cuda computes in float16, got --dtype {dtype.value}: give float16")
            options = ExportOptions(
                checkpoint=checkpoint,
                config=config,
                hints=hints,
                dtype=dtype.value,
                target=target.value,
                input_type=input_type.value,
                group_images=group_images,
                points=tuple(parse_point(text) for text in point or ()),
                max_selected_experts=max_selected_experts,
                mean=None if mean is None else parse_channel_values(mean),
                std=None if std is None else parse_channel_values(std),
                fit=None if fit is None else fit.value,
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
            manifest = export_checkpoint(out / name, options, console)
    _print_points(manifest)
    console.print(f"{out / name} is ready")


@app.command()
def recover(
    bundle: Annotated[Path, typer.Argument(help="Directory of a bundle, such as model_repository/vmoe-fashion-mnist.")],
    output: Annotated[Path, typer.Option(help="New directory for the checkpoint.")],
) -> None:
    """Turns BUNDLE back into a checkpoint, to fine-tune, evaluate or export it."""
    with _clear_errors():
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
