"""Writes a bundle into a model repository, whole or not at all: graph, labels, Triton's config.pbtxt, manifest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from exporter.bundle import LABELS_FILE, MODEL_FILE, WEIGHTS_FILE, Manifest, sha256, write_manifest
from vmoe.atomic_directory import replaced_directory

# A protobuf ends at 2 GB, and holds three copies of the weights in memory while it is written. Chosen, not tuned.
INLINE_BYTES = 2**27

_TRITON_TYPES = {
    ir.DataType.UINT8: "TYPE_UINT8",
    ir.DataType.FLOAT: "TYPE_FP32",
    ir.DataType.INT64: "TYPE_INT64",
}


def write_bundle(
    directory: Path, graph: ir.Model, finish: Callable[[Path], Manifest], *, inline_bytes: int = INLINE_BYTES
) -> Manifest:
    """Writes the bundle `directory` atomically; whatever stood there is replaced only by a complete bundle.

    Arguments:
        graph: loses its weights when they are in the file, for `finish` opens that and would hold them twice.
        finish: gets the path of the written graph and returns the manifest, with `files` still empty. Parity check and
            profile run here: when they raise, nothing is left behind.
        inline_bytes: weights beyond this go into a file of their own, one after the other.
    """
    with replaced_directory(directory) as temporary:
        model = temporary / MODEL_FILE
        model.parent.mkdir()
        external = graph_bytes(graph) > inline_bytes
        ir.save(graph, model, external_data=Path(WEIGHTS_FILE).name if external else None)
        for value in graph.graph.initializers.values():
            value.const_value = None
        manifest = finish(model)
        (temporary / LABELS_FILE).write_text("".join(f"{label}\n" for label in manifest.labels))
        (temporary / "config.pbtxt").write_text(triton_config(graph, manifest))
        files = (MODEL_FILE, WEIGHTS_FILE) if external else (MODEL_FILE,)
        manifest = manifest.model_copy(update={"files": {name: sha256(temporary / name) for name in files}})
        write_manifest(temporary, manifest)
    return manifest


def graph_bytes(graph: ir.Model) -> int:
    """Size of all weights of a graph."""
    return sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value is not None)


def triton_config(graph: ir.Model, manifest: Manifest) -> str:
    """Triton's model configuration with explicit tensors; batching is the gateway's, so no dynamic batcher."""
    lines = [
        f'name: "{manifest.name}"',
        'backend: "onnxruntime"',
        f"max_batch_size: {manifest.max_batch_size}",
    ]
    for section, values in (("input", graph.graph.inputs), ("output", graph.graph.outputs)):
        for value in values:
            assert value.dtype is not None
            assert value.shape is not None
            dims = ", ".join(str(dim) for dim in value.shape[1:])  # the batch axis is implied
            label = f'  label_filename: "{LABELS_FILE}"\n' if value.name == "logits" else ""
            entry = f'  name: "{value.name}"\n  data_type: {_TRITON_TYPES[value.dtype]}\n  dims: [ {dims} ]\n{label}'
            lines.append(f"{section} [ {{\n{entry}}} ]")
    return "\n".join(lines) + "\n"
