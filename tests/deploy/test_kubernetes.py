"""deploy/kubernetes: every manifest against the API's schema, and what they promise each other."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pydantic import ValidationError
from pydantic_settings import CliApp

from server.settings import Settings
from tests.deploy.conftest import ROOT, tool

KUBERNETES = ROOT / "deploy/kubernetes"
OVERLAYS = ("embedded", "triton")
# The oldest that has all that we use, and the newest that the package knows.
VERSIONS = ("1.29", kubernetes_validate.latest_version())
NOT_MANIFESTS = ("kustomization.yaml", "adapter-values.yaml")
FILES = sorted(path for path in KUBERNETES.rglob("*.yaml") if path.name not in NOT_MANIFESTS)

Manifest = dict[str, Any]


@pytest.fixture(scope="module", params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return build(request.param)


def build(overlay: str) -> list[Manifest]:
    """What `kubectl apply -k` would send."""
    done = subprocess.run(
        [tool("kubectl"), "kustomize", str(KUBERNETES / overlay)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def pods(manifests: list[Manifest]) -> Iterator[tuple[Manifest, Manifest]]:
    """Each workload with the spec of its pods."""
    for workload in of_kind(manifests, "Deployment", "StatefulSet"):
        yield workload, workload["spec"]["template"]["spec"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(KUBERNETES)))
def test_file_obeys_the_schema(path: Path, version: str) -> None:
    for manifest in yaml.safe_load_all(path.read_text()):
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_kustomize_builds_obeys_the_schema(manifests: list[Manifest], version: str) -> None:
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)
        assert manifest["kind"] == "Namespace" or manifest["metadata"]["namespace"] == "vmoe"


def test_every_manifest_is_part_of_an_overlay() -> None:
    written = {
        (manifest["kind"], manifest["metadata"]["name"])
        for path in FILES
        for manifest in yaml.safe_load_all(path.read_text())
    }
    built = {(each["kind"], each["metadata"]["name"]) for overlay in OVERLAYS for each in build(overlay)}
    assert written == built


def test_selectors_find_pods_and_ports_have_names(manifests: list[Manifest]) -> None:
    labels = [workload["spec"]["template"]["metadata"]["labels"] for workload, _ in pods(manifests)]
    names = {port["name"] for _, spec in pods(manifests) for each in spec["containers"] for port in each["ports"]}
    selectors = [service["spec"]["selector"] for service in of_kind(manifests, "Service")]
    selectors += [budget["spec"]["selector"]["matchLabels"] for budget in of_kind(manifests, "PodDisruptionBudget")]
    for policy in of_kind(manifests, "NetworkPolicy"):
        selectors.append(policy["spec"]["podSelector"].get("matchLabels", {}))
        for rule in policy["spec"].get("ingress", []) + policy["spec"].get("egress", []):
            assert all(port["port"] in names or port["port"] == 53 for port in rule["ports"])
    for selector in selectors:
        assert any(selector.items() <= each.items() for each in labels), selector
    for service in of_kind(manifests, "Service"):
        assert all(port["targetPort"] in names for port in service["spec"]["ports"])
    for scaler in of_kind(manifests, "HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        assert any(
            (each["kind"], each["metadata"]["name"]) == (target["kind"], target["name"]) for each, _ in pods(manifests)
        )


def test_pods_are_unprivileged_probed_and_limited(manifests: list[Manifest]) -> None:
    for _, spec in pods(manifests):
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        for container in spec["containers"] + spec.get("initContainers", []):
            context = container["securityContext"]
            assert (context["readOnlyRootFilesystem"], context["allowPrivilegeEscalation"]) == (True, False)
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
            assert ":" in container["image"]
            assert not container["image"].endswith(":latest")
        for container in spec["containers"]:
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()


def test_triton_is_reached_by_gateways_and_prometheus_alone() -> None:
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind(build("triton"), "NetworkPolicy")}
    assert policies["nothing"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    inference, metrics = policies["triton"]["ingress"]
    assert inference["from"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "vmoe-gateway"}}}]
    assert [port["port"] for port in inference["ports"]] == ["grpc"]
    assert [port["port"] for port in metrics["ports"]] == ["metrics"]


def test_outside_reaches_classification_and_models_alone(manifests: list[Manifest]) -> None:
    (ingress,) = of_kind(manifests, "Ingress")
    paths = [path for rule in ingress["spec"]["rules"] for path in rule["http"]["paths"]]
    assert {(path["path"], path["pathType"]) for path in paths} == {("/classify", "Exact"), ("/v1/models", "Exact")}


def test_gateway_has_time_to_leave_and_to_drain(manifests: list[Manifest], image_environment: dict[str, str]) -> None:
    gateway, spec = next(each for each in pods(manifests) if each[0]["metadata"]["name"] == "gateway")
    (container,) = spec["containers"]
    environment = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    leave_s = float(environment["VMOE_SHUTDOWN_DELAY_S"])
    assert leave_s + float(environment["VMOE_DRAIN_TIMEOUT_S"]) + 5 <= spec["terminationGracePeriodSeconds"]
    # Unready is noticed before the gateway stops to serve.
    probe = container["readinessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] < leave_s
    assert probe["httpGet"]["path"] == "/readyz"
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert gateway["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_gateway_accepts_its_options(
    overlay: str, image_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = next(spec for workload, spec in pods(build(overlay)) if workload["metadata"]["name"] == "gateway")
    (container,) = spec["containers"]
    arguments = container.get("args", [])
    limit = container["resources"]["limits"]["cpu"]  # what resourceFieldRef gives VMOE_THREADS
    environment = image_environment | {each["name"]: each.get("value", limit) for each in container["env"]}
    for name, value in environment.items():
        assert name.removeprefix("VMOE_").lower() in Settings.model_fields, name
        monkeypatch.setenv(name, value)
    settings = CliApp.run(Settings, cli_args=arguments)
    assert (settings.host, settings.port, settings.threads) == ("0.0.0.0", 8080, 2)


def test_triton_has_an_endpoint_in_the_gateway_for_each_replica() -> None:
    manifests = build("triton")
    (triton,) = of_kind(manifests, "StatefulSet")
    spec = next(spec for workload, spec in pods(manifests) if workload["metadata"]["name"] == "gateway")
    urls = spec["containers"][0]["args"][-1].split(",")
    assert urls == [f"triton-{i}.{triton['spec']['serviceName']}:8001" for i in range(triton["spec"]["replicas"])]


def test_gateway_that_is_told_of_services_by_environment_would_not_start(
    manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why the manifests switch service links off: what a Service named `vmoe` puts into every pod."""
    monkeypatch.setenv("VMOE_PORT", "tcp://10.96.0.12:80")
    with pytest.raises(ValidationError, match="port"):
        CliApp.run(Settings, cli_args=[])
    assert all(spec["enableServiceLinks"] is False for _, spec in pods(manifests))
