"""A real Prometheus scrapes a real gateway and a real Triton; every expression that we ship runs against it.

The Triton is the oldest that we support, of the wheel nvidia-pytriton, started with the options of docker-compose.yml.
"""

from __future__ import annotations

import math
import re
import shlex
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.grpc
import yaml
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException

from tests.deploy.conftest import ROOT, running_gateway, tool
from tests.deploy.live_prometheus import DEPLOY, Prometheus, running_prometheus, wait_until
from tests.deploy.promql import Expression, base_name, dashboard_expressions, rule_expressions
from tests.triton_server import TritonServer, python_repository

MODEL = "vmoe-fashion-mnist"
IMAGE = (ROOT / "examples/ankle_boot.png").read_bytes()
EXPRESSIONS = [*dashboard_expressions(), *rule_expressions()]
# Triton's user guide, "Metrics": what a server with a GPU has in addition.
GPU_SERIES = {"nv_gpu_utilization", "nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes"} | {
    "nv_gpu_power_usage",
    "nv_gpu_power_limit",
}
# Rates need two scrapes, 250 ms apart; a quiet machine is there after a second.
LIMIT_S = 30.0


def triton_arguments(key: str) -> list[str]:
    """The command line of docker-compose.yml, less the model repository."""
    (script,) = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["x-triton"]["command"]
    closed, command = re.fullmatch(r"read -r key < /\S+; closed=(\S+)\$\$key; exec tritonserver (.*)", script).groups()
    arguments = shlex.split(command.replace("$$closed", closed + key))
    return [word for word in arguments if not word.startswith("--model-repository=")]


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = python_repository(ROOT / "model_repository" / MODEL, tmp_path_factory.mktemp("triton"))
    with TritonServer(repository, arguments=triton_arguments("secret")) as server:
        yield server


@pytest.fixture(scope="module")
def triton_gateway_url(triton: TritonServer) -> Iterator[str]:
    """A gateway in front of it: what docker-compose.yml leaves open is enough for that."""
    with running_gateway("--backend", "triton", "--triton-urls", triton.grpc_url) as url:
        yield url


@pytest.fixture(scope="module")
def prometheus(
    gateway_url: str, triton_gateway_url: str, triton: TritonServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    tool("prometheus")
    targets = {
        "gateway": [url.removeprefix("http://") for url in (gateway_url, triton_gateway_url)],
        "triton": [f"127.0.0.1:{triton.metrics_port}"],
    }
    with running_prometheus(tmp_path_factory.mktemp("prometheus"), targets) as running:
        yield running


@pytest.fixture(scope="module")
def traffic(gateway_url: str, triton_gateway_url: str) -> Iterator[Callable[[], None]]:
    """One round of everything that makes a series: budgets, a point by hand, a broken image, a hopeless deadline; and
    one image through Triton."""
    queries = [{"budget": budget} for budget in ("low", "medium", "high", "max", "auto")]
    queries.append({"capacity_factor": "0.25", "num_selected_experts": "1"})
    with (
        httpx.Client(base_url=gateway_url, timeout=30, headers={"Content-Type": "image/png"}) as client,
        httpx.Client(base_url=triton_gateway_url, timeout=30, headers={"Content-Type": "image/png"}) as through_triton,
    ):

        def send() -> None:
            for query in queries:
                assert (
                    client.post("/classify", params={"deadline_ms": "5000"} | query, content=IMAGE).status_code == 200
                )
            assert client.post("/classify", content=b"not an image").status_code == 400
            # Refused unless it is late in another way: one millisecond is less than one batch takes.
            assert client.post("/classify", params={"deadline_ms": "1"}, content=IMAGE).status_code in (503, 504)
            assert through_triton.post("/classify", params={"deadline_ms": "5000"}, content=IMAGE).status_code == 200

        yield send


def infer(client: tritonclient.grpc.InferenceServerClient) -> None:
    """One image at two slots per expert and layer, K = 1."""
    tensors = {
        "images": np.zeros((1, 28, 28, 1), np.uint8),
        "slots": np.full((1, 4), 2, np.int64),
        "num_selected_experts": np.ones((1, 1), np.int64),
    }
    inputs = []
    for name, value in tensors.items():
        tensor = tritonclient.grpc.InferInput(name, value.shape, {"u": "UINT8", "i": "INT64"}[value.dtype.kind])
        tensor.set_data_from_numpy(value)
        inputs.append(tensor)
    assert client.infer(MODEL, inputs).as_numpy("logits").shape == (1, 10)


@pytest.fixture(scope="module")
def scraped(prometheus: Prometheus, traffic: Callable[[], None]) -> Prometheus:
    """Prometheus after traffic, with every recording rule evaluated."""
    recorded = [rule["record"] for group in _rule_groups() for rule in group["rules"] if "record" in rule]

    def complete() -> bool:
        traffic()
        return all(_finite(prometheus, name) for name in recorded)

    wait_until(complete, LIMIT_S, "every recording rule has a value")
    return prometheus


def test_both_jobs_are_up(scraped: Prometheus) -> None:
    up = sorted((each["metric"]["job"], each["value"][1]) for each in scraped.query("up"))
    assert up == [("gateway", "1"), ("gateway", "1"), ("prometheus", "1"), ("triton", "1")]


def test_counters_say_what_was_sent(scraped: Prometheus, traffic: Callable[[], None], gateway_url: str) -> None:
    def counted() -> dict[str, float]:
        """Answers by budget, as the gateway itself says now: a scrape may be one round of traffic behind."""
        families = text_string_to_metric_families(httpx.get(f"{gateway_url}/metrics").text)
        (requests,) = (family for family in families if family.name == "vmoe_requests")
        answers: defaultdict[str, float] = defaultdict(float)
        for sample in requests.samples:
            if sample.name == "vmoe_requests_total" and sample.labels["status"] == "200":
                answers[sample.labels["budget"]] += sample.value
        return dict(answers)

    instance = gateway_url.removeprefix("http://")
    answered = f'sum by (budget) (vmoe_requests_total{{status="200", instance="{instance}"}})'

    def scraped_counts() -> dict[str, float]:
        return {each["metric"]["budget"]: float(each["value"][1]) for each in scraped.query(answered)}

    before = counted()
    assert before.keys() == {"low", "medium", "high", "max", "auto", "custom"}
    traffic()
    after = counted()
    assert after == {budget: count + 1 for budget, count in before.items()}
    wait_until(lambda: scraped_counts() == after, LIMIT_S, "the next scrape says the same")


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=lambda each: each.place)
def test_expression_has_a_result(expression: Expression, scraped: Prometheus, traffic: Callable[[], None]) -> None:
    result = scraped.query(expression.promql)
    if expression.may_be_empty or expression.origin == "gpu":
        return
    # A rate of 0 over 0 is NaN where the window has seen no request of a kind yet.
    if not _finite(scraped, expression.promql):

        def finite() -> bool:
            traffic()
            return _finite(scraped, expression.promql)

        wait_until(finite, LIMIT_S, f"a value for {expression.promql}")
        result = scraped.query(expression.promql)
    for each in result:
        assert expression.labels <= each["metric"].keys(), "the legend names labels that the result lacks"


