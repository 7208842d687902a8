"""The index file: name, shape, dtype and chunks of every parameter, and the number under which data files hold it.

The index nests maps; a leaf says how an array was cut into chunks and which data file holds each. Data files know
arrays by number only, and the number is the leaf's position among all leaves: with sorted keys in version 20220622
(upstream flattens the index itself), and as the file has them before that (upstream flattened the original objects,
whose field order the file keeps).

A region is where a chunk lies in its array: one (start, stop) for each axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vmoe.errors import CheckpointError
from vmoe.flax.cursor import Cursor, open_cursor

Region = tuple[tuple[int, int], ...]

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

_VERSION = "20220622"
_REGION, _ENTRY = 6, 8  # extension types

# All chosen, each several times what a 15B train state with 128 chunks per expert array needs. They bound the memory
# that an index costs: a chunk of 10 bytes becomes about 200, a leaf keeps its path.
_MAX_INDEX_BYTES = 2**24
_MAX_LEAVES = 2**16
_MAX_DEPTH = 64
_MAX_PATH_LENGTH = 1024
_MAX_AXES = 32  # what NumPy 1 can hold
_MAX_SHARDS = 99_999  # five digits in the file name
_MAX_CHUNKS = 2**16  # of one array


class StoredArray(NamedTuple):
    """How a parameter is stored: shape, and dtype by name (float32, float16 or bfloat16)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Parameter:
    """One array of the parameter tree.

    Attributes:
        name: keys from the root of the parameter tree, joined with '/'.
        shards: number of the data file that holds each chunk. The chunks fill the array and do not overlap.
    """

    name: str
    stored: StoredArray
    shards: dict[Region, int]


@dataclass(frozen=True)
class Index:
    """What an index file says.

    Attributes:
        num_arrays: arrays of the whole tree, optimiser slots included.
        parameters: by array number.
    """

    path: Path
    shard_count: int
    num_arrays: int
    parameters: dict[int, Parameter]


class _Leaf(NamedTuple):
    keys: tuple[str, ...]
    position: int  # in the file


def read_index(prefix: Path) -> Index:
    """Reads `PREFIX.index`; of arrays that are no parameters only the position is kept.

    Raises:
        CheckpointError: the file is missing, malformed or contradicts itself.
    """
    path = prefix.parent / f"{prefix.name}.index"
    with open_cursor(path, max_bytes=_MAX_INDEX_BYTES) as cursor:
        shard_count, version, leaves = _read_document(cursor)
        if version == _VERSION:
            leaves.sort()
        # Under `params` in a train state; at the top in the files that the authors released.
        root = "params" if any(leaf.keys[0] == "params" and len(leaf.keys) > 1 for leaf in leaves) else None
        parameters: dict[int, Parameter] = {}
        names: set[str] = set()
        for number, leaf in enumerate(leaves):
            if root is not None and leaf.keys[0] != root:
                continue
            name = "/".join(leaf.keys[1:] if root is not None else leaf.keys)
            if name in names:
                raise CheckpointError(f"{path}: two parameters are called {name}")
            names.add(name)
            parameters[number] = _read_parameter(cursor, name, leaf.position, shard_count)
        if not parameters:
            raise CheckpointError(f"{path} lists no parameters")
    return Index(path, shard_count, len(leaves), parameters)


def read_region(cursor: Cursor) -> Region:
    """Reads the payload of an n-dimensional slice."""
    num_axes = cursor.array("a slice")
    if num_axes > _MAX_AXES:
        raise cursor.error(f"a slice of {num_axes} axes, at most {_MAX_AXES} are read")
    region = []
    for _ in range(num_axes):
        with cursor.payload(cursor.binary("the slice of an axis")):
            cursor.array("the slice of an axis", 3)
            region.append((cursor.integer("a slice's start"), cursor.integer("a slice's stop")))
            step = cursor.header()
            if step.kind != "nil" and (step.kind, step.value) != ("int", 1):
                raise cursor.error(f"a slice's step should be nil or 1, found {step.kind} {step.value}")
    return tuple(region)


def read_shape(cursor: Cursor) -> tuple[int, ...]:
    """Reads the extents of an array."""
    num_axes = cursor.array("a shape")
    if num_axes > _MAX_AXES:
        raise cursor.error(f"a shape of {num_axes} axes, at most {_MAX_AXES} are read")
    return tuple(cursor.integer("an extent") for _ in range(num_axes))


def _read_document(cursor: Cursor) -> tuple[int, str | None, list[_Leaf]]:
    """The outer map: shard count, version (absent until June 2022) and the leaves in the order of the file."""
    shard_count: int | None = None
    version: str | None = None
    leaves: list[_Leaf] | None = None
    for key in _keys(cursor, "the index file"):
        if key == "shard_count":
            shard_count = cursor.integer(key)
            if not 1 <= shard_count <= _MAX_SHARDS:
                raise cursor.error(f"shard_count should be from 1 to {_MAX_SHARDS}, found {shard_count}")
        elif key == "version":
            version = cursor.text(key)
            if version != _VERSION:
                raise cursor.error(f"version should be {_VERSION!r} or absent, found {version!r}")
        elif key == "index":
            leaves = []
            for leaf in _leaves(cursor, ()):
                leaves.append(leaf)
                if len(leaves) > _MAX_LEAVES:
                    raise cursor.error(f"more than {_MAX_LEAVES} arrays")
        else:
            raise cursor.error(f"unknown key {key!r}, expected shard_count, version or index")
    cursor.finish()
    if shard_count is None or leaves is None:
        raise CheckpointError(f"{cursor.path} has no {'shard_count' if shard_count is None else 'index'}")
    return shard_count, version, leaves


