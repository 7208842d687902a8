"""The HTTP interface around the shipped model. Numbers that depend on its weights come from its manifest."""

from __future__ import annotations

import io
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from exporter.bundle import Bundle, frontier

PNG = {"Content-Type": "image/png"}
# A slot for every token in every one of the 8 experts: above any point of the ladder.
UNMEASURED = {"capacity_factor": 8, "num_selected_experts": 1}
# The machine that runs the tests may be busy with other things. A test of deadlines sets its own.
DEADLINE_MS = 5000
CLASSIFY = f"/classify?deadline_ms={DEADLINE_MS}"


def make_image(seed: int) -> bytes:
    """Noise of the model's size: every seed is routed differently."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (28, 28), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def classify(client: httpx.Client, image: bytes, **query: Any) -> dict[str, Any]:
    response = client.post("/classify", params={"deadline_ms": DEADLINE_MS} | query, content=image, headers=PNG)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def probabilities(answer: dict[str, Any]) -> dict[int, float]:
    return {prediction["index"]: prediction["probability"] for prediction in answer["predictions"]}


def assert_same_predictions(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Equal up to rounding: with another number of rows the runtime may take another matrix kernel (seen: 2e-8)."""
    for mine, theirs in zip(one["predictions"], other["predictions"], strict=True):
        assert (mine["index"], mine["label"]) == (theirs["index"], theirs["label"])
        assert mine["probability"] == pytest.approx(theirs["probability"], abs=1e-5)


def test_answer_when_one_image_is_sent_then_it_has_every_part(client: httpx.Client, shipped: Bundle) -> None:
    manifest = shipped.manifest
    answer = classify(client, make_image(0))
    assert (answer["model"], answer["version"]) == (manifest.name, manifest.version)
    assert len(answer["predictions"]) == 5
    assert all(manifest.labels[each["index"]] == each["label"] for each in answer["predictions"])
    assert len(answer["kept"]) == manifest.num_moe_layers
    assert all(0 <= share <= 1 for share in answer["kept"])
    times = answer["times"]
    assert all(milliseconds >= 0 for milliseconds in times.values())
    assert times["total_ms"] >= times["decode_ms"] + times["queue_ms"] + times["inference_ms"] - 0.01  # rounding
    assert answer["explanation"] is None
    assert (answer["budget"], answer["degraded"], answer["reason"]) == ("auto", False, "ceiling")
    assert answer["deadline_ms"] == DEADLINE_MS


def test_timing_header_when_one_image_is_sent_then_it_has_the_stages_of_the_body(client: httpx.Client) -> None:
    response = client.post(CLASSIFY, content=make_image(0), headers=PNG)
    stages = dict(part.split(";dur=") for part in response.headers["server-timing"].split(", "))
    times = response.json()["times"]
    assert {f"{stage}_ms": float(ms) for stage, ms in stages.items()} == pytest.approx(times, rel=1e-4)


def test_timing_header_when_several_are_sent_then_it_is_that_of_the_slowest(client: httpx.Client) -> None:
    files = [("image", ("x", make_image(seed), "image/png")) for seed in range(3)]
    response = client.post(CLASSIFY, files=[*files, ("image", ("x", b"hello", "image/png"))])
    totals = [result["times"]["total_ms"] for result in response.json()["results"][:3]]
    total = float(response.headers["server-timing"].rpartition("total;dur=")[2])
    assert total == pytest.approx(max(totals), rel=1e-4)


def test_timing_header_when_no_image_was_answered_then_there_is_none(client: httpx.Client) -> None:
    bad = ("image", ("x", b"hello", "image/png"))
    assert "server-timing" not in client.post(CLASSIFY, files=[bad, bad]).headers


def test_predictions_when_all_are_asked_for_then_they_descend_and_sum_to_one(client: httpx.Client) -> None:
    values = [each["probability"] for each in classify(client, make_image(0), top=10)["predictions"]]
    assert values == sorted(values, reverse=True)
    assert sum(values) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(("budget", "index"), [("low", 0), ("max", -1), ("auto", -1)])
def test_operating_point_when_a_budget_is_named_then_it_is_the_manifests(
    client: httpx.Client, shipped: Bundle, budget: str, index: int
) -> None:
    point = frontier(shipped.manifest.points)[index]
    assert classify(client, make_image(0), budget=budget)["operating_point"] == {
        "capacity_factor": point.capacity_factor,
        "num_selected_experts": point.num_selected_experts,
        "slots": list(point.slots),
        "accuracy": point.accuracy,
        "relative_compute": point.relative_compute,
    }


def test_operating_point_when_set_by_hand_to_a_budgets_then_the_answer_is_the_same(
    client: httpx.Client, shipped: Bundle
) -> None:
    point = frontier(shipped.manifest.points)[0]
    by_hand = classify(
        client,
        make_image(0),
        capacity_factor=point.capacity_factor,
        num_selected_experts=point.num_selected_experts,
    )
    named = classify(client, make_image(0), budget="low")
    assert by_hand["operating_point"] == named["operating_point"]
    assert_same_predictions(by_hand, named)


