"""The weights as the embedded engine multiplies by them, in files that processes share.

ONNX Runtime rearranges ("packs") constant matrices for its kernels when it loads a graph: that takes time, and memory
of each process. Written once, and mapped from then on, the pages belong to the file: gateways on the same machine hold
them once, and the kernel may drop and read them again. The arrangement depends on processor and version, so it is no
part of a bundle. Whoever can write the directory decides what is served: nobody else should be able to.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import onnxruntime

from exporter.bundle import Manifest
from server.backends.base import BackendError

logger = logging.getLogger(__name__)

MODEL: Final = "model.onnx"
WEIGHTS: Final = "model.onnx.data"


def packed_model(manifest: Manifest, directory: Path, write: Callable[[Path], None]) -> Path:
    """The graph with packed weights, below `directory`.

    Arguments:
        write: writes `MODEL` and `WEIGHTS` into the folder that it gets; called where they are missing.

    Raises:
        BackendError: the directory cannot be written.
    """
    target = directory / f"{manifest.name}-{_key(manifest)}"
    if not (target / MODEL).is_file():
        logger.info("packing the weights of %s into %s, once for this machine", manifest.name, target)
        try:
            _write(target, write)
        except OSError as error:
            raise BackendError(
                f"packed_weights: cannot write {error.filename or target}: {error.strerror}; "
                "name a directory that this process may write"
            ) from error
    return target / MODEL


def _write(target: Path, write: Callable[[Path], None]) -> None:
    """Whole or not at all. Of several processes that start at once each writes, and the first one's files stay."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        write(temporary)
        temporary.replace(target)
    except OSError:
        if not (target / MODEL).is_file():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _key(manifest: Manifest) -> str:
    """Of the files of the bundle, the runtime, and the processor with its instruction sets."""
    parts = [f"{name} {digest}" for name, digest in sorted(manifest.files.items())]
    parts += [onnxruntime.__version__, onnxruntime.get_build_info(), platform.machine(), *_processor()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _processor() -> list[str]:
    """Model and flags as the kernel gives them, of the first core; empty where it does not."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.is_file() else []
    return [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
