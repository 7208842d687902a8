"""A real server with the shipped model, one for all tests of this directory that do not harm it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.triton_server import TritonServer, python_repository

SHIPPED = Path(__file__).parents[2] / "model_repository" / "vmoe-fashion-mnist"
PROTOCOLS = ("grpc", "http")


def url_of(server: TritonServer, protocol: str) -> str:
    """An entry of the setting `triton_urls`."""
    return {"grpc": server.grpc_url, "http": f"http://{server.http_url}"}[protocol]


@pytest.fixture(scope="session")
def triton_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return python_repository(SHIPPED, tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="session")
def triton(triton_repository: Path) -> Iterator[TritonServer]:
    with TritonServer(triton_repository) as server:
        yield server
    assert "Traceback" not in server.log  # of all requests of all tests: one of them per tensor would be much


@pytest.fixture(scope="module")
def victim(triton_repository: Path) -> Iterator[TritonServer]:
    """A server to be harmed; tests leave it running."""
    with TritonServer(triton_repository) as server:
        yield server
        assert server.running
    assert "Traceback" not in server.log
