"""Checkpoints of google-research/vmoe that are damaged or made to harm: one clear refusal each."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from tests.vmoe.flax_writer import (
    FULL,
    KERNEL,
    LEFT,
    MAGIC_KEY,
    RIGHT,
    data_chunk,
    data_path,
    edited,
    index_entry,
    index_path,
    write_small,
)
from vmoe.errors import CheckpointError
from vmoe.flax import read_parameters


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write_small(tmp_path / "ckpt")
    return tmp_path / "ckpt"


def hostile(label: str, message: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Registers a way to damage the small checkpoint, and what the refusal says."""

    def register(damage: Callable[[Path], None]) -> Callable[[Path], None]:
        HOSTILE.append(pytest.param(damage, message, id=label))
        return damage

    return register


HOSTILE: list[Any] = []


def kernel_entry(prefix: Path, entry: Any) -> None:
    with edited(index_path(prefix)) as document:
        document["index"]["params"]["a"]["kernel"] = entry


def kernel_chunks(prefix: Path, chunks: list[Any], shard: int = 1) -> None:
    with edited(data_path(prefix, shard, 2)) as document:
        document["1"] = chunks


@hostile("index missing", r"ckpt\.index cannot be read: .*No such file")
def _(prefix: Path) -> None:
    index_path(prefix).unlink()


@hostile("index a pipe", r"ckpt\.index is not a regular file")
def _(prefix: Path) -> None:
    index_path(prefix).unlink()
    os.mkfifo(index_path(prefix))


@hostile("index empty", r"ckpt\.index, byte 0: truncated: 1 bytes expected, 0 left")
def _(prefix: Path) -> None:
    index_path(prefix).write_bytes(b"")


@hostile("index of zeros", r"ckpt\.index, byte 1: the index file should be of msgpack type map, found int")
def _(prefix: Path) -> None:
    index_path(prefix).write_bytes(bytes(1000))


@hostile("index truncated", r"ckpt\.index, byte \d+: truncated")
def _(prefix: Path) -> None:
    index_path(prefix).write_bytes(index_path(prefix).read_bytes()[:-20])


@hostile("index too large", r"ckpt\.index has 16777217 bytes, at most 16777216 are read")
def _(prefix: Path) -> None:
    os.truncate(index_path(prefix), 2**24 + 1)


@hostile("bytes after the index", r"ckpt\.index, byte \d+: 3 bytes follow the end")
def _(prefix: Path) -> None:
    index_path(prefix).write_bytes(index_path(prefix).read_bytes() + b"abc")


@hostile("map of 2^32 pairs", r"byte 0: truncated: map of length 4294967295, but only 0 bytes are left")
def _(prefix: Path) -> None:
    index_path(prefix).write_bytes(b"\xdf\xff\xff\xff\xff")


@hostile("nested arrays", r"byte 10: a should be a map or of extension type 8, found array")
def _(prefix: Path) -> None:
    index_path(prefix).write_bytes(b"\x81\xa5index\x81\xa1a" + b"\x91" * 10**6)


@hostile("nested maps", r"a path of more than 64 keys")
def _(prefix: Path) -> None:
    index_path(prefix).write_bytes(b"\x81\xa5index" + b"\x81\xa1a" * 10**5 + b"\x80")


@hostile("long keys", r"a path of more than 64 keys or 1024 characters")
def _(prefix: Path) -> None:
    key = msgpack.packb("a" * 1000)
    index_path(prefix).write_bytes(b"\x81\xa5index" + (b"\x81" + key) * 3 + b"\x80")


@hostile("key of a megabyte", r"a key of index of 1000000 bytes, at most 1024 are read")
def _(prefix: Path) -> None:
    index_path(prefix).write_bytes(b"\x81\xa5index\x81" + msgpack.packb("a" * 10**6) + b"\x80")


@hostile("four million empty maps in a data file", r"more than 4194304 values")
def _(prefix: Path) -> None:
    bomb = b"\xdd" + struct.pack(">I", 2**22) + b"\x80" * 2**22
    data_path(prefix, 0, 2).write_bytes(b"\x81\xa10" + bomb)


@hostile("key twice in the index", r"key 'shard_count' appears twice")
def _(prefix: Path) -> None:
    index_path(prefix).write_bytes(b"\x82" + 2 * (msgpack.packb("shard_count") + b"\x01"))


