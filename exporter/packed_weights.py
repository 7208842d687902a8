"""A graph's weights as ONNX Runtime's CPU kernels multiply by them, in files that processes share.

ONNX Runtime rearranges ("packs") constant matrices for its kernels when it loads a graph: that takes time, and memory
of each process. Written once, and mapped from then on, the pages belong to the file: gateways and Triton's instances on
the same machine hold them once, and the kernel may drop and read them again. The arrangement depends on processor and
version, so it is no part of a bundle. Whoever can write the directory decides what is served: nobody else should be
able to.

The gateway imports this module; for Triton's Python backend it is copied beside `model.py`, so it stands alone.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import onnxruntime

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

MODEL: Final = "model.onnx"
WEIGHTS: Final = "model.onnx.data"
# Tried: 1.20.1 writes the weights as they are, 1.21.0 the packed ones beside them.
OLDEST_RUNTIME: Final = (1, 21)


class PackedWeightsError(Exception):
    """There are no packed weights to serve from; the message says why, and what would be right."""


def packed_model(source: Path, name: str, hashes: Sequence[str], directory: Path) -> Path:
    """The graph with packed weights, below `directory`; written there where it is missing.

    Arguments:
        source: the graph as it was exported.
        name: of the model.
        hashes: SHA-256 of the graph's files: of the graph, then of a separate weight file.

    Raises:
        PackedWeightsError: the directory cannot be written, or this ONNX Runtime is too old.
        Exception: one of ONNX Runtime's, which have no common class: it cannot load the graph.
    """
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < OLDEST_RUNTIME:
        raise PackedWeightsError(
            f"packed_weights needs ONNX Runtime {'.'.join(map(str, OLDEST_RUNTIME))} or newer, this is "
            f"{onnxruntime.__version__}, which packs in memory only"
        )
    target = directory / f"{name}-{_key(hashes)}"
    if not (target / MODEL).is_file():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with _alone(directory):
                if not (target / MODEL).is_file():
                    logger.info("packing the weights of %s into %s, once for this machine", name, target)
                    _write(source, target)
        except OSError as error:
            raise PackedWeightsError(
                f"packed_weights: cannot write {error.filename or target}: {error.strerror}; "
                "name a directory that this process may write"
            ) from error
    return target / MODEL


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Of those that start at once, one packs and the others wait. The lock ends with its process, however that ends."""
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system of a network locks directories
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(source: Path, target: Path) -> None:
    """Whole or not at all. Where `_alone` cannot keep processes apart each writes, and the first one's files stay."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _pack(source, temporary)
        temporary.replace(target)
    except OSError:
        if not (target / MODEL).is_file():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _pack(source: Path, folder: Path) -> None:
    """Loads a graph, and writes it as it was optimised, with packed weights."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; it warns that the files are for this hardware
    options.optimized_model_filepath = str(folder / MODEL)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", WEIGHTS)
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _key(hashes: Sequence[str]) -> str:
    """Of the files of the graph, the runtime, and the processor with its instruction sets."""
    parts = [*hashes, onnxruntime.__version__, onnxruntime.get_build_info(), platform.machine(), *_processor()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _processor() -> list[str]:
    """Model and flags as the kernel gives them, of the first core; empty where it does not."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.is_file() else []
    return [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
