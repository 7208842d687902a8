"""Every failure over HTTP: status, code, problem+json, and nothing of the stack in it."""

from __future__ import annotations

import io
import os
import socket
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from exporter.bundle import Manifest
from server import errors


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


PNG = {"Content-Type": "image/png"}
GRAY_1X1 = _png(Image.new("L", (1, 1)))


def assert_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem.keys() == {"type", "title", "status", "detail", "code", "request_id"}
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["request_id"] == response.headers["x-request-id"]
    assert not any(word in response.text for word in ("Traceback", "File ", ".py", "0x", "secret"))
    return problem


@pytest.fixture
def server(serve_fake: Any) -> Iterator[httpx.Client]:
    limits = {"max_image_bytes": 1000, "max_body_bytes": 3000, "max_images_per_request": 3, "max_image_pixels": 100}
    with serve_fake(**limits) as client:
        yield client


def files(*contents: bytes, media_type: str = "image/png", field: str = "image") -> list[tuple[str, Any]]:
    return [(field, (f"{i}.png", content, media_type)) for i, content in enumerate(contents)]


def test_classify_when_content_is_text_then_400(server: httpx.Client) -> None:
    assert_problem(server.post("/classify", content=b"hello", headers=PNG), 400, "not_an_image")


def test_classify_when_image_is_truncated_then_400(server: httpx.Client) -> None:
    assert_problem(server.post("/classify", content=GRAY_1X1[:45], headers=PNG), 400, "broken_image")


def test_classify_when_body_is_empty_then_400(server: httpx.Client) -> None:
    assert_problem(server.post("/classify", content=b"", headers=PNG), 400, "no_image")


def test_classify_when_form_has_no_file_then_400(server: httpx.Client) -> None:
    body = b"--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert_problem(server.post("/classify", content=body, headers=headers), 400, "no_image")


@pytest.mark.parametrize(
    "headers",
    [{"Content-Type": "multipart/form-data; boundary=x"}, {"Content-Type": "multipart/form-data"}],
)
def test_classify_when_form_is_garbage_then_400(server: httpx.Client, headers: dict[str, str]) -> None:
    assert_problem(server.post("/classify", content=b"garbage", headers=headers), 400, "malformed_body")


def test_classify_when_form_field_is_unknown_then_400_names_the_right_one(server: httpx.Client) -> None:
    response = server.post("/classify", files=files(GRAY_1X1, field="picture"))
    assert "'picture'" in assert_problem(response, 400, "malformed_body")["detail"]


def test_classify_when_form_field_is_text_then_400(server: httpx.Client) -> None:
    response = server.post("/classify", files=[("image", (None, b"text"))])
    assert_problem(response, 400, "malformed_body")


def test_classify_when_form_has_too_many_files_then_400_says_how_many(server: httpx.Client) -> None:
    response = server.post("/classify", files=files(*[GRAY_1X1] * 4))
    assert "at most 3" in assert_problem(response, 400, "malformed_body")["detail"]


