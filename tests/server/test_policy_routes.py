"""The policy over HTTP: shown, reloaded with a key, and what it does to requests."""

from __future__ import annotations

import io
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from exporter.bundle import Bundle, Latency, Manifest
from server.ladder import Ladder
from server.policies.foresight import ForesightConfig
from server.policy_file import PolicyConfig, parse_policy
from server.policy_source import POSTED
from tests.server.test_errors import assert_problem

ROOT = Path(__file__).parents[2]
KEY = "open sesame"
BEARER = {"Authorization": f"Bearer {KEY}"}


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 2).save(buffer, "PNG")
    return buffer.getvalue()


IMAGE: dict[str, Any] = {"content": _png(), "headers": {"Content-Type": "image/png"}}


def test_policy_when_asked_for_then_it_shows_what_is_in_force_and_the_queue(serve_fake: Any, backend: Any) -> None:
    with serve_fake() as client:
        body = client.get("/v1/policy").json()
        assert (body["policy"], body["source"]) == ("foresight", "default (foresight)")
        assert body["quantile"] == PolicyConfig().quantile
        assert body["parameters"].keys() == ForesightConfig.model_fields.keys()
        # The small model has no profile, hence a deadline of 1 s; its ladder ends at 0.80 and 0.90.
        assert body["budgets"]["auto"] == {
            "floor": {"capacity_factor": 0.5, "num_selected_experts": 1, "accuracy": 0.8},
            "ceiling": {"capacity_factor": 1.0, "num_selected_experts": 2, "accuracy": 0.9},
            "deadline_ms": 1000,
            "weight": 1,
        }
        assert (body["max_batch_size"], body["workers"]) == (8, 1)
        assert body["state"]["waiting_images"] == body["state"]["running_batches"] == 0
        backend.gate.clear()
        requests = [threading.Thread(target=client.post, args=("/classify",), kwargs=IMAGE) for _ in range(3)]
        requests[0].start()
        while not backend.batches:
            os.sched_yield()
        for request in requests[1:]:
            request.start()
        while (state := client.get("/v1/policy").json()["state"])["waiting_images"] < 2:
            os.sched_yield()
        assert (state["running_batches"], state["waiting_bytes"]) == (1, 128)  # 8 x 8 pixels each
        assert state["oldest_ms"] > 0
        backend.gate.set()
        for request in requests:
            request.join()


def test_policy_when_the_model_is_dense_then_budgets_have_no_points(serve_fake: Any, dense_manifest: Manifest) -> None:
    with serve_fake(dense_manifest) as client:
        assert client.get("/v1/policy").json()["budgets"]["low"]["ceiling"] is None
        answer = client.post("/classify", **IMAGE).json()
        assert (answer["operating_point"], answer["degraded"], answer["reason"]) == (None, False, "ceiling")