def test_rules_are_evaluated_without_error_and_nothing_has_to_fire(scraped: Prometheus) -> None:
    rules = scraped.rules()
    assert {rule["name"] for rule in rules} == {
        rule.get("record") or rule["alert"] for group in _rule_groups() for rule in group["rules"]
    }
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []
    # `for` is minutes: whatever the traffic of this test looks like, nothing fires yet.
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []


def test_every_series_that_is_named_exists(
    scraped: Prometheus, gateway_url: str, triton_gateway_url: str, triton: TritonServer
) -> None:
    urls = (f"{gateway_url}/metrics", f"{triton_gateway_url}/metrics", triton.metrics_url)
    exposed = "".join(httpx.get(url).text for url in urls)
    known = set(re.findall(r"^# TYPE (\w+)", exposed, re.MULTILINE)) | GPU_SERIES
    written = {name for expression in EXPRESSIONS for name in expression.series}
    named = {name if name in known else base_name(name) for name in written}
    assert named - known == set()
    documented = (ROOT / "docs/metrics.md").read_text()
    assert {name for name in named if name.startswith("vmoe_") and f"`{name}`" not in documented} == set()


@pytest.mark.parametrize("fixture", ["gateway_url", "triton_gateway_url"])
def test_promtool_finds_nothing_in_the_metrics_of_a_live_gateway(
    fixture: str, scraped: Prometheus, request: pytest.FixtureRequest
) -> None:
    text = httpx.get(f"{request.getfixturevalue(fixture)}/metrics").text
    done = subprocess.run(
        [tool("promtool"), "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_promtool_accepts_configuration_and_rules(tmp_path: Path) -> None:
    promtool(DEPLOY, "check", "config", "prometheus.yml")  # rules.yml with it
    # Debian builds Prometheus without discovery in Kubernetes: the rest of that file is what can be checked here.
    config = yaml.safe_load((DEPLOY / "kubernetes.yml").read_text())
    for job in config["scrape_configs"]:
        assert [each["role"] for each in job.pop("kubernetes_sd_configs")] == ["pod"]
    (tmp_path / "kubernetes.yml").write_text(yaml.safe_dump(config))
    (tmp_path / "rules.yml").write_text((DEPLOY / "rules.yml").read_text())
    promtool(tmp_path, "check", "config", "kubernetes.yml")
    jobs = {job["job_name"] for job in config["scrape_configs"]}
    assert jobs < {job["job_name"] for job in yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]}


def test_alerts_fire_when_they_should() -> None:
    """tests/data/prometheus/alerts.yml has series of an hour, and what must have fired."""
    promtool(ROOT / "tests/data/prometheus", "test", "rules", "alerts.yml")


def test_triton_started_as_in_compose_serves_inference_and_refuses_the_rest(triton: TritonServer) -> None:
    with tritonclient.grpc.InferenceServerClient(triton.grpc_url) as client:
        assert client.is_server_ready()
        assert client.get_model_metadata(MODEL).name == MODEL
        assert client.get_model_config(MODEL).config.name == MODEL
        infer(client)
        closed = (
            client.get_inference_statistics,
            client.get_model_repository_index,
            client.get_system_shared_memory_status,
            client.get_trace_settings,
            client.get_log_settings,
            lambda: client.unload_model(MODEL),
        )
        for call in closed:
            with pytest.raises(InferenceServerException, match="expecting header"):
                call()
    assert httpx.post(f"http://{triton.http_url}/v2/repository/models/{MODEL}/unload").status_code == 403
    assert httpx.get(f"http://{triton.http_url}/v2/health/ready").status_code == 200


def promtool(directory: Path, *arguments: str) -> None:
    done = subprocess.run([tool("promtool"), *arguments], cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _rule_groups() -> list[dict[str, list[dict[str, str]]]]:
    groups: list[dict[str, list[dict[str, str]]]] = yaml.safe_load((DEPLOY / "rules.yml").read_text())["groups"]
    return groups


def _finite(prometheus: Prometheus, promql: str) -> bool:
    return any(math.isfinite(float(each["value"][1])) for each in prometheus.query(promql))
