"""Triton's model configuration of a bundle, as the text of config.pbtxt. Torch-free, and free of tritonclient.

The schema is model_config.proto of triton-inference-server/common; the tests parse what is written here against the
copy that ships in tritonclient. Everything is explicit, so that a server never has to complete a configuration, and
a server that would understand the graph differently refuses to load it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from exporter.bundle import LABELS_FILE, MODEL_FILE, WEIGHTS_FILE, Manifest, Point, frontier
from exporter.profiling import BATCH_SIZES
from exporter.tensors import Tensor, TensorType, graph_inputs, graph_outputs

TritonBackend = Literal["onnxruntime", "python"]
TritonDevice = Literal["cpu", "gpu"]

WARMUP_DIRECTORY = "warmup"  # where Triton looks for input_data_file

_TYPES: dict[TensorType, str] = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32", "int64": "TYPE_INT64"}


@dataclass(frozen=True)
class TritonOptions:
    """How Triton shall run a model.

    Attributes:
        backend: `onnxruntime`, or `python` for a server without it: the same graph in `1/model.py`.
        device: of every instance.
        instances: copies of the model, per GPU where the device is one; each holds its own weights but for
            `packed_weights`.
        threads: of one inference of one instance on a CPU; 0 is all cores.
        queue_timeout_s: longest that a request may wait in the server, which a request's own timeout lowers; 0 sets no
            queue policy, and then Triton ignores the timeouts of requests.
        packed_weights: directory of the server's machine in which `exporter.packed_weights` keeps the weights for all
            instances; absolute, for the backend `python` on a CPU.

    Raises:
        ValueError: `packed_weights` is relative, or for others.
    """

    backend: TritonBackend = "onnxruntime"
    device: TritonDevice = "cpu"
    instances: int = 1
    threads: int = 0
    queue_timeout_s: float = 0.0
    packed_weights: PurePosixPath | None = None

    def __post_init__(self) -> None:
        if self.packed_weights is None:
            return
        if (self.backend, self.device) != ("python", "cpu"):
            raise ValueError(
                f"packed_weights is for the backend python on a cpu, got {self.backend} on a {self.device}: the ONNX "
                "Runtime backend has no way to share weights"
            )
        if not self.packed_weights.is_absolute():
            raise ValueError(f"packed_weights must be absolute, a directory of the server, got {self.packed_weights}")


def triton_config(manifest: Manifest, options: TritonOptions) -> str:
    """The content of config.pbtxt.

    Arguments:
        manifest: with `files`.
    """
    return "\n".join(_lines(manifest, options)) + "\n"


def warmup_files(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Constant inputs of the warm-up samples: int64 values of one image, by file name in the warm-up directory."""
    files: dict[str, tuple[int, ...]] = {}
    for point in frontier(manifest.points):
        files[_slots_file(point)] = point.slots
        files[_selected_file(point)] = (point.num_selected_experts,)
    return files


def _lines(manifest: Manifest, options: TritonOptions) -> Iterator[str]:
    yield "# Written by `python -m exporter`; --triton-only writes it again without an export."
    yield f'name: "{manifest.name}"'
    yield f'backend: "{options.backend}"'
    yield f"max_batch_size: {manifest.max_batch_size}"
    yield f"version_policy {{ specific {{ versions: [ {manifest.version} ] }} }}"
    for tensor in graph_inputs(manifest):
        yield f"input [ {{ {_tensor(tensor)} }} ]"
    for tensor in graph_outputs(manifest):
        label = f' label_filename: "{LABELS_FILE}"' if tensor.name == "logits" else ""
        yield f"output [ {{ {_tensor(tensor)}{label} }} ]"
    yield f"instance_group [ {{ count: {options.instances} kind: KIND_{options.device.upper()} }} ]"
    yield from _queue(options)
    yield from _accelerator(options)
    yield from _parameters(manifest, options)
    yield from _warmup(manifest)


def _tensor(tensor: Tensor) -> str:
    dims = ", ".join(str(dim) for dim in tensor.dims)
    return f'name: "{tensor.name}" data_type: {_TYPES[tensor.dtype]} dims: [ {dims} ]'


