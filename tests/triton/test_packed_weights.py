"""Instances of a real Triton server that map the weights from one folder."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton_client

from exporter.packed_weights import MODEL, WEIGHTS
from exporter.triton_config import TritonOptions
from tests.triton.conftest import SHIPPED
from tests.triton.test_served_model import OUTPUTS, embedded, feeds, infer
from tests.triton_server import TritonServer, TritonServerError, python_repository


def packing(repository: Path, packed_weights: Path) -> Path:
    """A repository for two instances."""
    options = TritonOptions("python", threads=1, instances=2, packed_weights=packed_weights)
    return python_repository(SHIPPED, repository, options)


def mapping(server: TritonServer, path: Path) -> list[int]:
    """The instances' processes that map a file."""
    return [pid for pid in server.stubs if f" {path}\n" in Path(f"/proc/{pid}/maps").read_text()]


def test_two_instances_when_they_share_packed_weights_answer_as_before_and_write_them_once(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 1), np.uint8)
    inputs = feeds(images, [0, -1])
    expected = embedded(inputs)
    with TritonServer(packing(tmp_path / "models", tmp_path / "packed")) as server:
        (folder,) = (tmp_path / "packed").iterdir()
        written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        assert sorted(written) == sorted((MODEL, WEIGHTS))
        for start in ("writes", "reads"):
            assert len(mapping(server, folder / WEIGHTS)) == 2, start
            with (
                triton_client.InferenceServerClient(server.grpc_url) as client,
                ThreadPoolExecutor(4) as pool,
            ):
                for answer in pool.map(lambda _, client=client: infer(client, inputs), range(8)):
                    for name in OUTPUTS:
                        np.testing.assert_array_equal(answer[name], expected[name], err_msg=name)
            if start == "writes":
                server.restart()
        assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == written
        assert list((tmp_path / "packed").iterdir()) == [folder]


def test_server_when_packed_weights_cannot_be_written_does_not_start_and_says_where(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    repository = packing(tmp_path / "models", tmp_path / "file")
    with (
        pytest.raises(TritonServerError, match=r"packed_weights: cannot write .*/file: "),
        TritonServer(repository),
    ):
        pass
