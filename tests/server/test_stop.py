"""Signals, with a real process where the signal matters."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from tests.server.conftest import ignores, wait_ready

ROOT = Path(__file__).parents[2]


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 2).save(buffer, "PNG")
    return buffer.getvalue()


IMAGE = {"content": _png(), "headers": {"Content-Type": "image/png"}}
HEAD = (
    "POST /classify?budget=low&deadline_ms=5000 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    f"Content-Type: image/png\r\nContent-Length: {len(_png())}\r\n\r\n"
).encode()


@contextmanager
def run_server(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """`python -m server` with the shipped model, ready; killed at the end unless it has stopped."""
    with start_server(*arguments) as (process, client):
        wait_until_listening(process)
        wait_ready(client)
        yield process, client


def wait_until_listening(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    assert any("Uvicorn running" in line for line in process.stderr)


@contextmanager
def start_server(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """The same, which has only just begun."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "server", "--port", str(port), "--threads", "1", *arguments],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield process, client
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_sigterm_when_a_request_is_inside_then_unready_first_and_it_is_answered_before_the_listener_closes() -> None:
    with run_server() as (process, client):
        url = client.base_url
        with socket.create_connection((url.host, url.port or 80)) as inside:
            inside.sendall(HEAD + _png()[:20])
            while "vmoe_in_flight_requests 1.0" not in client.get("/metrics").text:
                os.sched_yield()
            process.send_signal(signal.SIGTERM)
            while (ready := client.get("/readyz")).status_code == 200:
                os.sched_yield()
            assert (ready.status_code, ready.json()["code"]) == (503, "shutting_down")
            refused = httpx.post(f"{url}/classify", **IMAGE)  # a new connection: the listener is open
            assert (refused.status_code, refused.json()["code"]) == (503, "shutting_down")
            alive = client.get("/healthz")
            assert alive.status_code == 200
            for answer in (ready, refused, alive):
                assert answer.headers["connection"] == "close"
            inside.sendall(_png()[20:])
            found = b""
            while piece := inside.recv(65536):
                found += piece
        assert found.startswith(b"HTTP/1.1 200")
        assert process.wait(timeout=30) == -signal.SIGTERM  # raised again once all is closed


def test_sigterm_when_sent_twice_then_the_process_does_not_wait() -> None:
    with run_server("--drain-timeout-s", "600") as (process, client):
        url = client.base_url
        with socket.create_connection((url.host, url.port or 80)) as inside:
            inside.sendall(HEAD)
            while "vmoe_in_flight_requests 1.0" not in client.get("/metrics").text:
                os.sched_yield()
            process.send_signal(signal.SIGTERM)
            while client.get("/readyz").status_code == 200:
                os.sched_yield()
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == -signal.SIGTERM


def test_sigterm_when_a_delay_is_set_then_requests_are_served_in_it_though_unready() -> None:
    with run_server("--shutdown-delay-s", "600") as (process, client):
        process.send_signal(signal.SIGTERM)
        while (ready := client.get("/readyz")).status_code == 200:
            os.sched_yield()
        assert ready.json()["detail"] == "the gateway is about to shut down"
        assert client.post("/classify?deadline_ms=5000", **IMAGE).status_code == 200
        process.send_signal(signal.SIGTERM)  # enough of it
        assert process.wait(timeout=30) == -signal.SIGTERM


def test_sighup_when_the_file_is_good_then_it_is_in_force_and_when_it_is_bad_the_old_one_stays(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('policy = "fixed"')
    with run_server("--policy", str(policy)) as (process, client):
        assert client.get("/v1/policy").json()["policy"] == "fixed"
        policy.write_text('policy = "aimd"\n[aimd]\ndecrease = 0.25\n[budgets.edge]\ndeadline_ms = 40')
        process.send_signal(signal.SIGHUP)
        while (found := client.get("/v1/policy").json())["policy"] != "aimd":
            os.sched_yield()
        assert found["parameters"]["decrease"] == 0.25
        assert found["budgets"]["edge"]["deadline_ms"] == 40
        policy.write_text('policy = "aimd"\nquantile = 7')
        process.send_signal(signal.SIGHUP)
        assert process.stderr is not None
        for line in process.stderr:
            if "policy.toml, line 2: quantile" in line and "the policy in force stays" in line:
                break
        assert client.get("/v1/policy").json()["budgets"]["edge"]["deadline_ms"] == 40
        process.terminate()
        assert process.wait(timeout=30) == -signal.SIGTERM


def test_sighup_when_the_gateway_starts_then_it_starts_nevertheless() -> None:
    with start_server() as (process, client):
        while not ignores(process.pid, signal.SIGHUP):
            assert process.poll() is None
        process.send_signal(signal.SIGHUP)
        wait_until_listening(process)
        wait_ready(client)
        process.terminate()
        assert process.wait(timeout=30) == -signal.SIGTERM


def test_stop_when_a_batch_runs_then_its_images_are_answered(serve_fake: Any, backend: Any) -> None:
    answers: list[httpx.Response] = []
    with serve_fake() as client:
        backend.gate.clear()
        request = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{client.base_url}/classify", **IMAGE, timeout=30))
        )
        request.start()
        while not backend.batches:
            os.sched_yield()
        threading.Thread(target=_open_once_unready, args=(str(client.base_url), backend)).start()
    # Leaving the block stopped the server: it was unready while the old request still ran.
    request.join()
    assert answers[0].status_code == 200
    assert answers[0].json()["predictions"][0]["index"] == 2


def test_stop_when_the_drain_limit_passes_then_the_rest_is_refused(serve_fake: Any, backend: Any) -> None:
    answers: list[httpx.Response] = []

    def ask(url: str) -> None:
        answers.append(httpx.post(f"{url}/classify", **IMAGE, timeout=30))
        backend.gate.set()  # only now does the runtime come back

    with serve_fake(drain_timeout_s=0) as client:
        backend.gate.clear()
        request = threading.Thread(target=ask, args=(str(client.base_url),))
        request.start()
        while not backend.batches:
            os.sched_yield()
    request.join()
    assert (answers[0].status_code, answers[0].json()["code"]) == (503, "shutting_down")


def _open_once_unready(url: str, backend: Any) -> None:
    while httpx.get(f"{url}/readyz").status_code == 200:
        os.sched_yield()
    backend.gate.set()