def test_classify_when_announced_length_is_above_the_limit_then_413_before_the_body(server: httpx.Client) -> None:
    # Only the headers are sent: an answer proves that nobody waited for the body.
    url = httpx.URL(str(server.base_url))
    with socket.create_connection((url.host, url.port or 80)) as connection:
        connection.sendall(
            b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1000000000\r\n\r\n"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


def test_classify_when_chunked_body_passes_the_limit_then_413(server: httpx.Client) -> None:
    assert_problem(server.post("/classify", content=iter([b"x" * 600] * 2), headers=PNG), 413, "image_too_large")


def test_classify_when_chunked_form_passes_the_limit_then_413(server: httpx.Client) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    response = server.post("/classify", content=iter([head] + [b"x" * 500] * 7), headers=headers)
    assert_problem(response, 413, "body_too_large")


def test_classify_when_a_body_is_refused_while_it_is_sent_then_the_answer_arrives_before_the_connection_closes(
    server: httpx.Client,
) -> None:
    url, size_bytes = httpx.URL(str(server.base_url)), 4_000_000
    with socket.create_connection((url.host, url.port or 80), timeout=30) as connection:
        head = f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {size_bytes}"
        connection.sendall(head.encode() + b"\r\n\r\n" + bytes(size_bytes))
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"\r\nconnection: close\r\n" in answer
    assert b'"code":"image_too_large"' in answer


def test_classify_when_file_in_form_has_too_many_bytes_then_413(server: httpx.Client) -> None:
    assert_problem(server.post("/classify", files=files(b"x" * 1001)), 413, "image_too_large")


def test_classify_when_image_has_too_many_pixels_then_413(server: httpx.Client) -> None:
    bomb = GRAY_1X1[:16] + (60_000).to_bytes(4, "big") * 2 + GRAY_1X1[24:]
    assert_problem(server.post("/classify", content=_with_header_crc(bomb), headers=PNG), 413, "too_many_pixels")


@pytest.mark.parametrize("media_type", ["text/plain", "application/json", "image/tiff"])
def test_classify_when_media_type_is_unknown_then_415(server: httpx.Client, media_type: str) -> None:
    response = server.post("/classify", content=GRAY_1X1, headers={"Content-Type": media_type})
    assert "image/jpeg" in assert_problem(response, 415, "unsupported_media_type")["detail"]


def test_classify_when_media_type_is_missing_then_415(server: httpx.Client) -> None:
    assert_problem(server.post("/classify", content=GRAY_1X1), 415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("query", "allowed"),
    [
        ("budget=huge", "budget must be one of low, medium, high, max, auto, got 'huge'"),
        (
            "budgte=low",
            "allowed are budget, deadline_ms, min_accuracy, capacity_factor, num_selected_experts, top, explain",
        ),
        ("deadline_ms=0.5", "greater than or equal to 1"),
        ("deadline_ms=nan", "finite number"),
        ("deadline_ms=10001", "between 1 and 10000"),
        ("min_accuracy=1.1", "less than or equal to 1"),
        ("min_accuracy=0.91", "at most 0.9"),
        ("min_accuracy=0.5&capacity_factor=1&num_selected_experts=1", "exclude each other"),
        ("capacity_factor=1", "num_selected_experts is missing"),
        ("capacity_factor=9&num_selected_experts=1", "at most 4"),
        ("capacity_factor=nan&num_selected_experts=1", "above 0"),
        ("capacity_factor=1&num_selected_experts=7", "between 1 and 2"),
        ("capacity_factor=1&num_selected_experts=1&budget=low", "exclude each other"),
        ("top=0", "top must be between 1 and 4, the number of classes, got 0"),
        ("top=5", "between 1 and 4"),
        ("top=many", "valid integer"),
        ("explain=perhaps", "boolean"),
    ],
)
def test_classify_when_parameters_are_wrong_then_422_says_what_is_allowed(
    server: httpx.Client, query: str, allowed: str
) -> None:
    response = server.post(f"/classify?{query}", content=GRAY_1X1, headers=PNG)
    assert allowed in assert_problem(response, 422, "invalid_parameter")["detail"]


def test_classify_when_model_is_dense_then_budgets_work_and_points_are_422(
    serve_fake: Any, dense_manifest: Manifest
) -> None:
    with serve_fake(dense_manifest) as client:
        answer = client.post("/classify?budget=low&explain=true", content=GRAY_1X1, headers=PNG).json()
        assert answer["operating_point"] is None
        assert answer["kept"] == []
        response = client.post("/classify?capacity_factor=1&num_selected_experts=1", content=GRAY_1X1, headers=PNG)
        assert_problem(response, 422, "invalid_parameter")


def test_any_path_when_unknown_then_404(server: httpx.Client) -> None:
    assert_problem(server.get("/nothing"), 404, "not_found")


def test_classify_when_method_is_wrong_then_405_names_the_right_one(server: httpx.Client) -> None:
    response = server.get("/classify")
    assert_problem(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_classify_when_backend_fails_then_500_without_its_message(serve_fake: Any, backend: Any) -> None:
    with serve_fake() as client:
        backend.failure = RuntimeError("secret")
        assert_problem(client.post("/classify", content=GRAY_1X1, headers=PNG), 500, "inference_failed")


def test_classify_when_something_unexpected_breaks_then_500_without_detail(
    serve_fake: Any, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("server.routes.describe_answer", broken)
    with serve_fake() as client:
        assert_problem(client.post("/classify", content=GRAY_1X1, headers=PNG), 500, "internal_error")


def test_classify_when_queue_is_full_then_503_with_retry_after(serve_fake: Any, backend: Any) -> None:
    with serve_fake(max_queue_images=1, max_images_per_request=1) as client:
        backend.gate.clear()
        answers: list[httpx.Response] = []
        first = threading.Thread(target=lambda: answers.append(client.post("/classify", content=GRAY_1X1, headers=PNG)))
        first.start()
        _wait_until_inferring(backend)
        response = client.post("/classify", content=GRAY_1X1, headers=PNG)
        assert_problem(response, 503, "queue_full")
        assert response.headers["retry-after"] == "1"
        metrics = client.get("/metrics").text
        assert 'vmoe_shed_images_total{budget="auto",reason="queue_full"} 1.0' in metrics
        assert 'vmoe_offered_images_total{budget="auto"} 2.0' in metrics
        backend.gate.set()
        first.join()
        assert answers[0].status_code == 200
        assert client.post("/classify", content=GRAY_1X1, headers=PNG).status_code == 200  # the permit came back


@pytest.mark.parametrize("size", [45, 5000])  # of a small file and a large one
def test_classify_when_an_image_is_refused_for_load_then_it_is_not_decoded(
    serve_fake: Any, backend: Any, size: int
) -> None:
    broken = GRAY_1X1[:45].ljust(size, b"\0")
    with serve_fake() as client:
        backend.num_workers = 0
        assert_problem(client.post("/classify", content=broken, headers=PNG), 503, "backend_unavailable")
        backend.num_workers = 1
        assert_problem(client.post("/classify", content=broken, headers=PNG), 400, "broken_image")


def test_classify_when_bytes_of_the_queue_are_used_up_then_503(serve_fake: Any, backend: Any) -> None:
    size = len(GRAY_1X1)
    with serve_fake(max_queue_bytes=size, max_image_bytes=size, max_body_bytes=size) as client:
        backend.gate.clear()
        first = threading.Thread(target=client.post, args=("/classify",), kwargs={"content": GRAY_1X1, "headers": PNG})
        first.start()
        _wait_until_inferring(backend)
        assert_problem(client.post("/classify", content=GRAY_1X1, headers=PNG), 503, "queue_full")
        backend.gate.set()
        first.join()


def test_classify_when_answer_takes_too_long_then_504(serve_fake: Any, backend: Any) -> None:
    with serve_fake(request_timeout_s=0.05) as client:
        backend.gate.clear()
        assert_problem(client.post("/classify", content=GRAY_1X1, headers=PNG), 504, "deadline_exceeded")
        backend.gate.set()


def test_classify_when_upload_takes_too_long_then_408(serve_fake: Any) -> None:
    with serve_fake(request_timeout_s=0.05) as client:
        url = httpx.URL(str(client.base_url))
        with socket.create_connection((url.host, url.port or 80)) as connection:
            connection.sendall(
                b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 10\r\n\r\n12345"
            )
            answer = connection.recv(1000)
            assert answer.startswith(b"HTTP/1.1 408")
            assert b"\r\nconnection: close\r\n" in answer


def test_classify_when_client_goes_away_then_the_permit_comes_back(serve_fake: Any, backend: Any) -> None:
    with serve_fake(max_queue_images=1, max_images_per_request=1) as client:
        backend.gate.clear()
        url = httpx.URL(str(client.base_url))
        with socket.create_connection((url.host, url.port or 80)) as connection:
            head = f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(GRAY_1X1)}"
            connection.sendall(head.encode() + b"\r\n\r\n" + GRAY_1X1)
            _wait_until_inferring(backend)
        while "vmoe_in_flight_requests 1.0" in client.get("/metrics").text:
            os.sched_yield()  # the server notices the closed socket on its next turn
        assert 'vmoe_requests_total{budget="auto",status="499"} 1.0' in client.get("/metrics").text
        backend.gate.set()
        assert client.post("/classify", content=GRAY_1X1, headers=PNG).status_code == 200


def test_classify_when_client_goes_away_during_the_upload_then_the_permit_comes_back(serve_fake: Any) -> None:
    with serve_fake(max_queue_images=1, max_images_per_request=1) as client:
        url = httpx.URL(str(client.base_url))
        with socket.create_connection((url.host, url.port or 80)) as connection:
            connection.sendall(
                b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 10\r\n\r\n12345"
            )
            while "vmoe_in_flight_requests 1.0" not in client.get("/metrics").text:
                os.sched_yield()
        while "vmoe_in_flight_requests 1.0" in client.get("/metrics").text:
            os.sched_yield()
        assert 'vmoe_requests_total{budget="auto",status="499"} 1.0' in client.get("/metrics").text
        assert client.post("/classify", content=GRAY_1X1, headers=PNG).status_code == 200


def test_errors_when_listed_then_codes_are_unique_and_each_has_a_status() -> None:
    leaves = [kind for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "code")]
    assert len({kind.code for kind in leaves}) == len(leaves)
    assert all(400 <= kind.status < 600 for kind in leaves)


@pytest.mark.parametrize(("room_s", "header"), [(-1.0, 1), (0.02, 1), (1.0, 1), (1.2, 2)])
def test_retry_after_when_there_is_room_in_between_seconds_then_it_is_rounded_up(room_s: float, header: int) -> None:
    assert errors.Overloaded("", room_s).retry_after_s == header


def _wait_until_inferring(backend: Any) -> None:
    while not backend.batches:
        os.sched_yield()


def _with_header_crc(png: bytes) -> bytes:
    return png[:29] + zlib.crc32(png[12:29]).to_bytes(4, "big") + png[33:]
