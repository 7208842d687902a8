"""Finalists at a real gateway: what they do there, and that the policy in force before always comes back."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from exporter.bundle import Bundle, write_manifest
from loadtest.cli import app
from loadtest.errors import LoadtestError, TargetError
from loadtest.recorder import Tally
from loadtest.trace import write_trace
from loadtest.tuner.confirmation import Administrator, confirm
from server.backends.ort import OrtBackend
from server.policy_source import POSTED
from tests.loadtest.conftest import SHIPPED, poisson_trace
from tests.server.conftest import serving

KEY = "open sesame"
BEARER = {"Authorization": f"Bearer {KEY}"}
TRIED = 'policy = "fixed"\n[budgets.auto]\nceiling = "cheapest"\nfloor = "cheapest"\n'


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """With a policy file of its own."""
    policy = tmp_path_factory.mktemp("gateway") / "policy.toml"
    policy.write_text('policy = "aimd"\n')
    bundle = Bundle.load(SHIPPED)
    with serving(bundle, OrtBackend(bundle, threads=1), admin_key=KEY, policy=str(policy)) as client:
        yield client


@pytest.fixture
def in_force(gateway: httpx.Client) -> Iterator[Any]:
    """What is in force, asked anew each time; the file's before and after each test."""
    gateway.delete("/v1/admin/policy", headers=BEARER)
    yield lambda: gateway.get("/v1/policy").json()
    assert gateway.delete("/v1/admin/policy", headers=BEARER).json()["policy"] == "aimd"


def administrator(gateway: httpx.Client) -> Administrator:
    return Administrator(str(gateway.base_url), KEY)


def test_confirm_when_a_policy_is_tried_then_its_answers_are_measured_and_the_old_one_comes_back(
    gateway: httpx.Client, in_force: Any
) -> None:
    url, admin = str(gateway.base_url), administrator(gateway)
    traces = {1.0: poisson_trace(40, 0.5, 3)}
    with admin.borrowed():
        live = confirm(url, admin, TRIED, traces, seed=0, grace_ms=0, images=None)
        assert in_force()["policy"] == "fixed"
    assert in_force()["policy"] == "aimd"
    (figures,) = live.figures
    assert figures.mean_accuracy == pytest.approx(Bundle.load(SHIPPED).manifest.points[0].accuracy)  # TRIED's point
    assert (figures.load, live.interrupted) == (1.0, False)
    assert live.invalid  # a run this short says little
    assert all(reason.startswith("load 1: ") for reason in live.invalid)


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError])
def test_borrowed_when_it_ends_badly_then_the_old_policy_comes_back(
    gateway: httpx.Client, in_force: Any, end: type[BaseException]
) -> None:
    admin = administrator(gateway)
    tried = []

    def try_it() -> None:
        with admin.borrowed():
            admin.put(TRIED)
            tried.append(in_force()["policy"])
            raise end

    with pytest.raises(end):
        try_it()
    assert tried == ["fixed"]
    assert in_force()["policy"] == "aimd"


def test_borrowed_when_terminated_then_the_old_policy_comes_back(gateway: httpx.Client, in_force: Any) -> None:
    admin = administrator(gateway)

    def try_it() -> None:
        with admin.borrowed():
            admin.put(TRIED)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        try_it()
    assert in_force()["policy"] == "aimd"


def test_borrowed_when_the_policy_before_was_posted_then_it_is_posted_again(
    gateway: httpx.Client, in_force: Any
) -> None:
    admin = administrator(gateway)
    before = 'policy = "queue-depth"  # mine\n'
    admin.put(before)
    with admin.borrowed():
        admin.put(TRIED)
    assert (in_force()["policy"], in_force()["source"]) == ("queue-depth", POSTED)
    assert gateway.get("/v1/admin/policy", headers=BEARER).text == before


