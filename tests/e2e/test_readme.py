"""A stranger follows the README: the light install, the server, the curl command, and the figures of its table."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from exporter.bundle import Bundle, Point

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
INSTALL_LIMIT_S = 300.0  # pip, on a slow network; the server itself is ready within seconds


@dataclass(frozen=True)
class Served:
    """`make serve`, running: its virtual environment and its port."""

    environment: Path
    port: int


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    environment = tmp_path_factory.mktemp("fresh") / "venv"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    process = subprocess.Popen(
        ["make", "serve", f"VENV={environment}"],
        cwd=ROOT,
        env={**os.environ, "VMOE_PORT": str(port)},
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + INSTALL_LIMIT_S
        while not _is_ready(port):
            assert process.poll() is None, "make serve ended before the server was ready"
            assert time.monotonic() < deadline, "make serve was not ready in time"
        yield Served(environment, port)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def test_light_install_serves_and_has_no_torch(served: Served) -> None:
    python = str(served.environment / "bin" / "python")
    found = subprocess.run([python, "-c", "import torch"], capture_output=True, text=True, check=False)
    assert "No module named 'torch'" in found.stderr


def test_curl_command_of_the_readme_gives_the_answer_shown(served: Served) -> None:
    (command,) = re.findall(r"^\$ (curl .*classify.*)$", README, re.MULTILINE)
    arguments = shlex.split(command.replace("127.0.0.1:8080", f"127.0.0.1:{served.port}"))
    answer = json.loads(subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    (shown,) = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    expected = json.loads(shown)
    for varying in ("request_id", "times"):
        assert answer.pop(varying).keys() == expected.pop(varying).keys() if varying == "times" else answer.pop(varying)
        expected.pop(varying, None)
    assert isinstance(answer.pop("deadline_met"), bool)  # a busy machine may stall
    assert expected.pop("deadline_met") is True
    for mine, theirs in zip(answer.pop("predictions"), expected.pop("predictions"), strict=True):
        assert mine["label"] == theirs["label"]
        assert mine["probability"] == pytest.approx(theirs["probability"], abs=1e-3)
    assert answer == expected


def test_table_of_the_readme_equals_the_manifest() -> None:
    points = Bundle.load(ROOT / "model_repository" / "vmoe-fashion-mnist").manifest.points
    full = points[-1]
    rows = re.findall(
        r"^\| ([\d.]+) \| (\d) \| (\d+) \| ([\d.]+) % \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", README, re.M
    )
    expected = [
        (
            f"{point.capacity_factor:g}",
            str(point.num_selected_experts),
            str(point.slots[0]),
            f"{100 * (point.accuracy or 0):.2f}",
            f"{point.relative_compute:.2f}",
            f"{_median(point, 1) / _median(full, 1):.2f}",
            f"{_median(point, 8) / _median(full, 8):.2f}",
        )
        for point in points
    ]
    assert rows == expected


def test_make_targets_and_options_of_the_readme_exist() -> None:
    for target in set(re.findall(r"`?make ([\w-]+)`?", README)):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    from exporter.cli import app as exporter_app
    from vmoe.cli import app as vmoe_app

    assert {command.callback.__name__ for command in vmoe_app.registered_commands if command.callback} >= {
        "train",
        "evaluate",
    }
    assert exporter_app.registered_commands


def _median(point: Point, batch_size: int) -> float:
    return next(entry.median_s for entry in point.latency if entry.batch_size == batch_size)


def _is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
    except httpx.ConnectError:
        return False
