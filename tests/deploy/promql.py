"""The expressions that we ship, where they stand, and the series that they name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
# What Grafana puts in place of its variables, for "All" and a scrape interval of 5 s.
_VARIABLES = {"$__rate_interval": "1m", "$instance": ".*", "$budget": ".*"}
_SERIES = re.compile(r"(?<![:\w])(?:vmoe|nv)_\w+")
_LABELS = re.compile(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}")
# No sample before the first failure.
_RARE = {"vmoe_failed_images_total"}
_HISTOGRAM = re.compile(r"_(bucket|sum|count)$")


@dataclass(frozen=True)
class Expression:
    """Attributes:
    place: panel or rule.
    labels: that the legend shows.
    may_be_empty: while all is well, as alerts are.
    """

    place: str
    promql: str
    labels: frozenset[str] = frozenset()
    may_be_empty: bool = False

    @property
    def series(self) -> set[str]:
        return set(_SERIES.findall(self.promql))

    @property
    def origin(self) -> str:
        """`gateway`, `triton`, `gpu` (Triton's, but only with a GPU), or `prometheus` for what it makes itself."""
        if any(name.startswith("nv_gpu") for name in self.series):
            return "gpu"
        if any(name.startswith("nv_") for name in self.series):
            return "triton"
        return "gateway" if self.series else "prometheus"


def base_name(series: str) -> str:
    """Of a histogram's part, the histogram's own name."""
    return _HISTOGRAM.sub("", series)


def dashboard_expressions() -> Iterator[Expression]:
    """Variables replaced as Grafana does it."""
    dashboard = json.loads((DEPLOY / "grafana/dashboards/vmoe.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            labels = frozenset(_LABELS.findall(target["legendFormat"]))
            rare = bool(_RARE & set(_SERIES.findall(target["expr"])))
            yield Expression(f"panel {panel['title']}", _replaced(target["expr"]), labels, may_be_empty=rare)
    for annotation in dashboard["annotations"]["list"]:
        yield Expression(f"annotation {annotation['name']}", annotation["expr"], may_be_empty=True)


def rule_expressions() -> Iterator[Expression]:
    for group in yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())["groups"]:
        for rule in group["rules"]:
            name = rule.get("alert") or rule["record"]
            yield Expression(f"rule {name}", rule["expr"], may_be_empty="alert" in rule)


def _replaced(promql: str) -> str:
    for variable, value in _VARIABLES.items():
        promql = promql.replace(variable, value)
    assert "$" not in promql, f"unknown variable: {promql}"
    return promql
