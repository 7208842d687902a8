"""Two bundles of one model, float32 and int8, as one ladder: its order, and where its images run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from pydantic import ValidationError

from exporter.bundle import Bundle, BundleError, Latency, Manifest, Profile
from server.backends.base import Batch, Outputs
from server.backends.choice import create_backend
from server.backends.several import SeveralBackends
from server.combine import combine
from server.ladder import Ladder
from server.latency import LatencyModel
from server.pinned_point import pin
from server.settings import Settings
from tests.server.conftest import FakeBackend, serving, small_manifest

PROFILE = Profile(machine="a machine", runtime="onnxruntime", threads=1, date="2026-11-27")
SIZES = (1, 8)


def bundle(name: str, milliseconds: Sequence[float], accuracies: Sequence[float | None], **changes: object) -> Bundle:
    """Points (0.5, 1), (0.5, 2), (1, 1), (1, 2) with these times, of one image and eightfold of eight."""
    manifest = small_manifest()
    points = [
        point.model_copy(
            update={
                "accuracy": accuracy,
                "latency": tuple(Latency(batch_size=n, median_s=n * ms / 1000, p99_s=n * ms / 900) for n in SIZES),
            }
        )
        for point, ms, accuracy in zip(manifest.points, milliseconds, accuracies, strict=True)
    ]
    update = {"name": name, "points": tuple(points), "profile": PROFILE} | changes
    return Bundle(Path(name), manifest.model_copy(update=update), "hash")


FLOAT32 = bundle("small", (4, 5, 6, 10), (0.80, 0.79, 0.85, 0.90))
INT8 = bundle("small-int8", (2, 3, 5, 12), (0.80, 0.78, 0.86, 0.95))


def test_points_of_both_are_in_order_of_time_below_the_served_full_point() -> None:
    combined = combine(FLOAT32, [INT8])
    points = combined.bundle.manifest.points
    found = [
        (point.relative_compute, str(point.operating_point), model, point.dominated)
        for point, model in zip(points, combined.models, strict=True)
    ]
    # The int8 point that takes longer than the full one is left out, however accurate it claims to be.
    assert found == [
        (pytest.approx(0.2), "(0.5, 1)", "small-int8", False),
        (pytest.approx(0.3), "(0.5, 2)", "small-int8", True),
        (pytest.approx(0.4), "(0.5, 1)", "", True),  # as accurate as the first
        (pytest.approx(0.5), "(0.5, 2)", "", True),
        (pytest.approx(0.5), "(1, 1)", "small-int8", False),
        (pytest.approx(0.6), "(1, 1)", "", True),
        (1.0, "(1, 2)", "", False),
    ]
    latency = LatencyModel.of(points, max_batch_size=8)
    assert latency is not None
    assert latency.uniform_s(0, 1) == pytest.approx(0.002)
    assert latency.uniform_s(6, 8) == pytest.approx(0.080)
    assert combined.bundle.manifest_sha256 == ""


def test_single_bundle_stays_as_it_is() -> None:
    combined = combine(FLOAT32, [])
    assert combined.bundle is FLOAT32
    assert set(combined.models) == {""}


def test_point_that_a_client_spells_out_is_the_served_bundles() -> None:
    combined = combine(FLOAT32, [bundle("small-int8", (2, 3, 5, 8), (0.80, 0.78, 0.86, 0.89))])
    assert combined.models[-2:] == ("small-int8", "")  # both (1, 2)
    manifest = combined.bundle.manifest
    ladder = Ladder.of(manifest, combined.models)
    rung, charged = pin(manifest, ladder, 1.0, 1)
    assert (rung.model, rung.accuracy, charged) == ("", 0.85, 5)
    # Off the ladder, with three slots (5 * 2 / 4 = 2.5): as the cheapest of that bundle with as many, (1, 2) at 7,
    # not the int8 one at 6.
    rung, charged = pin(manifest, ladder, 2.0, 1)
    assert (rung.model, rung.slots, charged) == ("", (3,), 7)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (bundle("b", (1, 2, 3, 4), (0.8,) * 4, labels=("a", "b", "c", "e")), "b has another labels than small"),
        (bundle("small", (1, 2, 3, 4), (0.8,) * 4), "have the same name, small"),
        (
            bundle("b", (1, 2, 3, 4), (0.8,) * 4, profile=PROFILE.model_copy(update={"threads": 2})),
            "b was profiled on a machine with 2 threads, small on a machine with 1 threads",
        ),
        (bundle("b", (1, 2, 3, 4), (0.8,) * 4, points=small_manifest().points), "need latencies of the same batch"),
        (bundle("b", (1, 2, 3, 4), (None,) * 4), "b was exported without accuracies"),
    ],
)
def test_bundles_that_cannot_be_compared_are_refused(other: Bundle, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        combine(FLOAT32, [other])


def test_dense_bundles_are_refused() -> None:
    dense = Bundle(Path("dense"), small_manifest(dense=True))
    with pytest.raises(BundleError, match="need latencies"):
        combine(dense, [INT8])


def test_further_bundles_need_the_embedded_backend() -> None:
    with pytest.raises(ValidationError, match=r"also \(b\) needs backend embedded, got triton"):
        Settings(also="b", backend="triton")


class NamedBackend(FakeBackend):
    """Its `kept` tells the images that it ran."""

    def __init__(self, kept: float) -> None:
        super().__init__()
        self.kept = kept

    async def infer(self, batch: Batch) -> Outputs:
        found = await super().infer(batch)
        return Outputs(found.logits, np.full_like(found.kept, self.kept), found.expert_load, found.token_experts)


def test_batch_of_both_runs_each_image_on_its_bundle_and_keeps_the_order() -> None:
    exact, coarse = NamedBackend(0.25), NamedBackend(0.75)
    images = np.zeros((4, 8, 8, 1), np.uint8)
    images[:, 0, 0, 0] = (3, 1, 0, 2)
    models = ("b", "", "b", "")
    batch = Batch(images, np.ones((4, 1), np.int64), np.ones((4, 1), np.int64), explain=True, models=models)
    outputs = asyncio.run(SeveralBackends({"": exact, "b": coarse}).infer(batch))
    assert outputs.logits.argmax(1).tolist() == [3, 1, 0, 2]
    assert outputs.kept[:, 0].tolist() == [0.75, 0.25, 0.75, 0.25]
    assert outputs.token_experts is not None
    assert len(outputs.token_experts) == 4
    assert [len(backend.batches[0].images) for backend in (exact, coarse)] == [2, 2]


def test_gateway_answers_cheap_requests_from_int8_and_full_ones_from_float32() -> None:
    combined = combine(FLOAT32, [INT8])
    exact, coarse = NamedBackend(0.25), NamedBackend(0.75)
    backend = SeveralBackends({"": exact, "small-int8": coarse})
    image = (Path(__file__).parents[2] / "examples" / "ankle_boot.png").read_bytes()
    with serving(combined.bundle, backend, models=combined.models) as client:

        def point(query: str) -> dict[str, object]:
            response = client.post(f"/classify?{query}", content=image, headers={"Content-Type": "image/png"})
            assert response.status_code == 200, response.text
            answer = response.json()
            assert answer["kept"] == [0.75 if "bundle" in answer["operating_point"] else 0.25]
            return dict(answer["operating_point"])

        low, full = point("budget=low"), point("budget=max")
        assert (low["bundle"], low["capacity_factor"], low["accuracy"]) == ("small-int8", 0.5, 0.80)
        assert "bundle" not in full
        assert "bundle" not in point("capacity_factor=1&num_selected_experts=1")
        points = client.get("/v1/models").json()["models"][0]["points"]
        assert [each.get("bundle") for each in points] == [model or None for model in combined.models]
        served = 'vmoe_served_images_total{budget="low",operating_point="(0.5, 1) small-int8"} 1.0'
        assert served in client.get("/metrics").text
    assert exact.closed
    assert coarse.closed


def test_shipped_bundle_and_a_copy_answer_the_same_through_both_sessions(shipped: Bundle) -> None:
    copy = Bundle(shipped.directory, shipped.manifest.model_copy(update={"name": "copy"}))
    backend = create_backend(Settings(threads=1), shipped, CollectorRegistry(), [copy])
    point = shipped.manifest.points[0]
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), np.uint8)

    def logits(models: tuple[str, ...]) -> np.ndarray:
        slots, selected = np.tile(np.array(point.slots), (3, 1)), np.full((3, 1), point.num_selected_experts)
        return asyncio.run(backend.infer(Batch(images, slots, selected, explain=False, models=models))).logits

    # An expert that serves one token alone adds in another order than for several; 1e-6 is what batches may differ by.
    np.testing.assert_allclose(logits(("", "copy", "")), logits(("", "", "")), rtol=0, atol=1e-6)
    asyncio.run(backend.close())


def test_manifest_of_one_bundle_is_not_changed_by_combining() -> None:
    before: Manifest = FLOAT32.manifest.model_copy(deep=True)
    combine(FLOAT32, [INT8])
    assert before == FLOAT32.manifest