@hostile("parameter twice in the index", r"two parameters are called a/kernel")
def _(prefix: Path) -> None:
    with edited(index_path(prefix)) as document:
        params = document["index"]["params"]
        params["a/kernel"] = params["a"]["kernel"]


@hostile("number key", r"a key of params should be of msgpack type str, found int")
def _(prefix: Path) -> None:
    document = msgpack.packb({"shard_count": 1, "index": {"params": {1: {}}}})
    index_path(prefix).write_bytes(document)


@hostile("key not UTF-8", r"a key of index is not UTF-8")
def _(prefix: Path) -> None:
    index_path(prefix).write_bytes(b"\x81\xa5index\x81\xa1\xff\x80")


@hostile("key with a terminal escape", r"key 'a\\x1b\[2J' in index has characters that cannot be printed")
def _(prefix: Path) -> None:
    with edited(index_path(prefix)) as document:
        document["index"]["a\x1b[2J"] = {}


@hostile("unknown key", r"unknown key 'shards', expected shard_count, version or index")
def _(prefix: Path) -> None:
    with edited(index_path(prefix)) as document:
        document["shards"] = 1


@hostile("unknown version", r"version should be '20220622' or absent, found '20990101'")
def _(prefix: Path) -> None:
    with edited(index_path(prefix)) as document:
        document["version"] = "20990101"


@hostile("no shard_count", r"ckpt\.index has no shard_count")
def _(prefix: Path) -> None:
    with edited(index_path(prefix)) as document:
        del document["shard_count"]


@hostile("no parameters", r"ckpt\.index lists no parameters")
def _(prefix: Path) -> None:
    with edited(index_path(prefix)) as document:
        document["index"] = {"params": {}}


@hostile("shard_count too large", r"data-00000-of-00003 cannot be read: .*; ckpt\.index counts 3 data files")
def _(prefix: Path) -> None:
    with edited(index_path(prefix)) as document:
        document["shard_count"] = 3


@hostile("shard_count too small", r"parameter a/kernel: a chunk is in data file 1, but shard_count is 1")
def _(prefix: Path) -> None:
    with edited(index_path(prefix)) as document:
        document["shard_count"] = 1


@hostile("shard_count absurd", r"shard_count should be from 1 to 99999, found 18446744073709551615")
def _(prefix: Path) -> None:
    with edited(index_path(prefix)) as document:
        document["shard_count"] = 2**64 - 1


@hostile("unknown extension", r"byte \d+: params should be a map or of extension type 8, found extension type 77")
def _(prefix: Path) -> None:
    with edited(index_path(prefix)) as document:
        document["index"]["params"] = msgpack.ExtType(77, b"")


@hostile("object dtype", r"parameter a/kernel: dtype should be one of bfloat16, float16, float32, found 'object'")
def _(prefix: Path) -> None:
    kernel_entry(prefix, index_entry((4, 6), "object", [FULL], [0]))


@hostile("negative extent", r"parameter a/kernel: every extent should be at least 1, found shape \(-4, -6\)")
def _(prefix: Path) -> None:
    kernel_entry(prefix, index_entry((-4, -6), "float32", [FULL], [0]))


@hostile("no extent", r"parameter a/kernel: every extent should be at least 1, found shape \(4, 0\)")
def _(prefix: Path) -> None:
    kernel_entry(prefix, index_entry((4, 0), "float32", [], []))


@hostile("boolean extent", r"parameter a/kernel: an extent should be of msgpack type int, found bool")
def _(prefix: Path) -> None:
    kernel_entry(prefix, index_entry((True, 6), "float32", [FULL], [0]))


@hostile("1000 axes", r"parameter a/kernel: a shape of 1000 axes, at most 32 are read")
def _(prefix: Path) -> None:
    kernel_entry(prefix, index_entry((1,) * 1000, "float32", [FULL], [0]))


@hostile(
    "a petabyte", r"data-00001-of-00002: parameter a/kernel of shape \(16777216, 16777216\): the file is too short"
)
def _(prefix: Path) -> None:
    n = 2**24  # 2^24 x 2^24 values of 4 bytes
    kernel_entry(prefix, index_entry((n, n), "float32", [((0, n), (0, n))], [1]))


@hostile("a size that overflows", r"parameter a/kernel of shape .*: the file is too short for chunk \[0:\d+, 0:4\], by")
def _(prefix: Path) -> None:
    n = 2**63  # 4 n is 0 in 64 bits
    kernel_entry(prefix, index_entry((n, 4), "float32", [((0, n), (0, 4))], [1]))


