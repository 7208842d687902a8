"""The gateway in front of real Triton servers: the same answers as without, and what clients see when servers fail."""

from __future__ import annotations

import io
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from exporter.bundle import Bundle
from exporter.measure import labelled_images, sample_images
from server.backends.ort import OrtBackend
from tests.server.conftest import serving, wait_ready
from tests.triton.conftest import PROTOCOLS, SHIPPED, url_of
from tests.triton_server import TritonServer

BUNDLE = Bundle.load(SHIPPED)
DIGEST = BUNDLE.manifest.files["1/model.onnx"][:8]
DATASET = Path("/usr/share/datasets/fashion-mnist")
# Long enough for a loaded machine, and short enough to wait for.
DEADLINE_MS = 1000
QUERY = f"/classify?deadline_ms={DEADLINE_MS}"
PROBES = {"triton_probe_s": 0.3}


def until(condition: Callable[[], bool]) -> None:
    """Asks a hundred times a second: more would take the cores from the servers, which share them."""
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.01)


def _images() -> list[bytes]:
    """16 test images and 16 of noise, as PNG files."""
    preprocessing = BUNDLE.manifest.preprocessing
    pixels = sample_images(preprocessing, labelled_images(DATASET, preprocessing, BUNDLE.manifest.labels), 32)
    files = []
    for each in pixels:
        buffer = io.BytesIO()
        Image.fromarray(each[:, :, 0]).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


IMAGES = _images()
PNG = {"Content-Type": "image/png"}


@contextmanager
def gateway(
    *servers: TritonServer, protocol: str = "grpc", wait: bool = True, **settings: object
) -> Iterator[httpx.Client]:
    urls = ",".join(url_of(server, protocol) for server in servers)
    values = {"backend": "triton", "triton_urls": urls, **PROBES, **settings}
    with serving(BUNDLE, wait=wait, **values) as client:
        yield client


@dataclass
class Load:
    """Clients that send one image after the other until they are told to stop.

    Attributes:
        answers: (status, code of the problem, seconds).
    """

    url: str
    query: str = QUERY
    clients: int = 4
    answers: list[tuple[int, str, float]] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._send, args=(i,)) for i in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, status: int, code: str = "", count: int = 1) -> None:
        """Until so many such answers more have come."""
        start = len(self.answers)
        until(lambda: sum(answer[:2] == (status, code) for answer in self.answers[start:]) >= count)

    def counts(self) -> Counter[tuple[int, str]]:
        return Counter(answer[:2] for answer in self.answers)

    def _send(self, index: int) -> None:
        with httpx.Client(base_url=self.url, timeout=30) as client:
            while not self._stop.is_set():
                started_s = time.perf_counter()
                response = client.post(self.query, content=IMAGES[index], headers=PNG)
                code = "" if response.status_code == 200 else response.json()["code"]
                self.answers.append((response.status_code, code, time.perf_counter() - started_s))
                if code:
                    time.sleep(0.01)  # a refused client that asks again at once would only load the test's machine


