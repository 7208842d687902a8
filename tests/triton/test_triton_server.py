"""The fixture itself: a server that starts, dies, hangs and comes back where tests want it."""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.triton.conftest import SHIPPED
from tests.triton_server import TritonServer, TritonServerError, main


def ready(server: TritonServer, timeout_s: float = 5.0) -> int:
    with urllib.request.urlopen(f"http://{server.http_url}/v2/health/ready", timeout=timeout_s) as response:
        return int(response.status)


def test_killed_server_is_gone_at_once_and_comes_back_on_the_same_ports(triton_repository: Path) -> None:
    with TritonServer(triton_repository) as server:
        assert ready(server) == 200
        server.kill()
        assert not server.running
        with pytest.raises(urllib.error.URLError, match="refused"):
            ready(server)
        server.start()
        server.wait_ready()
        assert ready(server) == 200
    assert not server.running


def test_paused_server_does_not_answer_until_it_is_resumed(triton_repository: Path) -> None:
    with TritonServer(triton_repository) as server:
        server.pause()
        with pytest.raises(TimeoutError):
            ready(server, timeout_s=0.2)
        server.resume()
        assert ready(server) == 200


def test_killed_server_leaves_neither_processes_nor_shared_memory(triton_repository: Path) -> None:
    def shared_memory() -> list[str]:
        return sorted(path.name for path in Path("/dev/shm").glob("*vmoe_triton_*"))

    before = shared_memory()
    with TritonServer(triton_repository) as server:
        assert shared_memory() != before
        server.kill()
        assert shared_memory() == before


def test_program_serves_while_a_command_runs_and_returns_its_exit_code() -> None:
    connect = "import socket, sys; host, port = sys.argv[1].split(':'); socket.create_connection((host, int(port)))"
    assert main(str(SHIPPED), sys.executable, "-c", f"{connect}; sys.exit(7)", "GRPC_URL") == 7


def test_model_that_does_not_load_fails_the_start_with_the_log(tmp_path: Path) -> None:
    model = tmp_path / "broken"
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text('backend: "python"\n')
    (model / "1" / "model.py").write_text("raise ValueError('no weights today')\n")
    with pytest.raises(TritonServerError, match="no weights today"), TritonServer(tmp_path):
        pass
