"""The options of `python -m exporter export`, as types of its arguments; the defaults stand there. Torch-free."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from exporter import bundle, triton_config
from vmoe.config import RouterKind
from vmoe.config import Routing as RoutingKind
from vmoe.preprocess import Fit as FitKind

Checkpoint = Annotated[
    Path | None,
    typer.Argument(
        help="Directory written by `python -m vmoe train`; prefix of a google-research/vmoe checkpoint; Orbax "
        "folder; .npz; state dict (.safetensors, .pt)."
    ),
]
DEFAULT_NAME: Final = "vmoe"


def _directory_names(given: str | list[str] | None) -> str | list[str] | None:
    """What names directories of a model repository may not lead out of it."""
    for name in [given] if isinstance(given, str) else given or ():
        if re.fullmatch(bundle.NAME_PATTERN, name) is None:
            raise typer.BadParameter(
                f"a bundle's name is that of a directory: letters, digits, '.', '_' and '-', a letter or digit first; "
                f"got {name!r}"
            )
    return given


Name = Annotated[
    str | None,
    typer.Option(
        callback=_directory_names,
        help=f"Name of the bundle and of Triton's model; {DEFAULT_NAME} where it is not given.",
    ),
]
Out = Annotated[Path, typer.Option(help="Model repository.")]
Images = Annotated[
    Path | None, typer.Option(help="Labelled images (IDX directory or image folder) that give the accuracies.")
]
Dtype = Annotated[
    bundle.StorageType, typer.Option(help="Storage of the weights; int8 computes the large products in 8 bits.")
]
CalibrationImages = Annotated[
    Path | None,
    typer.Option(help="With --dtype int8: images (as --images, but the training split) that give the scales."),
]
Target = Annotated[
    bundle.Target,
    typer.Option(help="What runs the graph; cuda pads slots and needs --dtype float16, in which it computes."),
]
Input = Annotated[bundle.InputType, typer.Option("--input", help="Pixels, or normalised floats.")]
Config = Annotated[
    Path | None,
    typer.Option(help="Constructor arguments of the reference (JSON, bare or under `model`), instead of inference."),
]
ImageSize = Annotated[
    str | None, typer.Option(help="H or HxW; learned positions are interpolated when it is not the model's own.")
]
NumSelectedExperts = Annotated[int | None, typer.Option(min=1, help="K of the full operating point.")]
CapacityFactor = Annotated[float | None, typer.Option(help="C of the full operating point.")]
Routing = Annotated[RoutingKind | None, typer.Option(help="Whom a full expert serves.")]
Router = Annotated[RouterKind | None, typer.Option(help="Who chooses; parameters do not tell.")]
Positions = Annotated[
    Literal["sincos2d", "none"] | None, typer.Option(help="Positions of a model without a table of them.")
]
GroupImages = Annotated[int, typer.Option(min=1, help="Images per routing group.")]
Points = Annotated[list[str] | None, typer.Option(help="Operating point C,K; repeat for several. Default: a ladder.")]
MaxSelectedExperts = Annotated[int | None, typer.Option(min=1, help="Largest K of the graph.")]
Labels = Annotated[
    str | None,
    typer.Option(metavar="FILE|imagenet-1k", help="Class names, one per line, instead of the checkpoint's."),
]
Mean = Annotated[
    str | None, typer.Option(help="Of pixels scaled to 0..1, per channel: 0.485,0.456,0.406. Default: 0.5.")
]
Std = Annotated[str | None, typer.Option(help="Per channel, as --mean.")]
Fit = Annotated[FitKind | None, typer.Option(help="How an image gets the model's size.")]
CropFraction = Annotated[
    float | None, typer.Option(help="With center_crop: side of the crop over the scaled shorter side.")
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        help="Largest difference of logits from PyTorch's. Default: 1e-4; of their spread: int8 0.1, cuda 0.02."
    ),
]
MinAgreement = Annotated[
    float,
    typer.Option(min=0, max=1, help="With int8 or cuda: share of images that must keep PyTorch's best class."),
]
Threads = Annotated[int, typer.Option(help="Threads of the runtime; 0 is all cores.")]
Rounds = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Timed runs per point and batch size; 0 measures no latency. Default: 100, fewer for a large model.",
    ),
]
ParityImages = Annotated[
    int | None,
    typer.Option(min=1, help="Images on which graph and model are compared. Default: 256, fewer for a large model."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the parameters of CHECKPOINT or --config; export nothing."),
]
ProfileOnly = Annotated[
    bool, typer.Option("--profile-only", help="Measure OUT/NAME again on this machine; export nothing.")
]
ProfileWith = Annotated[
    list[str] | None,
    typer.Option(
        callback=_directory_names,
        help="With --profile-only: another bundle of the model, timed in the same run; may be repeated.",
    ),
]
TritonBackend = Annotated[
    triton_config.TritonBackend, typer.Option(help="Triton's backend; python is for servers without ONNX Runtime's.")
]
TritonDevice = Annotated[triton_config.TritonDevice, typer.Option(help="Where Triton runs the model.")]
TritonInstances = Annotated[
    int, typer.Option(min=1, help="Copies of the model in Triton, per GPU with --triton-device gpu.")
]
TritonQueueTimeout = Annotated[
    float,
    typer.Option(min=0.0, help="Longest wait in Triton's queue; 0 sets no queue policy, see docs/triton.md."),
]
TritonPackedWeights = Annotated[
    str | None,
    typer.Option(
        metavar="DIRECTORY",
        help="Of the server: its instances write packed weights there once, and share them; backend python on cpu.",
    ),
]
TritonOnly = Annotated[
    bool,
    typer.Option("--triton-only", help="Write Triton's files of OUT/NAME again; export and measure nothing."),
]
TritonRepository = Annotated[
    Path | None,
    typer.Option(help="With --triton-only: write them, and the model, to TRITON_REPOSITORY/NAME instead."),
]
