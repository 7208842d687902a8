"""The bundle on disk and its manifest: what the exporter writes and what gateway and load tests read. Torch-free.

    <model repository>/<name>/
        config.pbtxt     Triton's model configuration
        manifest.json    this module's `Manifest`
        labels.txt       a class name per line
        warmup/          constant inputs of Triton's warm-up samples
        1/model.onnx     the graph; weights once, whatever the number of operating points
        1/model.onnx.data    the weights of a large model, which the graph refers to

Tensors of the graph, with B images, L MoE layers, E experts, S tokens per image and K the largest number of selected
experts that the graph accepts:

    images                (B, H, W, channels) uint8, or float32 already normalised
    slots                 (B, L) int64, slots per expert of each MoE layer
    num_selected_experts  (B, 1) int64, 1 to K
    logits                (B, num_classes) float32
    kept                  (B, L) float32, share of the K * S assignments that were processed
    expert_load           (B, L, E) int64, tokens processed by each expert
    token_experts         (B, L, S, K) int64, expert that processed the token as its k-th choice, -1 where none did

Where experts choose their tokens (`router` is items_per_expert) there is no K: `num_selected_experts` must be 1, `kept`
is the mean number of experts per token, and `token_experts` has E choices, of which the e-th is e or -1.

A dense model has `images` and `logits` alone.
"""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vmoe.config import ConfigError, ModelConfig
from vmoe.operating_point import OperatingPoint
from vmoe.preprocess import Preprocessing

SCHEMA_VERSION: Final = 1
InputType = Literal["uint8", "float32"]
WeightType = Literal["float32", "float16", "bfloat16"]
StorageType = Literal[WeightType, "int8"]
Target = Literal["cpu", "cuda"]
NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # of a bundle; a plain name of a directory
MANIFEST_FILE = "manifest.json"
LABELS_FILE = "labels.txt"
MODEL_FILE = "1/model.onnx"
WEIGHTS_FILE = f"{MODEL_FILE}.data"  # only beside a large model


class BundleError(ValueError):
    """A bundle that must not be served; the message names the file and what is wrong with it."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Latency(_Model):
    """Inference time of a whole batch, measured on the machine that `Profile` describes."""

    batch_size: int = Field(ge=1)
    median_s: float = Field(gt=0)
    p99_s: float = Field(gt=0)


class Point(_Model):
    """An operating point of the model and what was measured there.

    Attributes:
        slots: slots per expert of each MoE layer.
        relative_compute: multiply-accumulates per image over those of the last point.
        accuracy: top-1 on the profiling images, None when none were given.
        kept: mean share of assignments processed, per MoE layer; None without profiling images.
        dominated: another point is at least as accurate at no more compute. Policies skip such points. The last point,
            at which the model was trained, is never marked.
        latency: ascending batch size; empty before profiling.
    """

    capacity_factor: float = Field(gt=0, allow_inf_nan=False)
    num_selected_experts: int = Field(ge=1)
    slots: tuple[int, ...]
    relative_compute: float = Field(gt=0)
    accuracy: float | None = Field(default=None, ge=0, le=1)
    kept: tuple[float, ...] | None = None
    dominated: bool = False
    latency: tuple[Latency, ...] = ()

    @property
    def operating_point(self) -> OperatingPoint:
        return OperatingPoint(self.capacity_factor, self.num_selected_experts)


class Parity(_Model):
    """Disagreement of PyTorch and ONNX Runtime over all points, on seeded noise and on real images; in 8 bits on real
    images alone.

    Attributes:
        max_abs_error: of the logits, over the comparisons in which both made the same routing decisions.
        top1_agreement: share of all comparisons with the same best class.
        rerouted: share of all comparisons in which some token went elsewhere: two gates closer than rounding.
        tolerance: largest `max_abs_error` allowed, in 8 bits largest `relative_error`.
        num_comparisons: images times operating points.
        relative_error: root mean square of the logits' error over their standard deviation, of all comparisons.
        min_agreement: smallest `top1_agreement` allowed, where products are computed in fewer than 32 bits.
    """

    max_abs_error: float
    top1_agreement: float
    rerouted: float
    tolerance: float
    num_comparisons: int
    relative_error: float | None = None
    min_agreement: float | None = None


class Quantisation(_Model):
    """How the scales of an 8-bit graph came about.

    Attributes:
        images: that the activations' ranges were measured on, and their number.
        points: operating points at which they were measured; empty for a dense model.
        weight_bits: of the integers that weights are rounded to; activations have 8.
    """

    images: str
    num_images: int = Field(ge=1)
    points: tuple[str, ...]
    weight_bits: int


class Profile(_Model):
    """Where and how the latencies were measured; `images` names the accuracy images and their number.

    Attributes:
        rounds: timed runs per point and batch size, 0 where they were not recorded. With fewer than 100 the 99th
            percentile is little else than the largest.
    """

    machine: str
    runtime: str
    threads: int
    date: str
    images: str | None = None
    num_images: int = 0
    rounds: int = Field(default=0, ge=0)


class Provenance(_Model):
    """How the bundle came about."""

    checkpoint: str
    checkpoint_sha256: str
    command: str
    date: str
    versions: dict[str, str]


class Manifest(_Model):
    """Everything about an exported model besides its weights.

    Attributes:
        name, version: as in the model repository.
        architecture: `ModelConfig.to_json` as an object.
        input: dtype of `images`.
        weights: dtype in which the weights are stored. They are widened to float32 at load; with int8 the large
            products are computed in 8 bits, see `exporter.int8`.
        target: for which the graph was written. Both forms run anywhere, see `exporter.cuda`.
        max_selected_experts: largest K that the graph accepts.
        points: from the cheapest to the full one; empty for a dense model.
        files: SHA-256 of every file of the bundle that the graph needs.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str = Field(pattern=NAME_PATTERN)
    version: str = "1"
    architecture: ModelConfig
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    input: InputType
    weights: StorageType
    target: Target = "cpu"
    max_selected_experts: int = Field(ge=0)
    max_batch_size: int = Field(ge=1)
    points: tuple[Point, ...]
    quantisation: Quantisation | None = None
    parity: Parity | None = None
    profile: Profile | None = None
    provenance: Provenance
    files: dict[str, str]

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if len(self.labels) != self.architecture.num_classes:
            raise ValueError(f"{len(self.labels)} labels for {self.architecture.num_classes} classes")
        for point in self.points:
            expected = self.architecture.slots(point.operating_point)
            if point.slots != expected:
                raise ValueError(f"point {point.operating_point} has slots {point.slots}, expected {expected}")
        if (self.weights == "int8") != (self.quantisation is not None):
            raise ValueError("weights of int8 need an entry `quantisation`, others have none")
        if (self.architecture.moe is None) != (not self.points):
            raise ValueError("a sparse model needs operating points, a dense model has none")
        return self

    @property
    def num_moe_layers(self) -> int:
        return 0 if self.architecture.moe is None else len(self.architecture.moe.layers)

    @property
    def choices_per_token(self) -> int:
        """Last axis of the graph's `token_experts`."""
        moe = self.architecture.moe
        return self.max_selected_experts if moe is None else moe.choices_per_token(self.max_selected_experts)