def series(client: httpx.Client) -> dict[str, float]:
    """Every sample of /metrics by name and labels."""
    lines = client.get("/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def total(samples: dict[str, float], name: str) -> float:
    return sum(value for key, value in samples.items() if key.partition("{")[0] == name)


def assert_books_balance(client: httpx.Client, load: Load) -> dict[str, float]:
    """Every request was answered, and every image offered is accounted for exactly once."""
    samples = series(client)
    assert total(samples, "vmoe_requests_total") == len(load.answers)
    admitted = total(samples, "vmoe_admitted_images_total")
    assert total(samples, "vmoe_offered_images_total") == admitted + total(samples, "vmoe_shed_images_total")
    ended = sum(total(samples, f"vmoe_{end}_images_total") for end in ("deadline", "cancelled", "failed"))
    assert admitted == ended
    return samples


def stripped(result: dict[str, Any]) -> dict[str, Any]:
    """Without what no two answers share."""
    varying = ("times", "request_id", "deadline_met")
    return {key: value for key, value in result.items() if key not in varying}


def without_probabilities(result: dict[str, Any]) -> dict[str, Any]:
    return result | {"predictions": [prediction["label"] for prediction in result["predictions"]]}


def probabilities(results: list[dict[str, Any]]) -> list[float]:
    return [prediction["probability"] for result in results for prediction in result["predictions"]]


over_both = pytest.mark.parametrize("protocol", PROTOCOLS)


@over_both
@pytest.mark.skipif(not DATASET.is_dir(), reason=f"{DATASET} is missing: apt install dataset-fashion-mnist")
def test_answers_when_the_engine_is_triton_then_they_are_those_of_the_embedded_one(
    triton: TritonServer, protocol: str
) -> None:
    queries = [
        *(f"budget={budget}&deadline_ms=9000" for budget in ("low", "max")),
        "capacity_factor=0.5&num_selected_experts=1&deadline_ms=9000",
        "capacity_factor=0.37&num_selected_experts=2&explain=true&deadline_ms=9000",  # a point of the client's own
        "min_accuracy=0.925&top=10&deadline_ms=9000",
    ]
    answers: list[list[Any]] = []
    with serving(BUNDLE, OrtBackend(BUNDLE, threads=1)) as embedded, gateway(triton, protocol=protocol) as remote:
        for client in (embedded, remote):
            results: list[Any] = [None] * len(queries)

            def ask(position: int, client: httpx.Client = client, results: list[Any] = results) -> None:
                # 32 images a request, at once with those of the other queries: batches are mixed.
                files = [("image", (f"{i}.png", image, "image/png")) for i, image in enumerate(IMAGES)]
                response = client.post(f"/classify?{queries[position]}", files=files)
                assert response.status_code == 200, response.text
                results[position] = [stripped(result) for result in response.json()["results"]]

            threads = [threading.Thread(target=ask, args=(position,)) for position in range(len(queries))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            answers.append(results)
        sizes = {key: value for key, value in series(remote).items() if key.startswith("vmoe_batch_size_bucket")}
        assert sizes['vmoe_batch_size_bucket{le="1.0"}'] < sizes['vmoe_batch_size_bucket{le="+Inf"}'], "nothing shared"
    # Batches are mixed differently, and a matrix product may take another kernel for another size: probabilities agree
    # up to rounding, everything else exactly. Where a policy may choose (min_accuracy), load decides on points.
    for mine, its in zip(answers[0][:4], answers[1][:4], strict=True):
        assert [without_probabilities(result) for result in mine] == [without_probabilities(result) for result in its]
        assert probabilities(mine) == pytest.approx(probabilities(its), abs=1e-5)
    assert len(answers[1][4]) == len(IMAGES)


@over_both
@pytest.mark.parametrize(
    ("update", "message"),
    [
        (
            {"files": {"1/model.onnx": "0" * 64}},
            f"model_sha256 is {DIGEST}.*, expected 0000.*: it serves another export",
        ),
        ({"max_batch_size": 64}, "max_batch_size is 32, expected 64 or more"),
        ({"input": "float32"}, r"input images is UINT8 \[-1, 28, 28, 1\], expected FP32"),
        ({"name": "another"}, "model another is not loaded"),
    ],
)
def test_start_when_the_server_has_another_model_then_the_gateway_stays_unready(
    triton: TritonServer, caplog: pytest.LogCaptureFixture, update: dict[str, object], message: str, protocol: str
) -> None:
    other = Bundle(SHIPPED, BUNDLE.manifest.model_copy(update=update))
    values = {"backend": "triton", "triton_urls": url_of(triton, protocol), **PROBES}
    with caplog.at_level(logging.WARNING), serving(other, wait=False, **values) as client:
        until(lambda: total(series(client), "vmoe_endpoint_failures_total") >= 3)
        assert client.get("/readyz").status_code == 503
        assert client.post(QUERY, content=IMAGES[0], headers=PNG).json()["code"] == "not_ready"
    lines = [record.getMessage() for record in caplog.records if "gets no batches" in record.getMessage()]
    assert re.search(message, lines[0])


def test_start_when_no_server_is_up_then_the_gateway_waits_for_one(victim: TritonServer) -> None:
    victim.kill()
    with gateway(victim, wait=False) as client:
        until(lambda: total(series(client), "vmoe_endpoint_failures_total") >= 2)
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["code"]) == (503, "not_ready")
        victim.start()
        victim.wait_ready()
        wait_ready(client)
        assert client.post(QUERY, content=IMAGES[0], headers=PNG).status_code == 200


def test_stop_when_no_server_ever_came_then_the_gateway_does_not_wait(victim: TritonServer) -> None:
    victim.kill()
    with gateway(victim, wait=False) as client:
        assert client.get("/readyz").status_code == 503
    victim.start()
    victim.wait_ready()


@over_both
def test_kill_when_under_load_then_every_request_is_answered_and_a_restart_heals(
    victim: TritonServer, protocol: str
) -> None:
    with gateway(victim, protocol=protocol) as client, Load(str(client.base_url)) as load:
        load.wait_for(200, count=50)
        victim.kill()
        load.wait_for(503, "backend_unavailable", count=20)
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["code"]) == (503, "backend_unavailable")
        assert series(client)['vmoe_endpoint_state{endpoint="0",state="open"}'] == 1
        victim.start()
        victim.wait_ready()
        load.wait_for(200, count=50)
        assert client.get("/readyz").status_code == 200
        load.__exit__()
        counts = load.counts()
        assert set(counts) <= {(200, ""), (503, "backend_unavailable"), (503, "overloaded"), (504, "deadline_exceeded")}
        samples = assert_books_balance(client, load)
        assert samples['vmoe_endpoint_state{endpoint="0",state="closed"}'] == 1
        assert samples['vmoe_endpoint_failures_total{endpoint="0",reason="refused"}'] > 0
        failed = samples.get('vmoe_failed_images_total{budget="auto",code="backend_unavailable"}', 0)
        shed = samples['vmoe_shed_images_total{budget="auto",reason="backend"}']
        assert failed + shed == counts[503, "backend_unavailable"]


