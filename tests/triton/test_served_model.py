"""The shipped model in a real Triton server: same tensors, same answers, clear refusals."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.grpc as triton_client
from tritonclient.utils import InferenceServerException

from exporter.bundle import Bundle, frontier
from exporter.measure import labelled_images, sample_images
from exporter.session import open_session
from exporter.tensors import graph_inputs, graph_outputs
from tests.triton.conftest import SHIPPED
from tests.triton_server import TritonServer, TritonServerError, python_repository

BUNDLE = Bundle.load(SHIPPED)
NAME = BUNDLE.manifest.name
OUTPUTS = [tensor.name for tensor in graph_outputs(BUNDLE.manifest)]
DATASET = Path("/usr/share/datasets/fashion-mnist")
TYPES = {"uint8": "UINT8", "int64": "INT64", "float32": "FP32"}

Feeds = dict[str, npt.NDArray[np.generic]]


@pytest.fixture(scope="module")
def client(triton: TritonServer) -> Iterator[Any]:
    with triton_client.InferenceServerClient(triton.grpc_url) as connected:
        yield connected


@pytest.fixture(scope="module")
def images() -> npt.NDArray[np.uint8]:
    """(32, 28, 28, 1): 16 test images, then noise."""
    manifest = BUNDLE.manifest
    return sample_images(manifest.preprocessing, labelled_images(DATASET, manifest.preprocessing, manifest.labels), 32)


def feeds(images: npt.NDArray[np.uint8], points: list[int]) -> Feeds:
    """Inputs of a batch whose i-th image is served at the frontier's point number points[i % len(points)]."""
    ladder = frontier(BUNDLE.manifest.points)
    chosen = [ladder[points[index % len(points)]] for index in range(len(images))]
    return {
        "images": images,
        "slots": np.array([point.slots for point in chosen], np.int64),
        "num_selected_experts": np.array([[point.num_selected_experts] for point in chosen], np.int64),
    }


def sent(inputs: Feeds) -> list[Any]:
    tensors = []
    for name, value in inputs.items():
        tensor = triton_client.InferInput(name, list(value.shape), TYPES[value.dtype.name])
        tensor.set_data_from_numpy(value)
        tensors.append(tensor)
    return tensors


def infer(client: Any, inputs: Feeds, outputs: list[str] | None = None, **options: Any) -> dict[str, Any]:
    wanted = None if outputs is None else [triton_client.InferRequestedOutput(name) for name in outputs]
    result = client.infer(NAME, sent(inputs), outputs=wanted, **options)
    return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}


def embedded(inputs: Feeds) -> dict[str, Any]:
    return dict(zip(OUTPUTS, open_session(BUNDLE.model_path, 1).run(OUTPUTS, inputs), strict=True))


def test_metadata_of_the_server_is_the_manifests(client: Any) -> None:
    metadata = client.get_model_metadata(NAME)
    for expected, found in (
        (graph_inputs(BUNDLE.manifest), metadata.inputs),
        (graph_outputs(BUNDLE.manifest), metadata.outputs),
    ):
        assert [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in found] == [
            (tensor.name, TYPES[tensor.dtype], [-1, *tensor.dims]) for tensor in expected
        ]
    assert list(metadata.versions) == [BUNDLE.manifest.version]
    config = client.get_model_config(NAME).config
    assert config.parameters["model_sha256"].string_value == BUNDLE.manifest.files["1/model.onnx"]
    assert config.max_batch_size == BUNDLE.manifest.max_batch_size


@pytest.mark.parametrize("points", [[0], [3], [-1], [0, -1, 2]], ids=["cheapest", "middle", "full", "mixed"])
@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_answers_equal_the_embedded_engines(
    client: Any, images: npt.NDArray[np.uint8], points: list[int], batch_size: int
) -> None:
    inputs = feeds(images[:batch_size], points)
    expected, found = embedded(inputs), infer(client, inputs)
    assert list(found) == OUTPUTS
    for name in OUTPUTS:  # the same runtime with as many threads: bit by bit
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_labels_of_real_images_come_with_the_answer(client: Any, images: npt.NDArray[np.uint8]) -> None:
    inputs = feeds(images[:1], [-1])
    asked = [triton_client.InferRequestedOutput("logits", class_count=1)]
    answer = client.infer(NAME, sent(inputs), outputs=asked).as_numpy("logits")
    score, index, label = answer[0, 0].decode().split(":", 2)
    assert (int(index), label) == (9, "Ankle boot")  # the first test image of Fashion-MNIST
    assert float(score) == pytest.approx(embedded(inputs)["logits"].max(), rel=1e-4)  # Triton prints six decimals