def _leaves(cursor: Cursor, keys: tuple[str, ...]) -> Iterator[_Leaf]:
    """Walks the tree below `keys`; the cursor stands at a node."""
    if len(keys) > _MAX_DEPTH or sum(map(len, keys)) > _MAX_PATH_LENGTH:
        raise cursor.error(f"a path of more than {_MAX_DEPTH} keys or {_MAX_PATH_LENGTH} characters")
    position = cursor.position
    header = cursor.header()
    cursor.seek(position)
    if header.kind == "map" or not keys:
        for key in _keys(cursor, "/".join(keys) or "index"):
            yield from _leaves(cursor, (*keys, key))
    elif header.kind == "ext" and header.code == _ENTRY:
        cursor.skip()
        yield _Leaf(keys, position)
    elif header.kind == "nil":  # a state that holds None
        cursor.skip()
    else:
        found = f"extension type {header.code}" if header.kind == "ext" else header.kind
        raise cursor.error(f"{'/'.join(keys)} should be a map or of extension type {_ENTRY}, found {found}")


def _keys(cursor: Cursor, what: str) -> Iterator[str]:
    """The keys of a map; the caller reads the value before it asks for the next key."""
    seen: set[str] = set()
    for _ in range(cursor.map(what)):
        key = cursor.text(f"a key of {what}")
        if key in seen:
            raise cursor.error(f"key {key!r} appears twice in {what}")
        if not key.isprintable():  # names end up on terminals and in logs
            raise cursor.error(f"key {key!r} in {what} has characters that cannot be printed")
        seen.add(key)
        yield key


def _read_parameter(cursor: Cursor, name: str, position: int, shard_count: int) -> Parameter:
    cursor.parameter = name
    cursor.seek(position)
    with cursor.payload(cursor.extension(_ENTRY, "an index entry")):
        cursor.array("an index entry", 3)
        with cursor.payload(cursor.binary("the abstract array")):
            cursor.array("the abstract array", 4)
            stored = StoredArray(read_shape(cursor), cursor.text("a dtype"))
            cursor.skip()  # weak_type
            cursor.skip()  # an empty map
        if stored.dtype not in ITEM_BYTES:
            raise cursor.error(f"dtype should be one of {', '.join(ITEM_BYTES)}, found {stored.dtype!r}")
        if any(extent < 1 for extent in stored.shape):
            raise cursor.error(f"every extent should be at least 1, found shape {stored.shape}")
        regions = []
        num_chunks = cursor.array("the list of chunks")
        if num_chunks > _MAX_CHUNKS:
            raise cursor.error(f"an array of {num_chunks} chunks, at most {_MAX_CHUNKS} are read")
        for _ in range(num_chunks):
            with cursor.payload(cursor.binary("a chunk's slice")):
                regions.append(read_region(cursor))
        cursor.array("the list of data files", len(regions))
        shards = [cursor.integer("the number of a data file") for _ in regions]
    if wrong := [shard for shard in shards if not 0 <= shard < shard_count]:
        raise cursor.error(f"a chunk is in data file {wrong[0]}, but shard_count is {shard_count}")
    _check_tiling(cursor, stored.shape, regions)
    return Parameter(name, stored, dict(zip(regions, shards, strict=True)))


def _check_tiling(cursor: Cursor, shape: tuple[int, ...], regions: list[Region]) -> None:
    """Checks that the chunks lie in the array, do not overlap and leave nothing out.

    The edges of all chunks cut the array into cells, and every chunk is a box of whole cells; for the regular grids
    that JAX shardings make there are as many cells as chunks.
    """
    for region in regions:
        if len(region) != len(shape) or any(
            not 0 <= start < stop <= extent for (start, stop), extent in zip(region, shape, strict=True)
        ):
            raise cursor.error(f"chunk {describe(region)} does not lie in an array of shape {shape}")
    edges = [
        sorted({0, extent, *(edge for region in regions for edge in region[axis])}) for axis, extent in enumerate(shape)
    ]
    if prod(len(axis_edges) - 1 for axis_edges in edges) > _MAX_CHUNKS:
        raise cursor.error(f"the edges of {len(regions)} chunks make a grid of more than {_MAX_CHUNKS} cells")
    cells = [{edge: cell for cell, edge in enumerate(axis_edges)} for axis_edges in edges]
    covered = np.zeros([len(axis_edges) - 1 for axis_edges in edges], bool)
    for region in regions:
        box = tuple(slice(cell[start], cell[stop]) for cell, (start, stop) in zip(cells, region, strict=True))
        if covered[box].any():
            raise cursor.error(f"chunk {describe(region)} overlaps another chunk")
        covered[box] = True
    if not covered.all():
        first = np.unravel_index(int(covered.argmin()), covered.shape)
        corner = tuple(axis_edges[cell] for axis_edges, cell in zip(edges, first, strict=True))
        raise cursor.error(f"no chunk holds element {corner} of an array of shape {shape}")


def describe(region: Region) -> str:
    """A region as NumPy would write it."""
    return f"[{', '.join(f'{start}:{stop}' for start, stop in region)}]"
