"""Flat `.npz` files of big_vision and vision_transformer: their arrays under the names of google-research/vmoe's tree.

    params/embedding/kernel, opt/target/embedding/kernel    the prefix is dropped
    Transformer/encoderblock_N/MultiHeadDotProductAttention_0, _1    Encoder/encoderblock_N/SelfAttention
    Transformer/encoderblock_N/MlpBlock_0, _3               Encoder/encoderblock_N/Mlp
    Transformer/encoderblock_N/LayerNorm_2                  Encoder/encoderblock_N/LayerNorm_1
    pos_embedding (big_vision: the patches' alone)          Encoder/posembed_input/pos_embedding
    MAPHead_0/...                                           MapHead/...

Nothing is unpickled, and no array is allocated that the file has no bytes for. Shapes come from the first bytes of each
member, so that a model that does not fit is refused before its values are read. Torch-free.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tokenize import TokenError

import numpy as np
import numpy.typing as npt

from vmoe.architecture import POSITION_TABLE
from vmoe.errors import CheckpointError

Array = npt.NDArray[np.float32]

# Chosen: trained weights hardly shrink when deflated, a head of zeros does (21,843 x 1,024 float32 are 90 MB).
_MAX_EXPANSION = 4
_MAX_EXTRA_BYTES = 2**28
_HEADER_BYTES = 2**14  # NumPy takes headers of up to 10,000 characters, but reads up to 4 GB before it says so
_PIECE_BYTES = 2**20  # read at once; chosen, not tuned

_BFLOAT16 = np.dtype("V2")  # big_vision stores it as two raw bytes: the upper half of a float32
_PATCH_POSITIONS = "pos_embedding"

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


@dataclass(frozen=True)
class _Stored:
    """An array in the file.

    Attributes:
        key: its name there.
        offset: of its values in the member.
        dtype: as stored; two raw bytes are bfloat16.
    """

    key: str
    member: zipfile.ZipInfo
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    fortran_order: bool

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def npz_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter that `read_npz` would give, by name, without reading values.

    Raises:
        CheckpointError: as `read_npz`, but for the values.
    """
    with _opened(path) as archive:
        shapes = {name: stored.shape for name, stored in _arrays(path, archive).items()}
    if _PATCH_POSITIONS in shapes:
        table = shapes.pop(_PATCH_POSITIONS)
        shapes[POSITION_TABLE] = (table[0], 1 + table[1], table[2]) if "cls" in shapes and len(table) == 3 else table
    return shapes


def read_npz(path: Path, *, progress: Callable[[int, int], None] = lambda read, total: None) -> dict[str, Array]:
    """Reads the parameters as float32, by name; optimiser state beside `params/` or `opt/target/` is passed over.

    Arguments:
        progress: called with the bytes read since the last call and the bytes in all.

    Raises:
        CheckpointError: the file is no npz of arrays, or claims more than it holds, or a value is not finite.
    """
    parameters: dict[str, Array] = {}
    with _opened(path) as archive:
        arrays = _arrays(path, archive)
        total_bytes = sum(stored.size_bytes for stored in arrays.values())
        for name, stored in arrays.items():
            parameters[name] = _read_values(path, archive, stored)
            progress(stored.size_bytes, total_bytes)
    if _PATCH_POSITIONS in parameters:
        table = parameters.pop(_PATCH_POSITIONS)
        if "cls" in parameters and table.ndim == 3:
            # big_vision adds positions before the class token joins: the same table with zeros for that token.
            table = np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)
        parameters[POSITION_TABLE] = table
    return parameters


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise CheckpointError(f"{path} is not a readable npz file: {error}") from error


def _arrays(path: Path, archive: zipfile.ZipFile) -> dict[str, _Stored]:
    """The arrays of the model under the reference's names, each with room for its values in the file."""
    members = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
    for root in ("params/", "opt/target/"):
        if any(name.startswith(root) for name in members):
            members = {name: entry for name, entry in members.items() if name.startswith(root)}
    claimed = sum(member.file_size for member in members.values())
    limit = _MAX_EXPANSION * path.stat().st_size + _MAX_EXTRA_BYTES
    if claimed > limit:
        raise CheckpointError(f"{path} claims to hold {claimed} bytes, at most {limit} are plausible for its size")
    arrays: dict[str, _Stored] = {}
    for key, member in members.items():
        name = _rename(key)
        if name in arrays:
            raise CheckpointError(f"{path}: two parameters are called {name}")
        arrays[name] = _read_header(path, archive, key, member)
    return arrays


def _read_header(path: Path, archive: zipfile.ZipFile, key: str, member: zipfile.ZipInfo) -> _Stored:
    with archive.open(member) as file:
        head = io.BytesIO(file.read(_HEADER_BYTES))
    try:
        version = np.lib.format.read_magic(head)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(head)
    except (ValueError, TypeError, SyntaxError, TokenError, RecursionError, MemoryError) as error:
        # The header is a Python literal, which NumPy parses, after failing once more as one of Python 2.
        raise CheckpointError(f"{path}: parameter {key} is not an array: {error}") from error
    if dtype.hasobject or (dtype.kind != "f" and dtype != _BFLOAT16):
        raise CheckpointError(f"{path}: parameter {key} has dtype {dtype}, expected float16, bfloat16, float32 or 64")
    if min(shape, default=1) < 1:
        raise CheckpointError(f"{path}: parameter {key} has shape {shape}, every axis should be at least 1")
    stored = _Stored(key, member, head.tell(), shape, dtype, fortran_order)
    if stored.size_bytes > member.file_size - stored.offset:
        room = member.file_size - stored.offset
        raise CheckpointError(f"{path}: parameter {key} of shape {shape} does not fit into its {room} bytes")
    return stored


def _read_values(path: Path, archive: zipfile.ZipFile, stored: _Stored) -> Array:
    data = np.empty(stored.size_bytes, np.uint8)
    room = data.data
    with archive.open(stored.member) as file:
        file.read(stored.offset)
        while room:
            piece = file.read(min(len(room), _PIECE_BYTES))
            if not piece:
                raise CheckpointError(f"{path}: parameter {stored.key} of shape {stored.shape} is cut short")
            room[: len(piece)] = piece
            room = room[len(piece) :]
    if stored.dtype == _BFLOAT16:
        numbers = (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is refused as such
            numbers = data.view(stored.dtype).astype(np.float32, copy=False)
    if not np.isfinite(numbers).all():
        raise CheckpointError(f"{path}: parameter {stored.key} has values that are not finite")
    return numbers.reshape(stored.shape, order="F" if stored.fortran_order else "C")


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name