def test_borrowed_when_the_file_has_become_bad_then_its_old_content_comes_back(
    gateway: httpx.Client, in_force: Any
) -> None:
    admin, path = administrator(gateway), Path(in_force()["source"])
    good = path.read_text()
    try:
        with admin.borrowed():
            admin.put(TRIED)
            path.write_text("policy = ")
        assert in_force()["policy"] == "aimd"
    finally:
        path.write_text(good)


def test_confirm_when_interrupted_then_it_ends_early_and_the_old_policy_comes_back(
    gateway: httpx.Client, in_force: Any
) -> None:
    url, admin = str(gateway.base_url), administrator(gateway)
    traces = {1.0: poisson_trace(40, 60, 3)}
    interrupts: list[int] = []

    def interrupt_once(tally: Tally) -> None:
        if tally.finished and not interrupts:
            interrupts.append(tally.finished)
            os.kill(os.getpid(), signal.SIGINT)

    with admin.borrowed():
        live = confirm(
            url,
            admin,
            TRIED,
            traces,
            seed=0,
            grace_ms=0,
            images=None,
            progress=interrupt_once,
        )
    assert live.interrupted
    assert in_force()["policy"] == "aimd"


def test_administrator_when_key_or_policy_is_refused_then_the_error_says_what_would_be_right(
    gateway: httpx.Client, in_force: Any
) -> None:
    with pytest.raises(TargetError, match=r"401: .*; --admin-key must be the gateway's setting"):
        Administrator(str(gateway.base_url), "wrong").put(TRIED)
    with pytest.raises(LoadtestError, match=r"answers 422: .*line 2: speed"):
        administrator(gateway).put('policy = "fixed"\nspeed = 1')
    bundle = Bundle.load(SHIPPED)
    with (
        serving(bundle, OrtBackend(bundle, threads=1), wait=False) as keyless,
        pytest.raises(TargetError, match=r"404: .*; start the gateway with the setting admin_key"),
    ):
        Administrator(str(keyless.base_url), KEY).put(TRIED)


def test_tune_when_the_gateway_refuses_the_policies_then_the_simulated_choice_is_written_as_unconfirmed(
    gateway: httpx.Client, in_force: Any, tmp_path: Path
) -> None:
    # The same model under another manifest: what is tuned for it must not run at this gateway.
    bundle = tmp_path / "other"
    shutil.copytree(SHIPPED, bundle)
    manifest = Bundle.load(bundle).manifest
    write_manifest(bundle, manifest.model_copy(update={"name": "other"}))
    trace, out = tmp_path / "trace.csv", tmp_path / "policy.toml"
    write_trace(trace, poisson_trace(60, 2, 5))
    arguments: list[object] = ["tune", "--bundle", bundle, "--trace", trace, "--out", out, "--trials", 1]
    arguments += ["--p99-ms", 500, "--max-shed", 0.9, "--url", gateway.base_url, "--admin-key", KEY]
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    assert "not confirmed: " in result.output
    assert "was tuned for the manifest" in result.output
    assert "# Not confirmed live.\n" in out.read_text()
    assert in_force()["policy"] == "aimd"


def test_tune_when_a_gateway_is_given_then_the_best_few_run_there_and_no_key_is_written(
    gateway: httpx.Client, in_force: Any, tmp_path: Path
) -> None:
    trace, out = tmp_path / "trace.csv", tmp_path / "policy.toml"
    write_trace(trace, poisson_trace(60, 2, 5))
    arguments: list[object] = ["tune", "--bundle", SHIPPED, "--trace", trace, "--out", out, "--trials", 2]
    arguments += ["--noise-seeds", 1, "--p99-ms", 500, "--max-shed", 0.9, "--url", gateway.base_url]
    result = CliRunner().invoke(app, [str(each) for each in arguments], env={"VMOE_ADMIN_KEY": KEY})
    assert result.exit_code == 0, result.output
    assert f"live, {str(gateway.base_url).rstrip('/')}" in result.output
    assert "live NOT VALID: load 1:" in result.output
    assert KEY not in out.read_text()
    assert KEY not in result.output
    assert in_force()["policy"] == "aimd"
