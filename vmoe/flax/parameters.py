"""The data files: chunks on disk -> one float32 array per parameter.

Each chunk goes from the file through one small buffer to its place in the array: the peak is the parameters and that
buffer. Chunks of other arrays (optimiser slots) are passed over with a seek.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vmoe.errors import CheckpointError
from vmoe.flax.cursor import Cursor, file_bytes, open_cursor
from vmoe.flax.index import (
    ITEM_BYTES,
    Index,
    Parameter,
    Region,
    StoredArray,
    describe,
    read_index,
    read_region,
    read_shape,
)

_MAGIC_KEY = "__msgpack_array_chunk_a87ca2__"
_ARRAY, _REGION = 1, 6  # extension types

# Fits the L2 cache with the values widened from it. A multiple of every item size.
_BUFFER_BYTES = 2**18


@dataclass(frozen=True)
class _Destination:
    """An array being filled, and the regions of it that no chunk has filled yet."""

    parameter: Parameter
    array: NDArray[np.float32]
    missing: set[Region]


def tree_shapes(prefix: Path) -> dict[str, StoredArray]:
    """Shape and stored dtype of every parameter, by name, from the index file alone.

    Raises:
        CheckpointError: the index is missing, malformed or contradicts itself.
    """
    return {parameter.name: parameter.stored for parameter in read_index(prefix).parameters.values()}


def read_parameters(
    prefix: Path, *, advance: Callable[[int], None] = lambda size_bytes: None
) -> dict[str, NDArray[np.float32]]:
    """Reads the parameters of a checkpoint, by name: the tree's keys joined with '/', without a leading `params`.

    Values stored as bfloat16 or float16 are widened, which is exact; `tree_shapes` tells the dtype they had.

    Arguments:
        prefix: the path without `.index` and `.data-NNNNN-of-NNNNN`.
        advance: called with the number of parameter bytes read since the last call; they add up to the `size_bytes` of
            `tree_shapes`.

    Raises:
        CheckpointError: a file is missing or malformed, the files contradict each other, or a value is not finite.
    """
    index = read_index(prefix)
    shards = _find_shards(prefix, index)
    try:
        destinations = {
            number: _Destination(parameter, np.empty(parameter.stored.shape, np.float32), set(parameter.shards))
            for number, parameter in index.parameters.items()
        }
    except MemoryError as error:
        size_bytes = sum(4 * prod(p.stored.shape) for p in index.parameters.values())
        raise CheckpointError(f"{index.path}: no memory for parameters of {size_bytes} bytes") from error
    for shard, path in enumerate(shards):
        with open_cursor(path) as cursor:
            _read_shard(cursor, shard, index, destinations, advance)
    for destination in destinations.values():
        for region in destination.missing:
            parameter = destination.parameter
            path = shards[parameter.shards[region]]
            raise CheckpointError(f"{path}: parameter {parameter.name}: chunk {describe(region)} is missing")
    return {destination.parameter.name: destination.array for destination in destinations.values()}


def _find_shards(prefix: Path, index: Index) -> list[Path]:
    """The data files, each found large enough for the chunks that the index places in it.

    This bounds the memory by the size of the files before anything is allocated.
    """
    shards: list[Path] = []
    room_bytes: list[int] = []
    for shard in range(index.shard_count):
        path = prefix.parent / f"{prefix.name}.data-{shard:05d}-of-{index.shard_count:05d}"
        try:
            room_bytes.append(file_bytes(path))
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {index.path.name} counts {index.shard_count} data files") from error
        shards.append(path)
    for parameter in index.parameters.values():
        for region, shard in parameter.shards.items():
            room_bytes[shard] -= _volume(region) * ITEM_BYTES[parameter.stored.dtype]
            if room_bytes[shard] < 0:
                raise CheckpointError(
                    f"{shards[shard]}: parameter {parameter.name} of shape {parameter.stored.shape}: "
                    f"the file is too short for chunk {describe(region)}, by at least {-room_bytes[shard]} bytes"
                )
    return shards


def _read_shard(
    cursor: Cursor, shard: int, index: Index, destinations: dict[int, _Destination], advance: Callable[[int], None]
) -> None:
    """Reads all chunks of parameters in one data file."""
    buffer = np.empty(_BUFFER_BYTES, np.uint8)
    seen: set[str] = set()
    for _ in range(cursor.map("a data file")):
        cursor.parameter = ""
        key = cursor.text("an array number")
        if key in seen:
            raise cursor.error(f"key {key!r} appears twice")
        seen.add(key)
        destination = None if key == _MAGIC_KEY else destinations.get(_array_number(cursor, key, index.num_arrays))
        if destination is None:
            cursor.skip()
            continue
        cursor.parameter = destination.parameter.name
        for _ in range(cursor.array("the list of chunks")):
            _read_chunk(cursor, shard, destination, buffer, advance)
    cursor.parameter = ""
    cursor.finish()
    if _MAGIC_KEY not in seen:
        raise CheckpointError(f"{cursor.path} is no data file: key {_MAGIC_KEY} is missing")


def _read_chunk(
    cursor: Cursor, shard: int, destination: _Destination, buffer: NDArray[np.uint8], advance: Callable[[int], None]
) -> None:
    """Checks that the index lists the chunk for this data file, and copies it."""
    cursor.array("a chunk", 2)
    pieces = cursor.position
    cursor.skip()
    with cursor.payload(cursor.extension(_REGION, "a chunk's slice")):
        region = read_region(cursor)
    end = cursor.position
    expected_shard = destination.parameter.shards.get(region)
    if expected_shard is None:
        raise cursor.error(f"the index lists no chunk {describe(region)} of this parameter")
    if expected_shard != shard:
        raise cursor.error(f"chunk {describe(region)} belongs in data file {expected_shard}, found in {shard}")
    if region not in destination.missing:
        raise cursor.error(f"chunk {describe(region)} appears twice")
    cursor.seek(pieces)
    _read_pieces(cursor, destination, region, buffer, advance)
    cursor.seek(end)
    destination.missing.remove(region)


def _array_number(cursor: Cursor, key: str, num_arrays: int) -> int:
    if not (key.isascii() and key.isdigit() and str(int(key)) == key and int(key) < num_arrays):
        raise cursor.error(f"an array number should be from '0' to '{num_arrays - 1}', found {key!r}")
    return int(key)


def _read_pieces(
    cursor: Cursor,
    destination: _Destination,
    region: Region,
    buffer: NDArray[np.uint8],
    advance: Callable[[int], None],
) -> None:
    """Copies one chunk, stored as flat pieces, to its place in the array."""
    box = tuple(slice(start, stop) for start, stop in region)
    chunk = destination.array[box] if box else destination.array  # array[()] would be a copy
    dtype = destination.parameter.stored.dtype
    item_bytes = ITEM_BYTES[dtype]
    filled, volume = 0, _volume(region)
    for _ in range(cursor.array("the list of pieces")):
        with cursor.payload(cursor.extension(_ARRAY, "a piece")):
            cursor.array("a piece", 3)
            shape = read_shape(cursor)
            if (found := cursor.text("a dtype")) != dtype:
                raise cursor.error(f"dtype should be {dtype} as in the index, found {found!r}")
            left_bytes = cursor.binary("a piece's values")
            if len(shape) != 1 or shape[0] * item_bytes != left_bytes:
                raise cursor.error(f"a flat piece of {left_bytes // item_bytes} values should not have shape {shape}")
            if filled + shape[0] > volume:
                raise cursor.error(f"chunk {describe(region)} has more than the {volume} values of its slice")
            while left_bytes:
                block = buffer[: min(left_bytes, len(buffer))]
                cursor.read_into(block.data)
                values = _decode(block, dtype)
                finite = np.isfinite(values)
                if not finite.all():
                    first = int(finite.argmin())
                    offset = np.unravel_index(filled + first, chunk.shape)
                    element = tuple(start + int(i) for (start, _), i in zip(region, offset, strict=True))
                    raise cursor.error(f"every value should be finite, found {values[first]} at {element}")
                _assign(chunk, filled, values)
                filled += len(values)
                left_bytes -= len(block)
                advance(len(block))
    if filled != volume:
        raise cursor.error(f"chunk {describe(region)} should have {volume} values, found {filled}")


def _assign(chunk: NDArray[np.float32], start: int, values: NDArray[np.floating]) -> None:
    """`chunk.flat[start : start + len(values)] = values`, by whole rows.

    NumPy's iterator goes value by value: 4 s per GB on the development machine where this takes 0.13 s.
    """
    if chunk.flags.c_contiguous:
        chunk.reshape(-1)[start : start + len(values)] = values
        return
    row = chunk[0].size
    first, last = -(-start // row), (start + len(values)) // row
    if first > last:  # all inside of one row
        _assign(chunk[last], start - last * row, values)
        return
    head, rest = np.split(values, [first * row - start])
    body, tail = np.split(rest, [(last - first) * row])
    if head.size:
        _assign(chunk[first - 1], row - head.size, head)
    chunk[first:last] = body.reshape(chunk[first:last].shape)
    if tail.size:
        _assign(chunk[last], 0, tail)


def _decode(block: NDArray[np.uint8], dtype: str) -> NDArray[np.floating]:
    """Little-endian bytes as numbers. A bfloat16 is the upper half of a float32."""
    if dtype == "bfloat16":
        return (block.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return block.view("<f4" if dtype == "float32" else "<f2")


def _volume(region: Region) -> int:
    return prod(stop - start for start, stop in region)