@hostile("chunk out of bounds", r"parameter a/kernel: chunk \[0:4, 3:7\] does not lie in an array of shape \(4, 6\)")
def _(prefix: Path) -> None:
    kernel_entry(prefix, index_entry((4, 6), "float32", [LEFT, ((0, 4), (3, 7))], [1, 0]))


@hostile("chunk with a negative start", r"parameter a/kernel: chunk \[-4:4, 0:6\] does not lie in an array")
def _(prefix: Path) -> None:
    kernel_entry(prefix, index_entry((4, 6), "float32", [((-4, 4), (0, 6))], [1]))


@hostile("chunk backwards", r"parameter a/kernel: chunk \[4:0, 0:6\] does not lie in an array")
def _(prefix: Path) -> None:
    kernel_entry(prefix, index_entry((4, 6), "float32", [((4, 0), (0, 6))], [1]))


@hostile("chunk of one axis", r"parameter a/kernel: chunk \[0:4\] does not lie in an array of shape \(4, 6\)")
def _(prefix: Path) -> None:
    kernel_entry(prefix, index_entry((4, 6), "float32", [((0, 4),)], [1]))


@hostile("overlapping chunks", r"parameter a/kernel: chunk \[0:4, 2:6\] overlaps another chunk")
def _(prefix: Path) -> None:
    kernel_entry(prefix, index_entry((4, 6), "float32", [LEFT, ((0, 4), (2, 6))], [1, 0]))


@hostile("chunk listed twice", r"parameter a/kernel: chunk \[0:4, 0:3\] overlaps another chunk")
def _(prefix: Path) -> None:
    kernel_entry(prefix, index_entry((4, 6), "float32", [LEFT, LEFT], [1, 0]))


@hostile("chunk not listed", r"parameter a/kernel: no chunk holds element \(0, 3\) of an array of shape \(4, 6\)")
def _(prefix: Path) -> None:
    kernel_entry(prefix, index_entry((4, 6), "float32", [LEFT], [1]))


@hostile("a list of 65537 chunks", r"parameter a/kernel: an array of 65537 chunks, at most 65536 are read")
def _(prefix: Path) -> None:
    kernel_entry(prefix, index_entry((4, 6), "float32", [()] * 65537, [0] * 65537))


@hostile("chunks that make a huge grid", r"parameter a/kernel: the edges of 400 chunks make a grid of more than 65536")
def _(prefix: Path) -> None:
    diagonal = [((i, i + 1), (i, i + 1)) for i in range(0, 400)]
    kernel_entry(prefix, index_entry((400, 400), "float32", diagonal, [0] * 400))


@hostile("fewer data files than chunks", r"parameter a/kernel: the list of data files should have 2 elements, found 1")
def _(prefix: Path) -> None:
    kernel_entry(prefix, index_entry((4, 6), "float32", [LEFT, RIGHT], [1]))


@hostile("data file missing", r"data-00001-of-00002 cannot be read: .*; ckpt\.index counts 2 data files")
def _(prefix: Path) -> None:
    data_path(prefix, 1, 2).unlink()


@hostile(
    "data files swapped", r"data-00000-of-00002, byte \d+: parameter a/kernel: chunk .* belongs in data file 1, found"
)
def _(prefix: Path) -> None:
    first, second = data_path(prefix, 0, 2), data_path(prefix, 1, 2)
    first_bytes = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(first_bytes)


@hostile("data file truncated", r"data-00001-of-00002, byte \d+: (parameter \w+: )?truncated")
def _(prefix: Path) -> None:
    data_path(prefix, 1, 2).write_bytes(data_path(prefix, 1, 2).read_bytes()[:-5])


@hostile(
    "data file cut to nothing", r"data-00001-of-00002: parameter a/kernel of shape \(4, 6\): the file is too short"
)
def _(prefix: Path) -> None:
    os.truncate(data_path(prefix, 1, 2), 10)


@hostile("data file without magic key", rf"data-00001-of-00002 is no data file: key {MAGIC_KEY} is missing")
def _(prefix: Path) -> None:
    with edited(data_path(prefix, 1, 2)) as document:
        del document[MAGIC_KEY]


@hostile("array missing from its data file", r"data-00001-of-00002: parameter a/kernel: chunk \[0:4, 0:3\] is missing")
def _(prefix: Path) -> None:
    with edited(data_path(prefix, 1, 2)) as document:
        document["0"] = document.pop("1")  # the optimiser's, and so not read


