"""Writes what Triton needs beside the graph: config.pbtxt, warm-up inputs, the Python backend's files. Torch-free."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from exporter.bundle import LABELS_FILE, MODEL_FILE, Bundle, Manifest, write_manifest
from exporter.triton_config import WARMUP_DIRECTORY, TritonOptions, triton_config, warmup_files
from vmoe.atomic_directory import replaced_directory

CONFIG_FILE = "config.pbtxt"
# Of the Python backend, by the name of the module here. Not imported: the first needs modules that only Triton has.
_PYTHON_FILES = {"triton_model.py": "1/model.py", "packed_weights.py": "1/packed_weights.py"}


def write_triton_files(directory: Path, manifest: Manifest, options: TritonOptions) -> None:
    """Writes the files into a bundle, over those of an earlier configuration.

    Arguments:
        manifest: with `files`.
    """
    (directory / LABELS_FILE).write_text("".join(f"{label}\n" for label in manifest.labels))
    warmup = directory / WARMUP_DIRECTORY
    shutil.rmtree(warmup, ignore_errors=True)
    files = warmup_files(manifest)
    if files:
        warmup.mkdir()
    for name, values in files.items():
        (warmup / name).write_bytes(np.array(values, "<i8").tobytes())
    for module, name in _PYTHON_FILES.items():
        if options.backend == "python":
            shutil.copyfile(Path(__file__).with_name(module), directory / name)
        else:
            (directory / name).unlink(missing_ok=True)
    (directory / CONFIG_FILE).write_text(triton_config(manifest, options))


def write_model_directory(bundle: Bundle, directory: Path, options: TritonOptions) -> None:
    """Writes a bundle's model into another model repository, whole or not at all, for Triton to run it otherwise.

    The graph is a hard link to the bundle's, and a copy only where the file system refuses that.

    Arguments:
        directory: of the model, whose name is the bundle's; whatever stood there is replaced.

    Raises:
        ValueError: another name, which Triton would refuse.
    """
    if directory.name != bundle.manifest.name:
        raise ValueError(f"{directory} must have the model's name, {bundle.manifest.name}: Triton takes no other")
    with replaced_directory(directory) as temporary:
        (temporary / MODEL_FILE).parent.mkdir()
        for name in bundle.manifest.files:
            _link(bundle.directory / name, temporary / name)
        write_triton_files(temporary, bundle.manifest, options)
        write_manifest(temporary, bundle.manifest)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
