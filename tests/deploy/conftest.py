"""The gateway as it is deployed: a process of its own, and where it takes its options from."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.deploy.live_prometheus import wait_until
from tests.triton_server import free_port

ROOT = Path(__file__).parents[2]
_START_LIMIT_S = 60.0  # a second or two on a quiet machine


@pytest.fixture(scope="session")
def gateway_url() -> Iterator[str]:
    """With the embedded engine."""
    with running_gateway() as url:
        yield url


@contextmanager
def running_gateway(*arguments: str) -> Iterator[str]:
    """`python -m server` with the shipped model; its URL."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "server", "--port", str(port), *arguments], cwd=ROOT)
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        assert process.poll() is None, "the gateway stopped before it was ready"
        try:
            return httpx.get(f"{url}/readyz").status_code == 200
        except httpx.ConnectError:
            return False

    try:
        wait_until(ready, _START_LIMIT_S, "the gateway is ready")
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="session")
def image_environment() -> dict[str, str]:
    """VMOE_* of server/Dockerfile."""
    return dict(re.findall(r"\b(VMOE_\w+)=(\S+)", (ROOT / "server/Dockerfile").read_text()))


def tool(name: str) -> str:
    """A program of the virtual environment, or of the system.

    Raises:
        pytest.skip: it is not there; the reason says what installs it.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is missing: `make test` installs it (pip extra `dev`, Debian package prometheus)")
    return found
