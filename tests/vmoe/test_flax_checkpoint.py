"""Checkpoints of google-research/vmoe: upstream's own files to the byte, and all that the format allows."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.vmoe.flax_writer import (
    V1,
    edited,
    index_path,
    write_checkpoint,
    write_small,
)
from vmoe.flax import read_parameters, tree_shapes

UPSTREAM = Path(__file__).parents[1] / "data" / "upstream"
CASES = [
    "dense_vit",
    "expert_choice",
    "gap_k1_prelogits",
    "map_head",
    "token_k2",
    "token_k2_sharded",
    "token_k2_unknown",
    "token_k2_unknown_trainstate",
]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write_small(tmp_path / "ckpt")
    return tmp_path / "ckpt"


# --- what upstream wrote


@pytest.mark.parametrize("case", CASES)
def test_read_parameters_when_upstream_wrote_them_then_every_byte_matches(case: str) -> None:
    config = json.loads((UPSTREAM / case / "config.json").read_text())
    expected = json.loads((UPSTREAM / case / "params_sha256.json").read_text())

    parameters = read_parameters(UPSTREAM / case / config["checkpoint"]["prefix"])

    found = {
        name: {
            "shape": list(value.shape),
            "dtype": value.dtype.name,
            "sha256": hashlib.sha256(value.tobytes()).hexdigest(),
        }
        for name, value in parameters.items()
    }
    assert found == expected


@pytest.mark.parametrize("case", CASES)
def test_tree_shapes_when_only_the_index_is_there_then_they_match(case: str, tmp_path: Path) -> None:
    config = json.loads((UPSTREAM / case / "config.json").read_text())
    expected = json.loads((UPSTREAM / case / "params_sha256.json").read_text())
    prefix = UPSTREAM / case / config["checkpoint"]["prefix"]
    (tmp_path / "ckpt.index").write_bytes(index_path(prefix).read_bytes())

    shapes = tree_shapes(tmp_path / "ckpt")

    assert {name: (list(shape), dtype) for name, (shape, dtype) in shapes.items()} == {
        name: (values["shape"], values["dtype"]) for name, values in expected.items()
    }


# --- what the format allows


def test_read_parameters_when_stored_in_16_bits_then_widened_exactly(tmp_path: Path) -> None:
    # 1/3 is not exact in 16 bits; what counts is the value that was stored. 1e-40 is subnormal in bfloat16.
    values = np.array([1 / 3, -2.5, 1e-40, 0.0])
    tree = {"half": values.astype(np.float16), "brain": values.astype(ml_dtypes.bfloat16)}
    write_checkpoint(tmp_path / "ckpt", tree)

    parameters = read_parameters(tmp_path / "ckpt")

    assert {value.dtype for value in parameters.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(parameters["half"], tree["half"].astype(np.float32))
    np.testing.assert_array_equal(parameters["brain"], tree["brain"].astype(np.float32))
    assert tree_shapes(tmp_path / "ckpt") == {"half": ((4,), "float16"), "brain": ((4,), "bfloat16")}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("version", [V1, None])
def test_read_parameters_when_cut_into_pieces_and_shards_then_put_together(
    dtype: Any, version: str | None, tmp_path: Path
) -> None:
    # 150,000 values exceed the reader's buffer of 256 KiB; chunks of 9 kB are cut along every axis, so they are not
    # contiguous in the array, and pieces of 1000 bytes end inside of rows.
    big = np.random.default_rng(0).standard_normal((50, 30, 100)).astype(dtype)
    tree = {"big": big, "scalar": np.array(3, dtype), "whole": {"big": big.T.copy()}}
    write_checkpoint(tmp_path / "cut", tree, version=version, shard_count=3, chunk_bytes=9_000, piece_bytes=1000)
    write_checkpoint(tmp_path / "whole", tree, version=version)

    for name in ("cut", "whole"):
        parameters = read_parameters(tmp_path / name)
        np.testing.assert_array_equal(parameters["big"], big.astype(np.float32))
        np.testing.assert_array_equal(parameters["whole/big"], big.T.astype(np.float32))
        assert parameters["scalar"].shape == ()
        assert parameters["scalar"] == 3


@pytest.mark.parametrize("version", [V1, None])
def test_read_parameters_when_keys_are_not_sorted_then_numbers_follow_the_version(
    version: str | None, tmp_path: Path
) -> None:
    # All of one shape, so only the values tell a wrong number. In V1 the numbers follow the sorted keys however the map
    # is written: 'block_10' before 'block_2'. Before V1 they follow the map.
    tree = {name: np.full(2, i, np.float32) for i, name in enumerate(["block_2", "block_10", "Block"])}
    write_checkpoint(tmp_path / "ckpt", tree, version=version)
    if version == V1:
        with edited(index_path(tmp_path / "ckpt")) as document:
            document["index"] = dict(reversed(document["index"].items()))

    parameters = read_parameters(tmp_path / "ckpt")

    assert {name: value[0] for name, value in parameters.items()} == {"block_2": 0, "block_10": 1, "Block": 2}


def test_read_parameters_when_a_data_file_holds_nothing_then_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "ckpt", {"cls": np.ones(2, np.float32)}, shard_count=3)

    assert read_parameters(tmp_path / "ckpt")["cls"].tolist() == [1, 1]


def test_read_parameters_when_a_train_state_has_empty_states_then_they_take_no_number(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "ckpt", {"opt_state": {"0": {}}, "params": {"cls": np.ones(2, np.float32)}})
    with edited(index_path(tmp_path / "ckpt")) as document:
        document["index"]["opt_state"]["1"] = None

    assert read_parameters(tmp_path / "ckpt")["cls"].tolist() == [1, 1]


def test_read_parameters_when_a_key_looks_like_a_path_then_it_is_just_a_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "ckpt", {"..": {"": {"/etc": np.ones(2, np.float32)}}})

    assert list(read_parameters(tmp_path / "ckpt")) == ["..///etc"]


def test_read_parameters_when_advance_is_given_then_it_adds_up_to_the_stored_bytes(prefix: Path) -> None:
    steps: list[int] = []

    read_parameters(prefix, advance=steps.append)

    # a/kernel has 24 values and b 3, of 4 bytes; the optimiser's 5 are not read.
    assert sum(steps) == sum(stored.size_bytes for stored in tree_shapes(prefix).values()) == 4 * (24 + 3)


MEASURE = """
import sys
from pathlib import Path
from vmoe.flax import read_parameters
def peak_bytes():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
before = peak_bytes()
parameters = read_parameters(Path(sys.argv[1]))
assert not {"torch", "jax", "flax"} & set(sys.modules)
print(peak_bytes() - before, sum(value.nbytes for value in parameters.values()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("version", [V1, None])
def test_read_parameters_when_a_train_state_is_large_then_peak_is_the_parameters(
    version: str | None, tmp_path: Path
) -> None:
    # 34 MB of parameters and 67 MB of optimiser slots. Reading whole files would take at least 100 MB, holding the
    # slots 3 times the parameters, keeping mapped pages 2 times.
    kernel = np.ones((4, 1024, 1024), np.float32)
    params = {"experts": kernel, "tail": kernel}
    tree = {"params": params, "opt_state": {"mu": params, "nu": params}}
    write_checkpoint(tmp_path / "ckpt", tree, version=version, shard_count=2, chunk_bytes=2**22)

    command = [sys.executable, "-c", MEASURE, str(tmp_path / "ckpt")]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout

    growth_bytes, parameter_bytes = map(int, output.split())
    assert parameter_bytes == 2 * kernel.nbytes
    assert growth_bytes < 1.3 * parameter_bytes


def test_read_parameters_when_advance_fails_then_its_error_is_not_ours(prefix: Path) -> None:
    def advance(size_bytes: int) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        read_parameters(prefix, advance=advance)
