"""Writes a bundle into a model repository, whole or not at all: graph, Triton's files, manifest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from exporter.bundle import MODEL_FILE, WEIGHTS_FILE, Manifest, sha256, write_manifest
from exporter.triton_config import TritonOptions
from exporter.triton_directory import write_triton_files
from vmoe.atomic_directory import replaced_directory

# A protobuf ends at 2 GB, and holds three copies of the weights in memory while it is written. Chosen, not tuned.
INLINE_BYTES = 2**27


def write_bundle(
    directory: Path,
    graph: ir.Model,
    finish: Callable[[Path], Manifest],
    triton: TritonOptions,
    *,
    inline_bytes: int = INLINE_BYTES,
) -> Manifest:
    """Writes the bundle `directory` atomically; whatever stood there is replaced only by a complete bundle.

    Arguments:
        graph: loses its weights when they are in the file, for `finish` opens that and would hold them twice.
        finish: gets the path of the written graph and returns the manifest, with `files` still empty. Parity check and
            profile run here: when they raise, nothing is left behind.
        triton: how Triton shall run the model.
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
        files = (MODEL_FILE, WEIGHTS_FILE) if external else (MODEL_FILE,)
        manifest = manifest.model_copy(update={"files": {name: sha256(temporary / name) for name in files}})
        write_triton_files(temporary, manifest, triton)
        write_manifest(temporary, manifest)
    return manifest


def graph_bytes(graph: ir.Model) -> int:
    """Size of all weights of a graph."""
    return sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value is not None)
