"""Checkpoints of google-research/vmoe with random damage: refused in one way only, in little memory."""

from __future__ import annotations

import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.vmoe.flax_writer import (
    FULL,
    LEFT,
    RIGHT,
    index_entry,
    write_small,
)
from vmoe.errors import CheckpointError
from vmoe.flax import read_parameters
from vmoe.flax.cursor import open_cursor


def read_damaged(files: dict[str, bytes]) -> int:
    """Reads a checkpoint that may be refused in one way only; gives the peak of allocated bytes."""
    with tempfile.TemporaryDirectory() as directory:
        for name, content in files.items():
            Path(directory, name).write_bytes(content)
        tracemalloc.start()
        try:
            read_parameters(Path(directory, "ckpt"))
        except CheckpointError:
            pass
        finally:
            _, peak_bytes = tracemalloc.get_traced_memory()
            tracemalloc.stop()
    return peak_bytes


def small_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as directory:
        write_small(Path(directory, "ckpt"))
        return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir())}


SMALL = small_files()
# A byte string at a position: headers that claim much, and any other.
PATCHES = st.sampled_from(
    [b"\xdf\xff\xff\xff\xff", b"\xdd\x7f\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xcf" + b"\xff" * 8]
)
DAMAGE = st.tuples(
    st.sampled_from(sorted(SMALL)),
    st.integers(0, max(map(len, SMALL.values()))),
    PATCHES | st.binary(max_size=3),
    st.integers(0, 6),
)


# The reader's buffer has 256 KiB; the files have 0.6 kB, and what they claim may not matter.
PEAK_BYTES = 2**20


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.lists(DAMAGE, min_size=1, max_size=4), st.none() | st.integers(0, 200))
@example([("ckpt.index", 0, b"\xc1", 1)], None)  # a byte that msgpack never uses
def test_read_parameters_when_bytes_change_then_only_a_checkpoint_error_and_little_memory(
    damage: list[tuple[str, int, bytes, int]], cut: int | None
) -> None:
    files = dict(SMALL)
    for name, position, patch, replaced in damage:
        content = files[name]
        files[name] = content[:position] + patch + content[position + replaced :]
    if cut is not None:
        files[damage[0][0]] = files[damage[0][0]][:cut]

    assert read_damaged(files) < PEAK_BYTES


NUMBERS = st.integers(-2, 7) | st.sampled_from([-(2**63), 2**31, 2**32, 2**62, 2**63, 2**64 - 1])
REGIONS = st.lists(st.tuples(NUMBERS, NUMBERS), max_size=3).map(tuple)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(
    st.lists(NUMBERS, max_size=3).map(tuple),
    st.sampled_from(["float32", "float16", "bfloat16", "object", "O", ""]),
    st.lists(st.tuples(REGIONS | st.sampled_from([LEFT, RIGHT, FULL]), NUMBERS), max_size=4),
)
@example((), "float32", [((), 0)])  # a scalar in the index, an array in the data
@example((4, 6), "bfloat16", [(LEFT, 1), (RIGHT, 0)])  # another dtype in the index
def test_read_parameters_when_an_index_entry_lies_then_only_a_checkpoint_error_and_little_memory(
    shape: tuple[int, ...], dtype: str, chunks: list[tuple[Any, int]]
) -> None:
    document = msgpack.unpackb(SMALL["ckpt.index"])
    entry = index_entry(shape, dtype, [region for region, _ in chunks], [shard for _, shard in chunks])
    document["index"]["params"]["a"]["kernel"] = entry

    assert read_damaged({**SMALL, "ckpt.index": msgpack.packb(document)}) < PEAK_BYTES


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=40)
    | st.binary(max_size=300)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=20))
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(), inner, max_size=20)
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(VALUES)
@example(b"a" * 2**16)
@example("a" * 2**16)
@example([0] * 2**16)
@example({str(i): i for i in range(2**16)})
@example([msgpack.ExtType(5, b"a" * n) for n in (1, 2, 4, 8, 16, 17, 2**8, 2**16)])
@example(3.5)
def test_skip_when_the_msgpack_library_wrote_a_value_then_the_cursor_stands_behind_it(value: object) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "value")
        path.write_bytes(msgpack.packb(value))
        with open_cursor(path) as cursor:
            cursor.skip()
            cursor.finish()


@pytest.mark.parametrize(
    "number", [0, 127, 128, 255, 256, 2**16, 2**32, 2**64 - 1, -1, -32, -33, -129, -(2**15) - 1, -(2**63)]
)
def test_integer_when_the_msgpack_library_wrote_it_then_equal(number: int, tmp_path: Path) -> None:
    (tmp_path / "value").write_bytes(msgpack.packb(number))

    with open_cursor(tmp_path / "value") as cursor:
        assert cursor.integer("it") == number