def test_operating_point_when_unmeasured_then_accuracy_is_null(client: httpx.Client) -> None:
    point = classify(client, make_image(0), **UNMEASURED)["operating_point"]
    assert (point["accuracy"], point["relative_compute"]) == (None, None)


def test_operating_point_when_at_the_end_of_the_allowed_range_then_everything_is_kept(
    client: httpx.Client, shipped: Bundle
) -> None:
    moe = shipped.manifest.architecture.moe
    assert moe is not None
    for experts in range(1, shipped.manifest.max_selected_experts + 1):
        query = {"capacity_factor": moe.num_experts / experts, "num_selected_experts": experts}
        assert set(classify(client, make_image(0), **query)["kept"]) == {1.0}


def test_answer_when_sent_as_form_then_it_is_that_of_the_raw_body(client: httpx.Client) -> None:
    image = make_image(1)
    form = client.post(CLASSIFY, files={"image": ("a.png", image, "image/png")}).json()
    assert_same_predictions(form, classify(client, image))


def test_answer_when_requests_of_all_kinds_share_batches_then_it_is_that_of_being_alone(client: httpx.Client) -> None:
    points = [
        {"budget": "low"},
        {"budget": "max"},
        {"capacity_factor": 0.001, "num_selected_experts": 1},
        {"capacity_factor": 4, "num_selected_experts": 2},
    ]
    jobs = [(make_image(seed), points[seed % len(points)] | {"top": 10}) for seed in range(40)]
    alone = [probabilities(classify(client, image, **query)) for image, query in jobs]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda job: probabilities(classify(client, job[0], **job[1])), jobs))
    for one, other in zip(alone, together, strict=True):
        # Matrix products of another height may round differently in the last bits of float32.
        assert one == pytest.approx(other, abs=1e-5)


def test_answers_when_one_of_several_images_is_bad_then_the_others_stand_in_order(client: httpx.Client) -> None:
    images = [make_image(1), b"hello", make_image(2)]
    files = [("image", ("x", image, "image/png")) for image in images]
    response = client.post(f"{CLASSIFY}&budget=max", files=files)  # `auto` may fall to another point on a busy machine
    assert response.status_code == 200
    first, bad, third = response.json()["results"]
    assert_same_predictions(first, classify(client, images[0], budget="max"))
    assert_same_predictions(third, classify(client, images[2], budget="max"))
    assert (bad["error"]["status"], bad["error"]["code"]) == (400, "not_an_image")
    assert bad["error"]["request_id"] == response.headers["x-request-id"]


@pytest.mark.parametrize("query", [{"budget": "low"}, {"budget": "max"}])
def test_explanation_when_asked_for_then_it_accounts_for_every_assignment_kept(
    client: httpx.Client, shipped: Bundle, query: dict[str, str]
) -> None:
    architecture = shipped.manifest.architecture
    answer = classify(client, make_image(3), explain=True, **query)
    explanation, point = answer["explanation"], answer["operating_point"]
    assert explanation["grid"] == list(architecture.grid)
    assert architecture.moe is not None
    assert [each["layer"] for each in explanation["layers"]] == list(architecture.moe.layers)
    assignments = architecture.tokens_per_image * point["num_selected_experts"]
    for layer, kept, slots in zip(explanation["layers"], answer["kept"], point["slots"], strict=True):
        assert [each["expert"] for each in layer["experts"]] == list(range(architecture.moe.num_experts))
        loads = [len(each["patches"]) + bool(each["class_token"]) for each in layer["experts"]]
        assert max(loads) <= slots
        assert sum(loads) == pytest.approx(kept * assignments, abs=1e-3)  # `kept` is rounded to 6 digits
        rows, columns = architecture.grid
        assert all(0 <= r < rows and 0 <= c < columns for each in layer["experts"] for r, c in each["patches"])


@pytest.mark.parametrize(("sent", "kept"), [("abc-123", True), ("x" * 65, False), ("a b", False), ("ü", False)])
def test_request_id_when_sent_then_only_a_sane_one_is_kept(client: httpx.Client, sent: str, kept: bool) -> None:
    response = client.post(CLASSIFY, content=make_image(0), headers=PNG | {"X-Request-ID": sent.encode()})
    assert response.json()["request_id"] == response.headers["x-request-id"]
    assert (response.headers["x-request-id"] == sent) == kept


def test_models_when_listed_then_points_and_budgets_are_the_manifests(client: httpx.Client, shipped: Bundle) -> None:
    (model,) = client.get("/v1/models").json()["models"]
    assert model["labels"] == list(shipped.manifest.labels)
    assert [point["accuracy"] for point in model["points"]] == [point.accuracy for point in shipped.manifest.points]
    assert model["budgets"].keys() == {"low", "medium", "high", "max", "auto"}
    low, full = (
        {
            "capacity_factor": point.capacity_factor,
            "num_selected_experts": point.num_selected_experts,
            "accuracy": point.accuracy,
        }
        for point in (shipped.manifest.points[0], shipped.manifest.points[-1])
    )
    assert model["budgets"]["auto"] == {"floor": low, "ceiling": full, "deadline_ms": 100, "weight": 1}
    assert (model["budgets"]["low"]["ceiling"], model["budgets"]["max"]["floor"]) == (low, full)


