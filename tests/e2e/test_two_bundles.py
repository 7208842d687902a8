"""The shipped float32 and int8 bundles as one ladder, over HTTP: each answer is that of the graph that it names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exporter.bundle import Bundle
from exporter.session import open_session, run
from server.backends.ort import OrtBackend
from server.backends.several import SeveralBackends
from server.combine import combine
from tests.server.conftest import serving

REPOSITORY = Path(__file__).parents[2] / "model_repository"
SAMPLE = Path(__file__).parents[2] / "examples" / "ankle_boot.png"


def test_images_are_answered_by_the_graph_of_the_rung_that_their_budget_allows() -> None:
    float32, int8 = (Bundle.load(REPOSITORY / f"vmoe-fashion-mnist{suffix}") for suffix in ("", "-int8"))
    bundles = {"": float32, int8.manifest.name: int8}
    combined = combine(float32, [int8])
    backend = SeveralBackends({name: OrtBackend(bundle, threads=1) for name, bundle in bundles.items()})
    pixels = np.asarray(Image.open(SAMPLE).convert("L"))[None, :, :, None]
    with serving(combined.bundle, backend, models=combined.models) as client:
        served = client.get("/v1/models").json()["models"][0]["points"]
        assert {each.get("bundle") for each in served} == {None, int8.manifest.name}  # both have rungs
        for budget in ("low", "max"):
            query = {"budget": budget, "top": 10, "deadline_ms": 10_000}
            answer = client.post("/classify", params=query, files={"image": SAMPLE.read_bytes()}).json()
            named = answer["operating_point"]
            bundle = bundles[named.get("bundle") or ""]
            (point,) = (
                each
                for each in bundle.manifest.points
                if (each.capacity_factor, each.num_selected_experts)
                == (named["capacity_factor"], named["num_selected_experts"])
            )
            (logits,) = run(open_session(bundle.model_path, threads=1), pixels, point, ["logits"])
            expected = np.exp(logits[0]) / np.exp(logits[0]).sum()
            found = {each["index"]: each["probability"] for each in answer["predictions"]}
            assert [found[index] for index in range(10)] == pytest.approx(expected, abs=1e-6)