@hostile("chunk twice in its data file", r"parameter a/kernel: chunk \[0:4, 0:3\] appears twice")
def _(prefix: Path) -> None:
    kernel_chunks(prefix, 2 * [data_chunk([KERNEL[:, :3].ravel()], LEFT)])


@hostile("chunk of another slice", r"parameter a/kernel: the index lists no chunk \[0:3, 0:4\] of this parameter")
def _(prefix: Path) -> None:
    kernel_chunks(prefix, [data_chunk([KERNEL[:, :3].ravel()], ((0, 3), (0, 4)))])


@hostile("too few values", r"parameter a/kernel: chunk \[0:4, 0:3\] should have 12 values, found 11")
def _(prefix: Path) -> None:
    kernel_chunks(prefix, [data_chunk([np.ones(11, np.float32)], LEFT)])


@hostile("too many values", r"parameter a/kernel: chunk \[0:4, 0:3\] has more than the 12 values of its slice")
def _(prefix: Path) -> None:
    kernel_chunks(prefix, [data_chunk([np.ones(12, np.float32), np.ones(1, np.float32)], LEFT)])


@hostile("piece not flat", r"parameter a/kernel: a flat piece of 12 values should not have shape \(4, 3\)")
def _(prefix: Path) -> None:
    kernel_chunks(prefix, [data_chunk([np.ones((4, 3), np.float32)], LEFT)])


@hostile("piece of another dtype", r"parameter a/kernel: dtype should be float32 as in the index, found 'int32'")
def _(prefix: Path) -> None:
    kernel_chunks(prefix, [data_chunk([np.ones(12, np.int32)], LEFT)])


@hostile(
    "piece of unknown extension", r"parameter a/kernel: a piece should be of extension type 1, found extension type 9"
)
def _(prefix: Path) -> None:
    kernel_chunks(prefix, [[[msgpack.ExtType(9, b"abc")], data_chunk([], LEFT)[1]]])


@hostile("piece with bytes to spare", r"parameter a/kernel: 1 bytes too many in an object of 62 bytes")
def _(prefix: Path) -> None:
    # Array header 1, shape [12] 2, "float32" 8, bin header 2 and 48 bytes of values: 61, and one more.
    piece = data_chunk([np.ones(12, np.float32)], LEFT)[0][0]
    kernel_chunks(prefix, [[[msgpack.ExtType(1, piece.data + b"\x00")], data_chunk([], LEFT)[1]]])


@hostile("array number not listed", r"an array number should be from '0' to '2', found '3'")
def _(prefix: Path) -> None:
    with edited(data_path(prefix, 0, 2)) as document:
        document["3"] = []


@hostile("array number in other digits", r"an array number should be from '0' to '2', found '²'")
def _(prefix: Path) -> None:
    with edited(data_path(prefix, 0, 2)) as document:
        document["²"] = []


@hostile("array number with a zero in front", r"an array number should be from '0' to '2', found '01'")
def _(prefix: Path) -> None:
    with edited(data_path(prefix, 0, 2)) as document:
        document["01"] = []


@hostile("array number twice", r"data-00000-of-00002, byte \d+: key '0' appears twice")
def _(prefix: Path) -> None:
    data = data_path(prefix, 0, 2).read_bytes()
    data_path(prefix, 0, 2).write_bytes(bytes([data[0] + 1]) + data[1:] + b"\xa10\x90")


@hostile("nan", r"data-00001-of-00002, byte \d+: parameter b: every value should be finite, found nan at \(1,\)")
def _(prefix: Path) -> None:
    with edited(data_path(prefix, 1, 2)) as document:
        document["2"] = [data_chunk([np.array([1, np.nan, 1], np.float32)], ((0, 3),))]


@hostile("infinity", r"parameter a/kernel: every value should be finite, found -inf at \(1, 4\)")
def _(prefix: Path) -> None:
    values = KERNEL[:, 3:].copy()
    values[1, 1] = -np.inf  # column 1 of the right half is column 4 of the array
    kernel_chunks(prefix, [data_chunk([values.ravel()], RIGHT)], shard=0)


@pytest.mark.parametrize(("damage", "message"), HOSTILE)
def test_read_parameters_when_a_file_is_hostile_then_the_error_says_where(
    damage: Callable[[Path], None], message: str, prefix: Path
) -> None:
    damage(prefix)

    with pytest.raises(CheckpointError, match=message):
        read_parameters(prefix)
