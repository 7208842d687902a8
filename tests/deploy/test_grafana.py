"""The dashboard and its provisioning fit together; no Grafana runs here, test_prometheus.py executes the queries."""

from __future__ import annotations

import itertools
import json
from typing import Any

import yaml

from tests.deploy.conftest import ROOT

GRAFANA = ROOT / "deploy/grafana"
DASHBOARD = json.loads((GRAFANA / "dashboards/vmoe.json").read_text())
SOURCES = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]


def test_every_panel_asks_the_provisioned_data_source() -> None:
    (source,) = SOURCES
    asked: list[dict[str, Any]] = [*DASHBOARD["templating"]["list"], *DASHBOARD["annotations"]["list"]]
    for panel in DASHBOARD["panels"]:
        if panel["type"] != "row":
            asked += [panel, *panel["targets"]]
    assert {(each["datasource"]["type"], each["datasource"]["uid"]) for each in asked} == {
        ("prometheus", source["uid"])
    }


def test_minimum_interval_is_the_scrape_interval() -> None:
    """Grafana's $__rate_interval is four of them: with a smaller one, rates would have gaps."""
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    assert SOURCES[0]["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]


def test_dashboards_are_where_provisioning_and_compose_say() -> None:
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/vmoe.yml").read_text())["providers"]
    grafana = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["grafana"]
    assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in grafana["volumes"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/vmoe.json"


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x, y in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        )
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24  # Grafana's grid
