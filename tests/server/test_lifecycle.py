"""Start and readiness, seen from outside."""

from __future__ import annotations

import io
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from exporter.bundle import Bundle, BundleError, Manifest
from server.app import create_server
from server.cli import main
from server.settings import Settings
from tests.server.conftest import wait_ready

ROOT = Path(__file__).parents[2]
CORES = len(os.sched_getaffinity(0))


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 2).save(buffer, "PNG")
    return buffer.getvalue()


IMAGE = {"content": _png(), "headers": {"Content-Type": "image/png"}}


def test_ready_when_the_model_is_not_warm_then_503_but_the_process_lives(serve_fake: Any, backend: Any) -> None:
    backend.gate.clear()
    with serve_fake(wait=False) as client:
        response = client.get("/readyz")
        assert (response.status_code, response.json()["code"]) == (503, "not_ready")
        assert response.headers["retry-after"] == "1"
        assert client.get("/healthz").json() == {"status": "ok"}
        assert client.post("/classify", **IMAGE).json()["code"] == "not_ready"
        backend.gate.set()
        wait_ready(client)
        assert client.post("/classify", **IMAGE).status_code == 200


def test_ready_when_the_warm_up_failed_then_503_for_good(serve_fake: Any, backend: Any) -> None:
    backend.failure = RuntimeError("secret")
    with serve_fake(wait=False) as client:
        while "failed" not in (detail := client.get("/readyz").json()["detail"]):
            os.sched_yield()
        assert "secret" not in detail
        assert client.post("/classify", **IMAGE).status_code == 503


def test_warm_up_when_done_then_both_ends_of_the_ladder_ran_alone_and_in_a_full_batch(
    serve_fake: Any, backend: Any
) -> None:
    with serve_fake(max_batch_size=4, wait=False) as client:
        wait_ready(client)
        # The small model's ladder ends at 1 slot with K = 1 and 3 slots with K = 2. Thrice: the first run allocates.
        runs = [(len(b.images), b.slots[0, 0], b.num_selected_experts[0, 0]) for b in backend.batches]
        assert runs == [each for each in [(1, 1, 1), (4, 1, 1), (1, 3, 2), (4, 3, 2)] for _ in range(3)]


def test_gateway_when_the_model_routes_several_images_together_then_it_is_refused(
    backend: Any, manifest: Manifest
) -> None:
    moe = manifest.architecture.moe
    assert moe is not None
    architecture = replace(manifest.architecture, moe=replace(moe, group_images=4))
    bundle = Bundle(Path("shared"), manifest.model_copy(update={"architecture": architecture}))
    with pytest.raises(BundleError, match="groups of 4 images"):
        create_server(Settings(), bundle, backend, CollectorRegistry())


def test_backend_when_its_library_is_missing_then_the_program_says_what_to_install() -> None:
    program = "import sys; sys.modules['geventhttpclient'] = None; from server.cli import main; main()"
    arguments = ["--backend", "triton", "--triton-urls", "a:8001,http://b:8000"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "does not include http support" in done.stderr
    assert "pip install -c constraints.txt -e '.[triton]'" in done.stderr


def test_server_when_imported_then_torch_is_not() -> None:
    program = "import sys, server.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--port", "eighty"], 2, "port"),
        (["--colour", "red"], 2, "--colour"),
        (
            ["--max-images-per-request", "99", "--max-queue-images", "9"],
            2,
            "\nmax_images_per_request (99) must not exceed",
        ),
        (["--host", " "], 2, "setting host: it must be named: 127.0.0.1 for this machine alone, 0.0.0.0 for every"),
        (["--admin-key", "schlüssel"], 2, "setting admin_key: it must be printable ASCII"),
        (["--admin-key", "\n"], 2, "setting admin_key: it is blank"),
        (["--triton-urls", "a:1", "--model", "nothing"], 1, "--triton-urls: ignored, for the backend is embedded"),
        (["--workers", str(CORES + 1), "--host", "nowhere.invalid"], 1, f"{CORES + 1} workers share {CORES} cores"),
        (["--triton-urls", "a:8001,https://b:8000"], 2, "http://host:port, got 'https://b:8000'"),
        (["--port", "0", "--host", "nowhere.invalid"], 1, "cannot listen on nowhere.invalid:0: "),
        (["--model", "nothing"], 1, "is model_repository/nothing a bundle? model_repository has vmoe-fashion-mnist"),
        (["--policy", "fxed"], 1, "'fxed' is neither a file nor a policy; policies are foresight, fixed,"),
        (["--policy", "tests/data/policy/bad.toml"], 1, "bad.toml, line 4: budgets.auto.deadline"),
    ],
)
def test_command_line_when_wrong_then_it_says_so_before_listening(
    arguments: list[str], status: int, message: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server", *arguments], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == status
    assert message in f"\n{done.stderr}"
    assert "Traceback" not in done.stderr
    assert "schlüssel" not in done.stderr


def test_settings_when_the_admin_key_comes_from_a_file_then_its_newline_is_no_part_of_it() -> None:
    assert Settings(admin_key=SecretStr(" secret\n")).admin_key.get_secret_value() == "secret"


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health_when_asked_by_head_then_it_answers_without_a_body(serve_fake: Any, path: str) -> None:
    with serve_fake() as client:
        answer = client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_command_line_when_the_port_is_taken_then_it_says_so_and_nothing_is_served() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "server", "--port", str(port)], cwd=ROOT, check=False, capture_output=True, text=True
        )
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in done.stderr
    assert "startup" not in done.stderr


def test_command_line_when_the_version_is_asked_for_then_it_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"vmoe-serving {version('vmoe-serving')}\n"


def test_metrics_when_scraped_then_they_say_what_runs(serve_fake: Any, manifest: Manifest) -> None:
    with serve_fake() as client:
        (found,) = [line for line in client.get("/metrics").text.splitlines() if line.startswith("vmoe_build_info{")]
    assert found.endswith("} 1.0")
    for label, value in {
        "model": "small",
        "model_version": manifest.version,
        "version": version("vmoe-serving"),
        "onnxruntime": version("onnxruntime"),
    }.items():
        assert re.search(rf'[{{,]{label}="{re.escape(value)}"', found)


def test_settings_when_set_twice_then_the_command_line_wins_over_the_environment() -> None:
    program = "from pydantic_settings import CliApp; from server.settings import Settings; "
    program += "s = CliApp.run(Settings, cli_args=['--port', '1']); print(s.port, s.shutdown_delay_s, s.threads)"
    environment = os.environ | {"VMOE_PORT": "2", "VMOE_SHUTDOWN_DELAY_S": "0.5"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["1", "0.5", "0"]


def test_backend_when_tritonclient_is_missing_then_the_extra_is_named() -> None:
    program = (
        "import sys; sys.modules['tritonclient'] = None; from server.cli import main; main(['--backend', 'triton'])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install -c constraints.txt -e '.[triton]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_server_when_the_engine_is_embedded_then_tritonclient_is_not_imported() -> None:
    program = "import sys, server.cli; sys.exit(any(name in sys.modules for name in ('tritonclient', 'grpc')))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
