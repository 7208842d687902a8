"""Writes checkpoints in the format of google-research/vmoe, for tests and benchmarks.

An independent implementation: it encodes with the msgpack library what `vmoe.flax` reads with a cursor of its own. The
format is described in tests/data/upstream/README.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise, product
from math import prod
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Region = tuple[tuple[int, int], ...]
Tree = Mapping[str, "Tree | Array"]

V1 = "20220622"
MAGIC_KEY = "__msgpack_array_chunk_a87ca2__"


def write_checkpoint(
    prefix: Path,
    tree: Tree,
    *,
    version: str | None = V1,
    shard_count: int = 1,
    chunk_bytes: int = 2**62,
    piece_bytes: int = 2**30,
) -> None:
    """Writes `PREFIX.index` and `PREFIX.data-NNNNN-of-NNNNN`, one piece in memory at a time.

    Arguments:
        prefix: the path before `.index`; its folder exists.
        tree: nested maps of arrays; bfloat16 arrays have the dtype of ml_dtypes. V1 sorts the keys of every map, the
            version-less format keeps their order, as upstream did.
        version: `V1`, or None for the format of January 2022.
        shard_count: data files; the chunks are dealt out in turn.
        chunk_bytes: larger arrays are cut in halves along their longest axis until no chunk is larger.
        piece_bytes: larger chunks are stored in several pieces. Upstream's 1 GiB.
    """
    if version is not None:
        tree = _sorted(tree)
    arrays = list(_arrays(tree))
    chunks: list[list[tuple[int, Region]]] = [[] for _ in range(shard_count)]
    entries: list[msgpack.ExtType] = []
    dealt = 0
    for number, array in enumerate(arrays):
        regions = cut(array, chunk_bytes)
        shards = [(dealt + i) % shard_count for i in range(len(regions))]
        dealt += len(regions)
        entries.append(index_entry(array.shape, array.dtype.name, regions, shards))
        for region, shard in zip(regions, shards, strict=True):
            chunks[shard].append((number, region))
    index = {"shard_count": shard_count, "index": _replaced(tree, iter(entries))}
    if version is not None:
        index["version"] = version
    index_path(prefix).write_bytes(msgpack.packb(index))
    for shard, held in enumerate(chunks):
        _write_shard(data_path(prefix, shard, shard_count), arrays, held, piece_bytes)


KERNEL = np.arange(24, dtype=np.float32).reshape(4, 6)
LEFT, RIGHT, FULL = ((0, 4), (0, 3)), ((0, 4), (3, 6)), ((0, 4), (0, 6))


def write_small(prefix: Path) -> None:
    """A train state in two data files.

    With sorted keys the optimiser's array has number 0, `a/kernel` 1 and `b` 2. Of its 96 bytes, 80 allowed in a chunk,
    `a/kernel` is cut along the longer axis: LEFT and RIGHT. Dealt out in turn (opt_state, LEFT, RIGHT, b), file 0 holds
    opt_state and RIGHT, file 1 LEFT and b.
    """
    tree = {
        "params": {"a": {"kernel": KERNEL}, "b": np.ones(3, np.float32)},
        "opt_state": {"mu": np.full(5, 7, np.float32)},
    }
    write_checkpoint(prefix, tree, shard_count=2, chunk_bytes=80)


def index_path(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.index")


def data_path(prefix: Path, shard: int = 0, shard_count: int = 1) -> Path:
    return prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shard_count:05d}")


@contextmanager
def edited(path: Path) -> Iterator[dict[str, Any]]:
    """Reads a msgpack file, and writes back what the block made of it; extension objects are `msgpack.ExtType`."""
    document = msgpack.unpackb(path.read_bytes())
    yield document
    path.write_bytes(msgpack.packb(document))


def cut(array: Array, chunk_bytes: int) -> list[Region]:
    """A regular grid of regions, sorted, each of at most `chunk_bytes`."""
    cuts = [1] * array.ndim
    extents = list(array.shape)
    while prod(extents) * array.itemsize > chunk_bytes and max(extents) > 1:
        axis = extents.index(max(extents))
        cuts[axis] *= 2
        extents[axis] = -(-array.shape[axis] // cuts[axis])
    edges = [[extent * i // n for i in range(n + 1)] for extent, n in zip(array.shape, cuts, strict=True)]
    return list(product(*([pair for pair in pairwise(axis) if pair[0] < pair[1]] for axis in edges)))


def index_entry(shape: tuple[int, ...], dtype: str, regions: list[Region], shards: list[int]) -> msgpack.ExtType:
    abstract = msgpack.packb([shape, dtype, False, {}])
    return msgpack.ExtType(8, msgpack.packb([abstract, [_region_bytes(region) for region in regions], shards]))


def data_chunk(pieces: list[Array], region: Region) -> list[Any]:
    return [[_piece(piece) for piece in pieces], msgpack.ExtType(6, _region_bytes(region))]


def _piece(values: Array) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb([values.shape, values.dtype.name, values.tobytes()]))


def _region_bytes(region: Region) -> bytes:
    packed: bytes = msgpack.packb([msgpack.packb([start, stop, None]) for start, stop in region])
    return packed


def _write_shard(path: Path, arrays: list[Array], held: list[tuple[int, Region]], piece_bytes: int) -> None:
    numbers = sorted({number for number, _ in held})
    packer = msgpack.Packer()
    with path.open("wb") as file:
        file.write(packer.pack_map_header(1 + len(numbers)))
        file.write(packer.pack(MAGIC_KEY) + packer.pack(True))
        for number in numbers:
            regions = [region for other, region in held if other == number]
            file.write(packer.pack(str(number)) + packer.pack_array_header(len(regions)))
            for region in regions:
                # Flattened in the order of the region, a copy unless the chunk is contiguous.
                flat = arrays[number][tuple(slice(start, stop) for start, stop in region)].reshape(-1)
                size = max(1, piece_bytes // flat.itemsize)
                starts = range(0, flat.size, size)
                file.write(packer.pack_array_header(2) + packer.pack_array_header(len(starts)))
                for start in starts:
                    file.write(packer.pack(_piece(flat[start : start + size])))
                file.write(packer.pack(msgpack.ExtType(6, _region_bytes(region))))


def _sorted(tree: Tree) -> Tree:
    return {key: _sorted(node) if isinstance(node, Mapping) else node for key, node in sorted(tree.items())}


def _arrays(tree: Tree) -> Iterator[Array]:
    for node in tree.values():
        if isinstance(node, Mapping):
            yield from _arrays(node)
        else:
            yield np.asarray(node)


def _replaced(tree: Tree, entries: Iterator[msgpack.ExtType]) -> dict[str, Any]:
    return {key: _replaced(node, entries) if isinstance(node, Mapping) else next(entries) for key, node in tree.items()}