def test_reload_when_no_key_is_set_then_the_route_does_not_exist(serve_fake: Any) -> None:
    with serve_fake() as client:
        assert_problem(client.post("/v1/admin/policy", headers={"Authorization": "Bearer x"}), 404, "not_found")


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}, {"Authorization": KEY}]
)
def test_reload_when_the_key_is_wrong_then_401_and_nothing_changes(
    serve_fake: Any, tmp_path: Path, headers: dict[str, str]
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('policy = "fixed"')
    with serve_fake(admin_key=KEY, policy=str(policy)) as client:
        policy.write_text('policy = "aimd"')
        response = client.post("/v1/admin/policy", headers=headers)
        assert KEY not in assert_problem(response, 401, "unauthorized")["detail"]
        assert response.headers["www-authenticate"] == "Bearer"
        assert client.get("/v1/policy").json()["policy"] == "fixed"


def test_reload_when_the_file_is_good_then_its_budgets_serve_the_next_request(serve_fake: Any, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('policy = "fixed"')
    with serve_fake(admin_key=KEY, policy=str(policy)) as client:
        assert_problem(client.post("/classify?budget=edge", **IMAGE), 422, "invalid_parameter")
        policy.write_text('policy = "aimd"\nquantile = 0.9\n[budgets.edge]\nceiling = "1,1"\ndeadline_ms = 700')
        body = client.post("/v1/admin/policy", headers=BEARER).json()
        assert (body["policy"], body["quantile"], body["source"]) == ("aimd", 0.9, str(policy))
        answer = client.post("/classify?budget=edge", **IMAGE).json()
        assert (answer["budget"], answer["deadline_ms"]) == ("edge", 700)
        assert answer["operating_point"]["slots"] == [2]
        assert 'vmoe_admitted_images_total{budget="edge"} 1.0' in client.get("/metrics").text


def test_reload_when_the_file_is_bad_then_422_with_its_line_and_the_old_one_stays(
    serve_fake: Any, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('policy = "fixed"')
    with serve_fake(admin_key=KEY, policy=str(policy)) as client:
        for text, complaint in (
            ('policy = "fixed"\n[budgets.auto]\nfloor = "9,9"', "line 2: floor of budget 'auto' must be"),
            ('policy = "fixed"\nspeed = 1', "line 2: speed: unknown; known are policy, quantile"),
            ("policy = \n", "line 1"),
        ):
            policy.write_text(text)
            problem = client.post("/v1/admin/policy", headers=BEARER)
            assert (problem.status_code, problem.json()["code"]) == (422, "invalid_policy")
            assert complaint in problem.json()["detail"]
        policy.unlink()
        assert client.post("/v1/admin/policy", headers=BEARER).status_code == 422
        assert client.get("/v1/policy").json()["policy"] == "fixed"


def test_reload_when_the_policy_is_a_name_then_422_says_why(serve_fake: Any) -> None:
    with serve_fake(admin_key=KEY, policy="fixed") as client:
        problem = client.post("/v1/admin/policy", headers=BEARER)
        assert "no file to read again" in assert_problem(problem, 422, "invalid_policy")["detail"]


def test_posted_policy_when_good_then_it_is_in_force_until_the_file_is_asked_for(
    serve_fake: Any, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('policy = "fixed"  # ours\n')
    text = 'policy = "aimd"\n[aimd]\ndecrease = 0.25\n[budgets.edge]\ndeadline_ms = 700\n'
    with serve_fake(admin_key=KEY, policy=str(policy)) as client:
        assert client.get("/v1/admin/policy", headers=BEARER).text == policy.read_text()
        for leave in ("DELETE", "POST"):
            body = client.post("/v1/admin/policy", headers=BEARER, content=text).json()
            assert (body["policy"], body["parameters"]["decrease"], body["source"]) == ("aimd", 0.25, POSTED)
            assert client.get("/v1/policy").json()["budgets"]["edge"]["deadline_ms"] == 700
            assert client.get("/v1/admin/policy", headers=BEARER).text == text
            assert client.post("/classify?budget=edge", **IMAGE).json()["budget"] == "edge"
            assert client.request(leave, "/v1/admin/policy", headers=BEARER).json()["source"] == str(policy)
            assert client.get("/v1/policy").json()["policy"] == "fixed"


def test_posted_policy_when_the_setting_is_a_name_then_delete_returns_to_it(serve_fake: Any) -> None:
    with serve_fake(admin_key=KEY, policy="fixed") as client:
        client.post("/v1/admin/policy", headers=BEARER, content='policy = "aimd"')
        assert client.delete("/v1/admin/policy", headers=BEARER).json()["source"] == "default (fixed)"
        # The text of a default gives it again.
        text = client.get("/v1/admin/policy", headers=BEARER).text
        assert client.post("/v1/admin/policy", headers=BEARER, content=text).json()["policy"] == "fixed"


@pytest.mark.parametrize(
    ("content", "status", "code", "complaint"),
    [
        (b'policy = "fixed"\nspeed = 1', 422, "invalid_policy", "POST /v1/admin/policy, line 2: speed: unknown; known"),
        (b"policy = \n", 422, "invalid_policy", "is not TOML"),
        (b"\xff", 422, "invalid_policy", "must be UTF-8, byte 0 is not"),
        (b"[provenance]\nmanifest_sha256 = '" + b"b" * 64 + b"'", 422, "invalid_policy", "tuned for the manifest"),
        (b"#" * ((1 << 16) + 1), 413, "body_too_large", "at most 65536 are accepted"),
    ],
)
def test_posted_policy_when_bad_then_the_problem_says_why_and_the_old_one_stays(
    serve_fake: Any, content: bytes, status: int, code: str, complaint: str
) -> None:
    with serve_fake(admin_key=KEY, policy="fixed") as client:
        response = client.post("/v1/admin/policy", headers=BEARER, content=content)
        assert complaint in assert_problem(response, status, code)["detail"]
        assert client.get("/v1/policy").json()["policy"] == "fixed"


def test_posted_policy_when_tuned_then_its_provenance_is_shown(serve_fake: Any) -> None:
    expected = "[[provenance.expected]]\nload = 1.5\neffective_accuracy = 0.9"
    text = f'[provenance]\nmanifest_sha256 = "{"b" * 64}"\nversions = {{ python = "3.11" }}\n{expected}'
    with serve_fake(admin_key=KEY, force_policy=True) as client:
        assert client.get("/v1/policy").json()["provenance"] is None
        found = client.post("/v1/admin/policy", headers=BEARER, content=text).json()["provenance"]
        assert (found["manifest_sha256"], found["versions"]) == ("b" * 64, {"python": "3.11"})
        assert (found["expected"][0]["load"], found["expected"][0]["effective_accuracy"]) == (1.5, 0.9)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_admin_policy_when_the_key_is_missing_then_401(serve_fake: Any, method: str) -> None:
    with serve_fake(admin_key=KEY) as client:
        assert_problem(client.request(method, "/v1/admin/policy"), 401, "unauthorized")


def test_classify_when_an_idle_gateway_cannot_meet_the_deadline_then_504_before_anything_is_decoded(
    serve_fake: Any, manifest: Manifest
) -> None:
    # A profile of 5 s per image. The fake is faster, of which the warm-up convinces the latency model only partly.
    slow = (Latency(batch_size=1, median_s=5, p99_s=5.1),)
    points = tuple(point.model_copy(update={"latency": slow}) for point in manifest.points)
    with serve_fake(manifest.model_copy(update={"points": points})) as client:
        response = client.post("/classify?deadline_ms=1000", content=b"no image", headers=IMAGE["headers"])
        problem = assert_problem(response, 504, "deadline_exceeded")
        assert (
            "on an idle gateway, at the cheapest operating point allowed, and 1000 ms are allowed" in problem["detail"]
        )
        assert "retry-after" not in response.headers
        metrics = client.get("/metrics").text
        assert 'vmoe_offered_images_total{budget="auto"} 1.0' in metrics
        assert 'vmoe_shed_images_total{budget="auto",reason="too_short"} 1.0' in metrics
        assert 'vmoe_admitted_images_total{budget="auto"} 0.0' in metrics


def test_classify_when_a_form_is_too_large_for_its_deadline_then_it_is_refused_as_a_whole(
    serve_fake: Any, backend: Any, manifest: Manifest
) -> None:
    slow = (Latency(batch_size=1, median_s=5, p99_s=5.1),)
    points = tuple(point.model_copy(update={"latency": slow}) for point in manifest.points)
    with serve_fake(manifest.model_copy(update={"points": points}), request_timeout_s=60) as client:
        files = [("image", ("a", b"no image"))] * 64
        detail = assert_problem(client.post("/classify?deadline_ms=20000", files=files), 504, "deadline_exceeded")[
            "detail"
        ]
        assert detail.startswith("64 images take longer than the 20000 ms allowed even on an idle gateway")
        assert not backend.batches
        metrics = client.get("/metrics").text
        assert 'vmoe_offered_images_total{budget="auto"} 64.0' in metrics
        assert 'vmoe_shed_images_total{budget="auto",reason="too_short"} 64.0' in metrics


def test_classify_when_a_request_became_late_in_the_queue_then_504(serve_fake: Any, backend: Any) -> None:
    with serve_fake() as client:
        backend.gate.clear()
        first = threading.Thread(target=client.post, args=("/classify?deadline_ms=9000",), kwargs=IMAGE)
        first.start()
        while not backend.batches:
            os.sched_yield()
        late = client.post("/classify?deadline_ms=200", **IMAGE)
        assert_problem(late, 504, "deadline_exceeded")
        assert not backend.gate.is_set()  # the batch that made it late still runs
        backend.gate.set()
        first.join()


def test_classify_when_the_answer_comes_late_then_it_is_given_and_says_so(serve_fake: Any, backend: Any) -> None:
    with serve_fake() as client:
        backend.late = True
        answer = client.post("/classify?deadline_ms=500", **IMAGE)
        assert (answer.status_code, answer.json()["deadline_met"]) == (200, False)
        assert 'vmoe_deadline_images_total{budget="auto",outcome="missed"} 1.0' in client.get("/metrics").text


def test_policy_file_of_the_readme_when_read_for_the_shipped_bundle_then_it_is_valid(shipped: Bundle) -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    active = parse_policy(text, shipped.manifest, Ladder.of(shipped.manifest), "README.md")
    assert active.budgets["thumbnails"].deadline_s == 0.5
    assert (active.budgets["auto"].floor, active.budgets["auto"].deadline_s) == (1, 0.08)