def test_openapi_when_fetched_then_errors_have_examples(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    responses = document["paths"]["/classify"]["post"]["responses"]
    assert {"200", "400", "408", "413", "415", "422", "500", "503", "504"} <= responses.keys()
    for status in ("400", "413", "415", "422", "503", "504"):
        content = responses[status]["content"]
        assert content.keys() == {"application/problem+json"}
        for code, example in content["application/problem+json"]["examples"].items():
            assert (example["value"]["code"], example["value"]["status"]) == (code, int(status))
        assert "request_id" in content["application/problem+json"]["schema"]["properties"]
    assert {"overloaded", "over_share", "queue_full"} <= responses["503"]["content"]["application/problem+json"][
        "examples"
    ].keys()
    assert "/v1/admin/policy" not in document["paths"]
    assert client.get("/docs").status_code == 200


def test_openapi_when_fetched_then_every_field_of_every_body_is_described(client: httpx.Client) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert {"Classification", "Model", "PolicyBody", "Provenance", "QueueState"} <= schemas.keys()
    bare = [
        f"{name}.{field}"
        for name, schema in schemas.items()
        for field, described in schema.get("properties", {}).items()
        if not described.get("description")
    ]
    assert bare == []


def scrape(client: httpx.Client) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    response = client.get("/metrics")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_metrics_when_requests_were_served_then_each_series_moved_by_what_happened(
    client: httpx.Client, shipped: Bundle
) -> None:
    before, started_s = scrape(client), time.perf_counter()
    low = frontier(shipped.manifest.points)[0]
    answer = classify(client, make_image(0), budget="low")
    classify(client, make_image(0), **UNMEASURED)
    client.post("/classify?budget=huge", content=make_image(0), headers=PNG)
    client.post("/classify?budget=max", content=b"text", headers=PNG)
    client.get("/classify?budget=max")
    after, elapsed_s = scrape(client), time.perf_counter() - started_s

    def moved(name: str, **labels: str) -> float:
        key = (name, frozenset(labels.items()))
        return after[key] - before.get(key, 0)

    assert moved("vmoe_requests_total", budget="low", status="200") == 1
    assert moved("vmoe_requests_total", budget="custom", status="200") == 1
    assert moved("vmoe_requests_total", budget="invalid", status="422") == 1
    assert moved("vmoe_requests_total", budget="max", status="400") == 1
    assert moved("vmoe_requests_total", budget="invalid", status="405") == 1
    assert moved("vmoe_image_errors_total", code="not_an_image") == 1
    assert moved("vmoe_request_seconds_count", budget="low") == 1
    for stage in ("decode", "queue", "inference", "total"):
        assert moved("vmoe_stage_seconds_count", stage=stage) == 2
    # Its thread alone: it may have been busy all the time, and not longer.
    assert 0 < moved("vmoe_event_loop_cpu_seconds_total") <= elapsed_s
    assert 0 < moved("vmoe_event_loop_decode_cpu_seconds_total") < moved("vmoe_event_loop_cpu_seconds_total")
    assert moved("vmoe_batch_size_count") == 2
    assert moved("vmoe_batch_size_sum") == 2
    assert moved("vmoe_served_images_total", operating_point=str(low.operating_point), budget="low") == 1
    assert moved("vmoe_served_images_total", operating_point="custom", budget="custom") == 1
    assert moved("vmoe_offered_images_total", budget="low") == moved("vmoe_admitted_images_total", budget="low") == 1
    assert moved("vmoe_deadline_images_total", budget="low", outcome="met") == 1
    assert moved("vmoe_effective_accuracy_total", budget="low") == pytest.approx(low.accuracy)
    assert moved("vmoe_degraded_images_total", budget="low") == 0
    assert moved("vmoe_decision_seconds_count") == moved("vmoe_batch_latency_ratio_count") == 2
    assert moved("vmoe_capacity_factor_sum") == pytest.approx(low.capacity_factor + 8)
    assert moved("vmoe_num_selected_experts_sum") == low.num_selected_experts + 1
    moe, num_tokens = shipped.manifest.architecture.moe, shipped.manifest.architecture.tokens_per_image
    assert moe is not None
    for layer, kept in zip(moe.layers, answer["kept"], strict=True):
        assert moved("vmoe_kept_ratio_count", layer=str(layer)) == 2
        tokens = sum(moved("vmoe_expert_tokens_total", layer=str(layer), expert=str(e)) for e in range(moe.num_experts))
        # What the low request kept, and every token once for the other one. `kept` is rounded to 6 digits.
        assert tokens == pytest.approx((kept * low.num_selected_experts + 1) * num_tokens, abs=1e-3)
    assert after["vmoe_in_flight_requests", frozenset()] == 0
    assert all(name.startswith("vmoe_") for name, _ in after)
