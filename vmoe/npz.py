"""Flat `.npz` files of big_vision and vision_transformer: their arrays under the names of google-research/vmoe's tree.

    params/embedding/kernel, opt/target/embedding/kernel    the prefix is dropped
    Transformer/encoderblock_N/MultiHeadDotProductAttention_0, _1    Encoder/encoderblock_N/SelfAttention
    Transformer/encoderblock_N/MlpBlock_0, _3               Encoder/encoderblock_N/Mlp
    Transformer/encoderblock_N/LayerNorm_2                  Encoder/encoderblock_N/LayerNorm_1
    pos_embedding (big_vision: the patches' alone)          Encoder/posembed_input/pos_embedding
    MAPHead_0/...                                           MapHead/...

Nothing is unpickled, and no array is allocated that the file has no bytes for. Torch-free.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from vmoe.architecture import POSITION_TABLE
from vmoe.errors import CheckpointError

Array = npt.NDArray[np.float32]

# Chosen: trained weights hardly shrink when deflated, a head of zeros does (21,843 x 1,024 float32 are 90 MB).
_MAX_EXPANSION = 4
_MAX_EXTRA_BYTES = 2**28

_RENAMES = (
    (re.compile(r"^(params|opt/target)/"), ""),
    (re.compile(r"^Transformer/"), "Encoder/"),
    (re.compile(r"^MAPHead_0/MultiHeadDotProductAttention_0/"), "MapHead/MultiHeadDotProductAttention/"),
    (re.compile(r"^MAPHead_0/MlpBlock_0/"), "MapHead/Mlp/"),
    (re.compile(r"^MAPHead_0/LayerNorm_0/"), "MapHead/LayerNorm/"),
    (re.compile(r"^MAPHead_0/"), "MapHead/"),
    (re.compile(r"^(Encoder/encoderblock_\d+)/MultiHeadDotProductAttention_\d/"), r"\1/SelfAttention/"),
    (re.compile(r"^(Encoder/encoderblock_\d+)/MlpBlock_\d/"), r"\1/Mlp/"),
    (re.compile(r"^(Encoder/encoderblock_\d+)/LayerNorm_2/"), r"\1/LayerNorm_1/"),
)


def read_npz(path: Path, *, progress: Callable[[int, int], None] = lambda read, total: None) -> dict[str, Array]:
    """Reads the parameters as float32, by name; optimiser state beside `params/` or `opt/target/` is passed over.

    Arguments:
        progress: called with the bytes read since the last call and the bytes in all.

    Raises:
        CheckpointError: the file is no npz of arrays, or claims more than it holds, or a value is not finite.
    """
    parameters: dict[str, Array] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(path, archive)
            total_bytes = sum(member.file_size for member in members.values())
            for key, member in members.items():
                name = _rename(key)
                if name in parameters:
                    raise CheckpointError(f"{path}: two parameters are called {name}")
                with archive.open(member) as file:
                    parameters[name] = _read_array(path, key, file, member.file_size)
                progress(member.file_size, total_bytes)
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a readable npz file: {error}") from error
    return _with_class_position(parameters)


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The arrays of the model by name."""
    members = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
    for root in ("params/", "opt/target/"):
        if any(name.startswith(root) for name in members):
            members = {name: entry for name, entry in members.items() if name.startswith(root)}
    claimed = sum(member.file_size for member in members.values())
    limit = _MAX_EXPANSION * path.stat().st_size + _MAX_EXTRA_BYTES
    if claimed > limit:
        raise CheckpointError(f"{path} claims to hold {claimed} bytes, at most {limit} are plausible for its size")
    return members


def _read_array(path: Path, key: str, file: IO[bytes], size_bytes: int) -> Array:
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(file)
    except ValueError as error:
        raise CheckpointError(f"{path}: parameter {key} is not an array: {error}") from error
    if dtype.hasobject or (dtype.kind != "f" and dtype != np.dtype("V2")):
        raise CheckpointError(f"{path}: parameter {key} has dtype {dtype}, expected float16, bfloat16, float32 or 64")
    if prod(shape) * dtype.itemsize > size_bytes:
        raise CheckpointError(f"{path}: parameter {key} of shape {shape} does not fit into its {size_bytes} bytes")
    data = file.read(prod(shape) * dtype.itemsize)
    if len(data) != prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{path}: parameter {key} of shape {shape} is cut short")
    if dtype == np.dtype("V2"):  # big_vision stores bfloat16 as two raw bytes: the upper half of a float32
        values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(data, dtype).astype(np.float32)
    if not np.isfinite(values).all():
        raise CheckpointError(f"{path}: parameter {key} has values that are not finite")
    return values.reshape(shape, order="F" if fortran_order else "C")


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def _with_class_position(parameters: dict[str, Array]) -> dict[str, Array]:
    """big_vision adds positions before the class token joins; the same table with a row of zeros for that token."""
    if "pos_embedding" in parameters:
        table = parameters.pop("pos_embedding")
        if "cls" in parameters and table.ndim == 3:
            table = np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)
        parameters[POSITION_TABLE] = table
    return parameters
