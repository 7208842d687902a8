"""The gateway as users start it: 10,000 test images over HTTP give the accuracies that the manifest promises."""

from __future__ import annotations

import gzip
import io
import itertools
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from exporter.bundle import Bundle, frontier

ROOT = Path(__file__).parents[2]
DATASET = Path("/usr/share/datasets/fashion-mnist")  # Debian package dataset-fashion-mnist
START_LIMIT_S = 5.0
IMAGES_PER_REQUEST = 50
CONNECTIONS = 4
# Full requests flood the gateway on purpose: with the default deadline it would refuse most of them.
QUERY = {"top": "1", "deadline_ms": "10000"}

pytestmark = pytest.mark.skipif(not DATASET.is_dir(), reason=f"{DATASET} is missing: apt install dataset-fashion-mnist")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """`python -m server` on a free port; checks how long it takes to get ready, and that it stops cleanly."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    started_s = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "server", "--port", str(port)], cwd=ROOT)
    try:
        url = f"http://127.0.0.1:{port}"
        while not _is_ready(url):
            assert process.poll() is None, "the server stopped before it was ready"
            assert time.monotonic() - started_s < START_LIMIT_S, "not ready in time"
        yield url
        process.terminate()
        # uvicorn raises the signal again once it has stopped cleanly
        assert process.wait(timeout=30) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def test_set() -> tuple[list[bytes], np.ndarray]:
    """The images as PNG files, and their labels."""
    pixels = _read_idx(DATASET / "t10k-images-idx3-ubyte.gz")
    return [_encode(each) for each in pixels], _read_idx(DATASET / "t10k-labels-idx1-ubyte.gz")


@pytest.mark.parametrize(("budget", "index"), [("max", -1), ("low", 0)])
def test_accuracy_when_the_test_set_is_served_then_it_is_the_manifests(
    url: str, test_set: tuple[list[bytes], np.ndarray], budget: str, index: int
) -> None:
    images, labels = test_set
    expected = frontier(Bundle.load(ROOT / "model_repository" / "vmoe-fashion-mnist").manifest.points)[index].accuracy
    assert expected is not None, "the shipped bundle was profiled without images"
    with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(CONNECTIONS) as pool:

        def classify(batch: list[bytes]) -> list[int]:
            files = [("image", (f"{i}.png", image, "image/png")) for i, image in enumerate(batch)]
            response = client.post("/classify", params=QUERY | {"budget": budget}, files=files)
            assert response.status_code == 200, response.text
            return [result["predictions"][0]["index"] for result in response.json()["results"]]

        batches = [images[start : start + IMAGES_PER_REQUEST] for start in range(0, len(images), IMAGES_PER_REQUEST)]
        answers = pool.map(classify, batches)
        predicted = np.array(list(itertools.chain.from_iterable(answers)))
    # 0.001 is ten images: room for near-ties that other hardware rounds the other way.
    assert np.mean(predicted == labels) == pytest.approx(expected, abs=0.001)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.ConnectError:
        return False


def _read_idx(path: Path) -> np.ndarray:
    """IDX: two zero bytes, type 8 (uint8), number of dimensions, big-endian sizes, values in row order."""
    data = gzip.decompress(path.read_bytes())
    zero, kind, rank = struct.unpack(">HBB", data[:4])
    assert (zero, kind) == (0, 8)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(
        struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
    )


def _encode(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
