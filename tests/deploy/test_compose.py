"""docker-compose.yml: its schema, what Compose itself makes of each profile, and what we promise about it."""

from __future__ import annotations

import importlib.resources
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic_settings import CliApp

from server.settings import Settings
from tests.deploy.conftest import ROOT, tool

PROFILES = {
    "embedded": {"gateway", "prometheus", "grafana"},
    "triton": {"gateway-triton", "triton-model", "triton", "prometheus", "grafana"},
    "gpu": {"gateway-triton", "triton-model-gpu", "triton-gpu", "prometheus", "grafana"},
}


def compose(*profile: str) -> dict[str, dict[str, Any]]:
    """Services by name, after Compose has merged, interpolated and checked the file."""
    arguments = [word for name in profile for word in ("--profile", name)]
    command = [tool("docker-compose"), *arguments, "config", "--format", "json"]
    # A clean environment: COMPOSE_* or VMOE_* of a developer must not change the outcome.
    done = subprocess.run(command, cwd=ROOT, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    services: dict[str, dict[str, Any]] = json.loads(done.stdout)["services"]
    return services


@pytest.fixture(scope="module", params=PROFILES)
def services(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    return compose(request.param)


def test_file_obeys_the_schema_of_the_compose_specification() -> None:
    vendored = importlib.resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
    schema = json.loads(vendored.read_text())
    jsonschema.validate(yaml.safe_load((ROOT / "docker-compose.yml").read_text()), schema)


def test_profiles_start_what_the_file_says() -> None:
    assert {profile: set(compose(profile)) for profile in PROFILES} == PROFILES


def test_without_a_profile_the_embedded_engine_runs() -> None:
    assert set(compose()) == PROFILES["embedded"]


def test_every_profile_has_one_gateway_on_the_same_loopback_port(services: dict[str, dict[str, Any]]) -> None:
    (gateway,) = (service for name, service in services.items() if name.startswith("gateway"))
    (port,) = gateway["ports"]
    assert (port["host_ip"], port["published"], port["target"]) == ("127.0.0.1", "8080", 8080)
    assert gateway["networks"]["backend"]["aliases"] == ["gateway"]  # where Prometheus looks


def test_every_service_is_pinned_checked_limited_and_unprivileged(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        if "build" not in service:
            assert ":latest" not in service["image"], name
            assert ":" in service["image"], name
            assert int(service["user"].partition(":")[0]) > 0, name
        assert service.get("restart") == "no" or service["healthcheck"]["test"][0] == "CMD", name
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"]), name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert float(service["cpus"]) > 0, name
        assert int(service["mem_limit"]) > 0, name


def test_mounts_of_the_repository_exist_and_are_read_only(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        for volume in service.get("volumes", ()):
            if volume["type"] == "bind":
                assert volume["read_only"], (name, volume)
                assert Path(volume["source"]).exists(), (name, volume)


@pytest.mark.parametrize("profile", ["triton", "gpu"])
def test_triton_is_on_the_internal_network_alone(profile: str) -> None:
    triton = compose(profile)["triton" if profile == "triton" else "triton-gpu"]
    assert "ports" not in triton
    assert list(triton["networks"]) == ["backend"]
    networks = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["networks"]
    assert networks["backend"] == {"internal": True}


def test_gateway_has_time_to_drain() -> None:
    drain_s = Settings.model_fields["drain_timeout_s"].default + Settings.model_fields["shutdown_delay_s"].default
    for profile in PROFILES:
        (gateway,) = (service for name, service in compose(profile).items() if name.startswith("gateway"))
        assert gateway["stop_grace_period"] == "30s"
        assert drain_s + 5 <= 30


def test_grafana_has_no_account_to_log_in_to() -> None:
    environment = compose("embedded")["grafana"]["environment"]
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert environment["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"


@pytest.mark.parametrize(("profile", "kind"), [("triton", "KIND_CPU"), ("gpu", "KIND_GPU")])
def test_model_is_written_for_the_device_that_triton_has(profile: str, kind: str, tmp_path: Path) -> None:
    services = compose(profile)
    writer, triton = ("triton-model", "triton") if profile == "triton" else ("triton-model-gpu", "triton-gpu")
    assert services[triton]["depends_on"][writer]["condition"] == "service_completed_successfully"
    python, *arguments = services[writer]["entrypoint"] + services[writer]["command"]
    assert python == "python"
    places = {"/models": str(ROOT / "model_repository"), "/repository": str(tmp_path)}
    subprocess.run([sys.executable, *(places.get(word, word) for word in arguments)], cwd=ROOT, check=True)
    config = (tmp_path / "vmoe-fashion-mnist" / "config.pbtxt").read_text()
    assert f"kind: {kind}" in config
    volumes = {volume["target"]: volume for volume in services[writer]["volumes"]}
    (mounted,) = services[triton]["volumes"]
    assert (mounted["source"], mounted["target"]) == (volumes["/repository"]["source"], "/models")
    assert mounted["read_only"]


@pytest.mark.parametrize("profile", PROFILES)
def test_gateway_accepts_its_options(
    profile: str, image_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (gateway,) = (service for name, service in compose(profile).items() if name.startswith("gateway"))
    arguments = gateway.get("command") or []
    for name, value in (image_environment | gateway["environment"]).items():
        assert name.removeprefix("VMOE_").lower() in Settings.model_fields, name
        monkeypatch.setenv(name, value)
    settings = CliApp.run(Settings, cli_args=arguments)
    assert (settings.host, settings.port, settings.model_repository) == ("0.0.0.0", 8080, Path("/models"))