class Bundle:
    """A bundle on disk whose manifest was checked.

    Attributes:
        directory: of the model, `<model repository>/<name>`.
        manifest: its content.
        manifest_sha256: of the file that was read; empty where there was none.
    """

    def __init__(self, directory: Path, manifest: Manifest, manifest_sha256: str = "") -> None:
        self.directory, self.manifest, self.manifest_sha256 = directory, manifest, manifest_sha256

    @property
    def model_path(self) -> Path:
        return self.directory / MODEL_FILE

    @classmethod
    def load(cls, directory: Path, *, verify: bool = True) -> Bundle:
        """Reads and checks a bundle.

        Arguments:
            verify: compare the SHA-256 of each file with the manifest's.

        Raises:
            BundleError: a file is missing, malformed or not the one that the manifest describes.
        """
        path = directory / MANIFEST_FILE
        try:
            text = path.read_bytes()
            manifest = Manifest.model_validate_json(text)
        except OSError as error:
            raise BundleError(f"cannot read {path}: {error.strerror}; is {directory} a bundle?") from error
        except ValidationError as error:
            raise BundleError(f"{path} {_told(error)}") from error
        except ConfigError as error:
            raise BundleError(f"{path} is not a valid manifest: {error}") from error
        for name, digest in manifest.files.items():
            file = directory / name
            if not file.resolve().is_relative_to(directory.resolve()):
                raise BundleError(f"{path} names {name!r}, which lies outside the bundle")
            if not file.is_file():
                raise BundleError(f"{file} is missing, but {path} names it")
            if verify and (found := sha256(file)) != digest:
                raise BundleError(f"{file} has SHA-256 {found}, the manifest says {digest}: export the bundle again")
        return cls(directory, manifest, hashlib.sha256(text).hexdigest())


def _told(error: ValidationError) -> str:
    """What is wrong with a manifest, in one line: that it is too new, or else its first error."""
    found = error.errors(include_url=False, include_context=False)
    versions = [each["input"] for each in found if each["loc"] == ("schema_version",)]
    if versions and isinstance(versions[0], int) and versions[0] > SCHEMA_VERSION:
        return (
            f"was written by a newer exporter: it has schema_version {versions[0]}, this version reads "
            f"{SCHEMA_VERSION}. Update this program, or export the checkpoint again with its exporter"
        )
    first = found[0]
    where = ".".join(map(str, first["loc"]))
    seen = f", got {reprlib.repr(first['input'])}" if where and first["type"] != "missing" else ""
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"is not a valid manifest: {where}{': ' if where else ''}{first['msg']}{seen}{more}"


def frontier(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points that are not dominated, from cheapest to full."""
    return tuple(point for point in points if not point.dominated)


def dominates(one: Point, other: Point) -> bool:
    """`one` is at least as accurate at no more compute, and better in one of both. Both were measured."""
    assert one.accuracy is not None
    assert other.accuracy is not None
    no_worse = one.accuracy >= other.accuracy and one.relative_compute <= other.relative_compute
    return no_worse and (one.accuracy > other.accuracy or one.relative_compute < other.relative_compute)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Replaces the manifest of a bundle; a reader sees the old file or the new one."""
    temporary = directory / f".{MANIFEST_FILE}.new"
    temporary.write_text(manifest.model_dump_json(indent=2) + "\n")
    temporary.replace(directory / MANIFEST_FILE)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