def _queue(options: TritonOptions) -> Iterator[str]:
    """A queue out of which a cancelled request is taken, which Triton has only in its dynamic batcher; no batching."""
    yield "# The dynamic batcher is here because it drops what a client has given up. It must merge nothing: the"
    yield "# gateway forms the batches and reckons with their measured latency, which a second gateway's images in the"
    yield "# same run would falsify. A preferred size of 1 does that: whatever request is first reaches or exceeds it"
    yield "# alone. A queue policy makes tritonserver 2.51 leave requests lying: docs/triton.md, Queue."
    yield "dynamic_batching {"
    yield "  preferred_batch_size: [ 1 ] max_queue_delay_microseconds: 0"
    if options.queue_timeout_s:
        timeout = f"default_timeout_microseconds: {round(1e6 * options.queue_timeout_s)} allow_timeout_override: true"
        yield f"  default_queue_policy {{ timeout_action: REJECT {timeout} }}"
    yield "}"


def _accelerator(options: TritonOptions) -> Iterator[str]:
    if options.backend == "onnxruntime" and options.device == "gpu":
        yield "# TensorRT would compile an engine for every number of kept tokens."
        yield 'optimization { execution_accelerators { gpu_execution_accelerator [ { name: "cuda" } ] } }'


def _parameters(manifest: Manifest, options: TritonOptions) -> Iterator[str]:
    parameters = {"model_sha256": manifest.files[MODEL_FILE]}
    if WEIGHTS_FILE in manifest.files:
        parameters["weights_sha256"] = manifest.files[WEIGHTS_FILE]
    if options.device == "cpu":
        parameters["intra_op_thread_count"] = str(options.threads)
    if options.packed_weights is not None:
        parameters["packed_weights"] = str(options.packed_weights)
    for key, value in parameters.items():
        # The quotes and escapes of JSON are those of protobuf's text, which takes other characters as they are.
        yield f'parameters {{ key: "{key}" value {{ string_value: {json.dumps(value, ensure_ascii=False)} }} }}'


def _warmup(manifest: Manifest) -> Iterator[str]:
    """A sample for each operating point that policies choose and each batch size that was profiled.

    Triton hands a sample over as `batch_size` requests of one image in one execution.
    """
    images, *rest = (_tensor_of_sample(tensor) for tensor in graph_inputs(manifest))
    # Random bytes are no good as floats: they include NaN.
    pixels = f'key: "images" value {{ {images} {"random" if manifest.input == "uint8" else "zero"}_data: true }}'
    for size in _batch_sizes(manifest):
        for point in frontier(manifest.points) or (None,):
            yield "model_warmup [ {"
            yield f'  name: "{_point_name(point)}, batch {size}"'
            yield f"  batch_size: {size}"
            yield f"  inputs {{ {pixels} }}"
            if point is not None:
                slots, selected = rest
                yield f'  inputs {{ key: "slots" value {{ {slots} input_data_file: "{_slots_file(point)}" }} }}'
                file = _selected_file(point)
                yield f'  inputs {{ key: "num_selected_experts" value {{ {selected} input_data_file: "{file}" }} }}'
            yield "} ]"


def _batch_sizes(manifest: Manifest) -> list[int]:
    """Those that were profiled, from which a gateway foresees all others; without a profile the usual ones."""
    profiled = {entry.batch_size for point in manifest.points for entry in point.latency}
    if profiled:
        return sorted(profiled)
    moe = manifest.architecture.moe
    group = 1 if moe is None else moe.group_images
    return [size * group for size in BATCH_SIZES if size * group <= manifest.max_batch_size]


def _tensor_of_sample(tensor: Tensor) -> str:
    dims = ", ".join(str(dim) for dim in tensor.dims)
    return f"data_type: {_TYPES[tensor.dtype]} dims: [ {dims} ]"


def _point_name(point: Point | None) -> str:
    return "dense" if point is None else str(point.operating_point)


def _slots_file(point: Point) -> str:
    return f"slots_{point.capacity_factor:g}_{point.num_selected_experts}"


def _selected_file(point: Point) -> str:
    return f"num_selected_experts_{point.num_selected_experts}"
