"""Orbax folders, which the trainer of google-research/vmoe writes since August 2023. Torch-free.

    FOLDER/[STEP/][state/]manifest.ocdbt    one OCDBT database of zarr arrays: `params.Encoder.encoder_norm.bias`
    FOLDER/[STEP/][state/]params.../.zarray    the same arrays as folders, where OCDBT was off

Read through `tensorstore`, an optional dependency (extra `orbax`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vmoe.errors import CheckpointError
from vmoe.extras import install_command

Array = npt.NDArray[np.float32]

_SUFFIX = "/.zarray"
_MAX_EXPANSION = 16  # chosen: what zstd makes of arrays of zeros is bounded, what a hostile header claims is not
_MAX_EXTRA_BYTES = 2**28


def find_orbax(folder: Path) -> Path | None:
    """The folder that holds the arrays: this one, its `state` or `default`, or that of the latest step below it."""
    steps = sorted((p for p in folder.glob("*") if p.name.isdigit() and p.is_dir()), key=lambda p: int(p.name))
    for root in [folder, *steps[-1:]]:
        for candidate in (root, root / "state", root / "default"):
            if (candidate / "manifest.ocdbt").is_file() or any(candidate.glob("params.*/.zarray")):
                return candidate
    return None


def orbax_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by name, without reading values.

    Raises:
        CheckpointError: as `read_orbax`, but for the values.
    """
    with _clear_errors(folder):
        return {name: tuple(array.shape) for name, array in _arrays(folder).items()}


def read_orbax(folder: Path, *, progress: Callable[[int, int], None] = lambda read, total: None) -> dict[str, Array]:
    """Reads the parameters as float32, by name: the tree's keys joined with '/', without the leading `params`.

    Arguments:
        folder: as `find_orbax` returns it.
        progress: called with the bytes read since the last call and the bytes in all.

    Raises:
        CheckpointError: tensorstore is not installed, the folder is damaged, or a value is not finite.
    """
    parameters: dict[str, Array] = {}
    with _clear_errors(folder):
        arrays = _arrays(folder)
        total_bytes = sum(_size_bytes(array, array.shape) for array in arrays.values())
        for name, array in arrays.items():
            values = np.asarray(array.read().result())
            progress(values.nbytes, total_bytes)
            parameters[name] = values.astype(np.float32, copy=False)
            if not np.isfinite(parameters[name]).all():
                raise CheckpointError(f"{folder}: parameter {name} has values that are not finite")
    return parameters


@contextmanager
def _clear_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, OSError, KeyError, UnicodeDecodeError) as error:  # tensorstore's own errors are ValueErrors
        raise CheckpointError(f"{folder} is not a readable Orbax folder: {error}") from error


def _arrays(folder: Path) -> dict[str, Any]:
    """The parameters as arrays of tensorstore, which has read their metadata; none claims more than is plausible."""
    try:
        import tensorstore
    except ImportError as error:
        raise CheckpointError(
            f"{folder} is an Orbax folder, which needs tensorstore: {install_command('orbax')}"
        ) from error
    base = f"file://{folder.resolve()}/"
    is_ocdbt = (folder / "manifest.ocdbt").is_file()
    store: dict[str, Any] = {"driver": "ocdbt", "base": base} if is_ocdbt else {"driver": "file", "path": base[7:]}
    listed = [key.decode() for key in tensorstore.KvStore.open(store).result().list().result()]
    keys = sorted(key.removesuffix(_SUFFIX) for key in listed if key.endswith(_SUFFIX))
    if any(key.startswith("params.") for key in keys):
        keys = [key for key in keys if key.startswith("params.")]
    arrays = {key.removeprefix("params.").replace(".", "/"): _open(tensorstore, store, key) for key in keys}
    if not arrays:
        raise CheckpointError(f"{folder} holds no arrays")
    size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    limit = _MAX_EXPANSION * size_bytes + _MAX_EXTRA_BYTES
    total_bytes = sum(_size_bytes(array, array.shape) for array in arrays.values())
    if total_bytes > limit:
        raise CheckpointError(f"{folder} claims parameters of {total_bytes} bytes, but has {size_bytes} bytes")
    for name, array in arrays.items():
        if array.dtype.name not in ("float32", "float16", "bfloat16"):
            raise CheckpointError(f"{folder}: parameter {name} has dtype {array.dtype.name}, expected a float")
        # A chunk is decoded whole, however little of it belongs to the array.
        chunk = array.chunk_layout.read_chunk.shape
        if _size_bytes(array, chunk) > limit:
            raise CheckpointError(
                f"{folder}: parameter {name} of shape {tuple(array.shape)} has chunks of shape {tuple(chunk)}, but the "
                f"folder has {size_bytes} bytes"
            )
    return arrays


def _size_bytes(array: Any, shape: Sequence[int]) -> int:
    return prod(shape) * int(array.dtype.numpy_dtype.itemsize)


def _open(tensorstore: Any, store: dict[str, Any], name: str) -> Any:
    path = {**store, "path": f"{store.get('path', '')}{name}/"}
    # Without the last option a chunk that is missing reads as zeros.
    spec = {"driver": "zarr", "kvstore": path, "fill_missing_data_reads": False}
    return tensorstore.open(spec, open=True, read=True).result()
