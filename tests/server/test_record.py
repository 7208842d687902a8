"""Recorded arrivals, read back by the load tests."""

from __future__ import annotations

import csv
import io
import os
import resource
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from typer.testing import CliRunner

from loadtest.cli import app
from loadtest.trace import read_trace
from server.cli import main
from tests.server.conftest import REPOSITORY, SHIPPED
from tests.server.test_stop import run_server


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 2).save(buffer, "PNG")
    return buffer.getvalue()


PNG = _png()
IMAGE: dict[str, Any] = {"content": PNG, "headers": {"Content-Type": "image/png"}}


def rows(path: Path) -> list[tuple[str, str]]:
    """(budget, deadline_ms) of each, as they stand."""
    with path.open(newline="") as file:
        return [(row["budget"], row["deadline_ms"]) for row in csv.DictReader(file)]


def wait_for(client: httpx.Client, line: str) -> None:
    while line not in client.get("/metrics").text:
        os.sched_yield()


def test_record_when_requests_of_all_kinds_came_then_each_image_offered_has_its_row(
    serve_fake: Any, tmp_path: Path
) -> None:
    path = tmp_path / "arrivals.csv"
    with serve_fake(record=path, max_image_bytes=500) as client:
        client.post("/classify?deadline_ms=250.5", **IMAGE)
        client.post("/classify?budget=low", files=[("image", ("a.png", PNG, "image/png"))] * 2)
        client.post("/classify?capacity_factor=1&num_selected_experts=1", **IMAGE)
        assert client.post("/classify", content=bytes(501), headers=IMAGE["headers"]).status_code == 413
        assert client.post("/classify?budget=none", **IMAGE).status_code == 422
        client.get("/v1/policy")
        client.post("/classify?budget=max", **IMAGE)
    assert rows(path) == [("auto", "250.5"), ("low", ""), ("low", ""), ("auto", ""), ("max", "")]
    trace = read_trace(path)
    assert trace.arrival_s[0] == 0
    assert trace.arrival_s[1] == trace.arrival_s[2] < trace.arrival_s[3]
    bundle = REPOSITORY / SHIPPED
    found = CliRunner().invoke(app, ["simulate", "--bundle", str(bundle), "--trace", str(path)])
    assert found.exit_code == 0, found.output


def test_record_when_uploads_end_out_of_order_then_rows_stand_in_order_of_arrival(
    serve_fake: Any, tmp_path: Path
) -> None:
    path = tmp_path / "arrivals.csv"
    head = f"POST /classify?budget=low HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(PNG)}"
    with serve_fake(record=path) as client:
        url = client.base_url
        with socket.create_connection((url.host, url.port or 80)) as first:
            first.sendall(f"{head}\r\n\r\n".encode() + PNG[:20])
            wait_for(client, "vmoe_in_flight_requests 1.0")
            assert client.post("/classify?budget=max", **IMAGE).status_code == 200
            first.sendall(PNG[20:])
            assert first.recv(65536).startswith(b"HTTP/1.1 200")
    assert [budget for budget, _ in rows(path)] == ["low", "max"]
    assert read_trace(path).arrival_s[1] > 0


def test_record_when_the_queue_is_full_then_the_refused_are_recorded(
    serve_fake: Any, backend: Any, tmp_path: Path
) -> None:
    path = tmp_path / "arrivals.csv"
    with serve_fake(record=path, max_queue_images=1, max_images_per_request=1) as client:
        backend.gate.clear()
        inside = threading.Thread(target=client.post, args=("/classify?budget=low",), kwargs=IMAGE)
        inside.start()
        wait_for(client, "vmoe_in_flight_requests 1.0")
        assert client.post("/classify?budget=high", **IMAGE).json()["code"] == "queue_full"
        backend.gate.set()
        inside.join()
    assert [budget for budget, _ in rows(path)] == ["low", "high"]


def test_record_when_the_limit_is_reached_then_whole_rows_stay_and_a_log_line_says_so(
    serve_fake: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "arrivals.csv"
    # 29 bytes of header, 15 of a row such as `0.000000,auto,`
    with serve_fake(record=path, record_max_bytes=29 + 2 * 15 + 5) as client:
        for _ in range(3):
            assert client.post("/classify", **IMAGE).status_code == 200
    assert len(rows(path)) == 2
    assert f"recording to {path} ends at record_max_bytes (64)" in caplog.text


def test_record_when_nothing_came_then_no_file_is_left_in_the_way_of_the_next_start(
    serve_fake: Any, tmp_path: Path
) -> None:
    path = tmp_path / "arrivals.csv"
    with serve_fake(record=path):
        assert path.exists()
    assert not path.exists()


def test_record_when_the_file_exists_then_the_gateway_does_not_start_and_it_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "arrivals.csv"
    path.write_text("precious")
    for name, complaint in ((str(path), "exists and would be overwritten"), ("/nowhere/a.csv", "No such file")):
        with pytest.raises(SystemExit) as stopped:
            main(["--model-repository", str(REPOSITORY), "--threads", "1", "--port", "0", "--record", name])
        assert stopped.value.code == 1
        assert complaint in caplog.text
    assert path.read_text() == "precious"


def test_record_when_the_disk_takes_no_more_then_serving_goes_on_and_whole_rows_stay(tmp_path: Path) -> None:
    path = tmp_path / "arrivals.csv"
    with run_server("--record", str(path)) as (process, client):
        # 29 bytes of header, 19 of a row such as `0.000000,auto,5000`: one fits, and two bytes of the next.
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (50, 50))
        assert process.stderr is not None
        for _ in range(3):
            assert client.post("/classify?deadline_ms=5000", **IMAGE).status_code == 200
        for line in process.stderr:
            if "recording to" in line and "serving goes on" in line:
                break
        assert client.post("/classify?deadline_ms=5000", **IMAGE).status_code == 200
        process.terminate()
        process.wait(timeout=30)
    assert path.stat().st_size == 48
    assert len(read_trace(path)) == 1