@pytest.mark.parametrize("names", [["logits"], ["token_experts", "logits"], ["expert_load"]])
def test_only_requested_outputs_come_back(client: Any, images: npt.NDArray[np.uint8], names: list[str]) -> None:
    inputs = feeds(images[:2], [-1])
    found, expected = infer(client, inputs, names), embedded(inputs)
    assert sorted(found) == sorted(names)
    for name in names:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((2, 27, 28, 1), np.uint8)}, r"unexpected shape for input 'images'.*\[-1,28,28,1\]"),
        ({"images": np.zeros((2, 28, 28, 1), np.float32)}, "data-type.*'images'|'images'.*data-type"),
        ({"slots": np.ones((1, 4), np.int64)}, "input 'slots' batch size does not match"),
        ({"slots": np.ones((2, 3), np.int64)}, "unexpected shape for input 'slots'"),
        ({"num_selected_experts": None}, r"missing required input\(s\) \['num_selected_experts'\]"),
        ({"images": np.zeros((33, 28, 28, 1), np.uint8)}, "batch-size must be <= 32"),
    ],
)
def test_wrong_input_is_refused_by_the_server(
    client: Any, images: npt.NDArray[np.uint8], change: dict[str, Any], message: str
) -> None:
    rows = len(change["images"]) if "images" in change else 2
    inputs = feeds(np.zeros((rows, 28, 28, 1), np.uint8), [0]) | change
    with pytest.raises(InferenceServerException, match=message) as caught:
        infer(client, {name: value for name, value in inputs.items() if value is not None})
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert infer(client, feeds(images[:1], [0]))  # and the next request is served


def test_unknown_output_is_refused_by_the_server(client: Any, images: npt.NDArray[np.uint8]) -> None:
    with pytest.raises(InferenceServerException, match="unexpected inference output 'probabilities'"):
        infer(client, feeds(images[:1], [0]), ["probabilities"])


def test_every_point_and_batch_size_was_run_before_the_server_said_ready(triton_repository: Path) -> None:
    with (
        TritonServer(triton_repository) as server,
        triton_client.InferenceServerClient(server.grpc_url) as client,
    ):
        (statistics,) = client.get_inference_statistics(NAME).model_stats
        runs = {entry.batch_size: entry.compute_infer.count for entry in statistics.batch_stats}
    points = len(frontier(BUNDLE.manifest.points))
    assert runs == dict.fromkeys((1, 2, 4, 8, 16, 32), points)


def test_requests_that_wait_are_not_merged(client: Any, images: npt.NDArray[np.uint8]) -> None:
    def counts() -> tuple[int, int]:
        (statistics,) = client.get_inference_statistics(NAME).model_stats
        return statistics.inference_count, statistics.execution_count

    before = counts()
    inputs = feeds(images[:8], [0, -1])
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: infer(client, inputs, ["logits"])["logits"], range(24)))
    after = counts()
    # 24 requests of 8 images on one instance: most of them waited, and Triton would have made runs of 32 of them.
    assert (after[0] - before[0], after[1] - before[1]) == (192, 24)
    assert all(np.array_equal(answer, answers[0]) for answer in answers)


def test_request_whose_client_gives_up_while_it_waits_is_not_run(client: Any, images: npt.NDArray[np.uint8]) -> None:
    def executions() -> int:
        (statistics,) = client.get_inference_statistics(NAME).model_stats
        return int(statistics.execution_count)

    inputs = feeds(images, [-1])

    def outcome(_: int) -> str:
        try:
            infer(client, inputs, ["logits"], client_timeout=0.02)  # less than one of these takes
        except InferenceServerException as error:
            return str(error.status())
        return "answered"

    before = executions()
    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(outcome, range(16)))
    infer(client, inputs, ["logits"])  # behind all of them
    assert set(outcomes) <= {"answered", "StatusCode.DEADLINE_EXCEEDED"}
    assert executions() - before < 16


def test_request_is_never_left_lying_in_the_servers_queue(client: Any, images: npt.NDArray[np.uint8]) -> None:
    """With a queue policy, one request in five took 0.5 s, after which the batcher of 2.51 looks again by itself."""
    inputs = feeds(images[:4], [0, -1])

    def seconds(_: int) -> float:
        started_s = time.perf_counter()
        infer(client, inputs, ["logits"])
        return time.perf_counter() - started_s

    with ThreadPoolExecutor(2) as pool:
        slow = [taken for taken in pool.map(seconds, range(300)) if taken > 0.45]
    assert len(slow) < 20  # it was 60; a busy machine stalls now and then, too


def test_graph_that_config_pbtxt_was_not_written_for_is_not_loaded(tmp_path: Path) -> None:
    repository = python_repository(SHIPPED, tmp_path)
    model = repository / NAME / "1" / "model.onnx"
    content = model.read_bytes()
    model.unlink()  # a hard link to the shipped graph
    model.write_bytes(content + b"\0")
    with pytest.raises(TritonServerError, match="was written for"), TritonServer(repository):
        pass


def test_two_instances_serve_the_same_answers(tmp_path: Path, images: npt.NDArray[np.uint8]) -> None:
    repository = python_repository(SHIPPED, tmp_path)
    config = repository / NAME / "config.pbtxt"
    config.write_text(config.read_text().replace("count: 1 kind", "count: 2 kind"))
    inputs = feeds(images[:4], [0, -1])
    expected = embedded(inputs)["logits"]
    with (
        TritonServer(repository) as server,
        triton_client.InferenceServerClient(server.grpc_url) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        for answer in pool.map(lambda _: infer(client, inputs, ["logits"])["logits"], range(8)):
            np.testing.assert_array_equal(answer, expected)
