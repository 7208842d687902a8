"""server/Dockerfile, as far as that goes without a Docker engine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.deploy.conftest import ROOT, tool
from tests.triton_server import free_port

DOCKERFILE = (ROOT / "server/Dockerfile").read_text()


def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run(
        [tool("hadolint"), "server/Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_everything_that_is_copied_exists_and_reaches_the_build() -> None:
    allowed = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    copied = [
        word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()
    ]
    assert sorted(copied) == sorted(allowed)
    assert all((ROOT / name).exists() for name in copied)


def test_base_image_is_pinned_and_of_the_python_that_the_tests_run_with() -> None:
    (version,) = re.findall(r"^ARG PYTHON=python:(\d+\.\d+)\.\d+-slim-\w+$", DOCKERFILE, re.MULTILINE)
    assert version == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)) == {"${PYTHON}"}


def test_user_is_a_number_and_not_root() -> None:
    (user, group) = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)[-1]
    assert int(user) > 0
    assert int(group) > 0


def test_health_check_tells_a_live_gateway_from_a_dead_port(gateway_url: str) -> None:
    (command,) = re.findall(r"^    CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    python, *arguments = json.loads(command)
    assert python == "python"

    def check(port: str) -> int:
        # A proxy must not come between: it would report its own health.
        environment = {**os.environ, "VMOE_PORT": port, "HTTP_PROXY": "http://127.0.0.1:1"}
        return subprocess.run(
            [sys.executable, *arguments], env=environment, stderr=subprocess.DEVNULL, check=False
        ).returncode

    assert check(gateway_url.rpartition(":")[2]) == 0
    assert check(str(free_port())) != 0


def test_entry_point_is_the_gateway() -> None:
    (command,) = re.findall(r"^ENTRYPOINT (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert json.loads(command) == ["python", "-m", "server"]
    assert Path(ROOT / "server/__main__.py").exists()