@over_both
def test_hang_when_under_load_then_clients_hear_in_time_and_it_heals_by_itself(
    victim: TritonServer, protocol: str
) -> None:
    with gateway(victim, protocol=protocol) as client, Load(str(client.base_url)) as load:
        load.wait_for(200, count=50)
        victim.pause()
        load.wait_for(503, "backend_unavailable", count=20)
        hung = series(client)
        victim.resume()
        load.wait_for(200, count=50)
        load.__exit__()
        assert_books_balance(client, load)
        assert hung['vmoe_endpoint_failures_total{endpoint="0",reason="hung"}'] > 0
        # 1 s and the 50 ms of grace; the rest is the test's own threads on a busy machine.
        assert max(seconds for *_, seconds in load.answers) < DEADLINE_MS / 1000 + 0.5


def test_kill_when_there_is_another_server_then_nobody_notices(triton: TritonServer, victim: TritonServer) -> None:
    with gateway(triton, victim) as client, Load(str(client.base_url)) as load:
        until(lambda: series(client)['vmoe_endpoint_batches_total{endpoint="1"}'] >= 20)
        victim.kill()
        load.wait_for(200, count=100)
        assert client.get("/readyz").status_code == 200
        victim.start()
        victim.wait_ready()
        before = series(client)['vmoe_endpoint_batches_total{endpoint="1"}']
        until(lambda: series(client)['vmoe_endpoint_batches_total{endpoint="1"}'] >= before + 20)
        load.__exit__()
        samples = assert_books_balance(client, load)
        assert set(load.counts()) <= {(200, ""), (503, "overloaded")}
        # What was in the middle of it, and what found the door closed, went to the other one.
        failures = total(samples, "vmoe_endpoint_failures_total")
        assert failures > 0
        assert samples['vmoe_endpoint_retries_total{endpoint="0"}'] <= failures
        assert samples['vmoe_endpoint_state{endpoint="1",state="closed"}'] == 1


def test_fallback_when_the_server_dies_then_the_gateway_computes_at_the_cheapest_point(victim: TritonServer) -> None:
    with gateway(victim, fallback="embedded", threads=1) as client:
        assert client.post(QUERY, content=IMAGES[0], headers=PNG).json()["reason"] == "ceiling"
        victim.kill()
        while (answer := client.post(QUERY, content=IMAGES[0], headers=PNG).json())["reason"] != "fallback":
            assert answer.get("predictions"), answer
        assert answer["degraded"]
        cheapest = BUNDLE.manifest.points[0]
        assert answer["operating_point"]["capacity_factor"] == cheapest.capacity_factor
        strict = client.post(f"{QUERY}&min_accuracy=0.925", content=IMAGES[0], headers=PNG).json()
        assert strict["operating_point"]["accuracy"] >= 0.925
        assert client.get("/readyz").status_code == 200
        assert series(client)["vmoe_fallback_batches_total"] >= 2
        victim.start()
        victim.wait_ready()
        until(lambda: client.post(QUERY, content=IMAGES[0], headers=PNG).json()["reason"] != "fallback")


@over_both
def test_unload_when_the_server_drops_the_model_then_503_until_it_is_back(
    triton_repository: Path, protocol: str
) -> None:
    arguments = ("--model-control-mode=explicit", f"--load-model={BUNDLE.manifest.name}")
    with (
        TritonServer(triton_repository, arguments=arguments) as server,
        gateway(server, protocol=protocol) as client,
    ):
        control = f"http://{server.http_url}/v2/repository/models/{BUNDLE.manifest.name}"
        httpx.post(f"{control}/unload", timeout=30).raise_for_status()
        until(lambda: client.get("/readyz").status_code != 200)
        answer = client.post(QUERY, content=IMAGES[0], headers=PNG)
        assert (answer.status_code, answer.json()["code"]) == (503, "backend_unavailable")
        assert answer.headers["retry-after"] == "1"
        assert series(client)['vmoe_endpoint_failures_total{endpoint="0",reason="not_ready"}'] > 0
        httpx.post(f"{control}/load", timeout=30).raise_for_status()
        wait_ready(client)
        assert client.post(QUERY, content=IMAGES[0], headers=PNG).status_code == 200
