"""policy.toml: which policy decides, with what parameters, and the budgets. Read at start and on reload.

    policy = "foresight"          # fixed, queue-depth, aimd, slackfit, proteus
    quantile = 0.9                # of predicted latency, on which admission relies

    [foresight]                   # parameters of the policy of that name
    slack = 0.5

    [budgets.auto]                # changes a default budget, or adds one
    ceiling = "full"              # the best point it may use: C,K of the manifest, "cheapest" or "full"
    floor = "0.25,1"              # the cheapest that it may be degraded to
    deadline_ms = 100
    weight = 1.0

    [provenance]                  # of a tuned policy, see `provenance`
    manifest_sha256 = "..."

Everything has a default that follows from the manifest. An unknown key, name or point is refused with its line.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from exporter.bundle import Manifest
from server.budgets import Budget, check_budgets, default_budgets
from server.ladder import Ladder
from server.policies.aimd import Aimd, AimdConfig
from server.policies.base import Policy
from server.policies.fixed import Fixed
from server.policies.foresight import Foresight, ForesightConfig
from server.policies.proteus import Proteus, ProteusConfig
from server.policies.queue_depth import QueueDepth, QueueDepthConfig
from server.policies.slackfit import SlackFit, SlackFitConfig
from server.provenance import Provenance
from vmoe.operating_point import parse_point

POLICY_FILE = "policy.toml"
PolicyName = Literal["foresight", "fixed", "queue-depth", "aimd", "slackfit", "proteus"]
POLICY_NAMES: tuple[PolicyName, ...] = get_args(PolicyName)
_MAX_BUDGETS = 16  # each is a label of several metrics
_BUDGET_NAME = r"^[a-z][a-z0-9_-]{0,31}$"
_RESERVED = ("custom", "invalid")  # labels of requests without a budget, see `server.metrics`


class PolicyError(ValueError):
    """A policy that cannot be used; the message names the file and, where it is known, the line."""


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _BudgetTable(_Table):
    ceiling: str | None = None
    floor: str | None = None
    deadline_ms: float | None = Field(default=None, ge=1, le=3_600_000)
    weight: float | None = Field(default=None, gt=0, le=1000)


class PolicyConfig(_Table):
    """The file as it stands."""

    policy: PolicyName = "foresight"
    quantile: float = Field(default=0.9, ge=0.5, le=0.999)
    queue_depth: QueueDepthConfig = Field(default=QueueDepthConfig(), alias="queue-depth")
    aimd: AimdConfig = AimdConfig()
    slackfit: SlackFitConfig = SlackFitConfig()
    proteus: ProteusConfig = ProteusConfig()
    foresight: ForesightConfig = ForesightConfig()
    budgets: dict[Annotated[str, Field(pattern=_BUDGET_NAME)], _BudgetTable] = Field(
        default_factory=dict, max_length=_MAX_BUDGETS
    )
    provenance: Provenance | None = None


@dataclass(frozen=True)
class PolicyText:
    """A policy on its way to another process; fields as of `ActivePolicy`."""

    text: str
    source: str


@dataclass(frozen=True)
class ActivePolicy:
    """What is in force.

    Attributes:
        config: parameters.
        budgets: by name.
        source: where it came from, for people.
        text: the TOML that gives it again.
    """

    config: PolicyConfig
    budgets: Mapping[str, Budget]
    source: str
    text: str

    @property
    def horizon_s(self) -> float:
        """How far ahead a scheduler looks for bursts: the shortest deadline."""
        return min(budget.deadline_s for budget in self.budgets.values())

    @property
    def parameters(self) -> dict[str, float]:
        """Of the policy in force."""
        table: BaseModel | None = getattr(self.config, self.config.policy.replace("-", "_"), None)
        return {} if table is None else table.model_dump()

    @property
    def as_text(self) -> PolicyText:
        return PolicyText(self.text, self.source)

    def build(self) -> Policy:
        """A new policy object: what it remembers starts empty."""
        config = self.config
        policies: dict[PolicyName, Callable[[], Policy]] = {
            "foresight": lambda: Foresight(config.foresight),
            "fixed": Fixed,
            "queue-depth": lambda: QueueDepth(config.queue_depth),
            "aimd": lambda: Aimd(config.aimd),
            "slackfit": lambda: SlackFit(config.slackfit),
            "proteus": lambda: Proteus(config.proteus),
        }
        return policies[config.policy]()


def parameters_of(name: PolicyName) -> type[BaseModel] | None:
    """The model of a policy's parameters; None for a policy that has none."""
    field = PolicyConfig.model_fields.get(name.replace("-", "_"))
    return None if field is None else type(field.default)


def load_policy(path: Path, manifest: Manifest, ladder: Ladder) -> ActivePolicy:
    """Reads a policy.toml for a bundle.

    Raises:
        PolicyError: the file cannot be read, is no TOML, or asks for something that does not exist.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"cannot read {path}: {error}") from error
    return parse_policy(text, manifest, ladder, str(path))


def default_policy(manifest: Manifest, ladder: Ladder, name: PolicyName = "foresight") -> ActivePolicy:
    """What is in force without a file."""
    text = f'policy = "{name}"\n'
    return ActivePolicy(PolicyConfig(policy=name), default_budgets(manifest, ladder), f"default ({name})", text)


def parse_policy(text: str, manifest: Manifest, ladder: Ladder, source: str) -> ActivePolicy:
    """As `load_policy`, from the text; `source` stands in the messages.

    Raises:
        PolicyError: as for `load_policy`.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:  # its message has line and column
        raise PolicyError(f"{source} is not TOML: {error}") from error
    try:
        config = PolicyConfig.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        keys = tuple(str(key) for key in first["loc"] if key != "[key]")
        known = _known(keys) if first["type"] == "extra_forbidden" else ()
        what = f"unknown; known are {', '.join(known)}" if known else f"{first['msg']}, got {first['input']!r}"
        raise PolicyError(
            f"{_place(source, text, keys)}: {'.'.join(keys)}: {what.removeprefix('Value error, ')}"
        ) from error
    budgets = dict(default_budgets(manifest, ladder))
    for name, table in config.budgets.items():
        try:
            if name in _RESERVED:
                raise ValueError(f"budget name {name!r} is reserved, choose another one")
            budgets[name] = _budget(name, table, budgets.get(name, budgets["auto"]), ladder)
            check_budgets(budgets, ladder)
        except ValueError as error:
            raise PolicyError(f"{_place(source, text, ('budgets', name))}: {error}") from error
    return ActivePolicy(config, budgets, source, text)


def _known(keys: tuple[str, ...]) -> tuple[str, ...]:
    """What could stand in place of the last of `keys`; empty in tables that people do not write."""
    match keys:
        case (_,):
            table: type[BaseModel] | None = PolicyConfig
        case ("budgets", _, _):
            table = _BudgetTable
        case ("provenance", _):
            table = Provenance
        case (name, _) if name in POLICY_NAMES:
            table = parameters_of(next(known for known in POLICY_NAMES if known == name))
        case _:
            table = None
    return () if table is None else tuple(field.alias or key for key, field in table.model_fields.items())


def _budget(name: str, table: _BudgetTable, default: Budget, ladder: Ladder) -> Budget:
    return Budget(
        name,
        default.floor if table.floor is None else _rung(name, "floor", table.floor, ladder),
        default.ceiling if table.ceiling is None else _rung(name, "ceiling", table.ceiling, ladder),
        default.deadline_s if table.deadline_ms is None else table.deadline_ms / 1000,
        default.weight if table.weight is None else table.weight,
    )


def _rung(budget: str, key: str, text: str, ladder: Ladder) -> int:
    """The rung that a file names."""
    named = {"cheapest": ladder.frontier[0], "full": ladder.full}
    if text in named:
        return named[text]
    points = {str(rung.point): index for index, rung in enumerate(ladder.rungs) if rung.point and not rung.model}
    try:
        return points[str(parse_point(text))]
    except (ValueError, KeyError) as error:
        known = ", ".join('"' + point.strip("()").replace(" ", "") + '"' for point in points)
        raise ValueError(
            f"{key} of budget {budget!r} must be an operating point of the manifest ({known or 'none: it is dense'}), "
            f'"cheapest" or "full", got {text!r}'
        ) from error


def _place(source: str, text: str, keys: tuple[str, ...]) -> str:
    """`file, line n`: the line of the innermost of `keys` that can be found. tomllib does not keep positions."""
    table: tuple[str, ...] = ()
    best, best_line = 0, 0
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[([^\[\]]+)\]", line):
            table = tuple(part.strip().strip("\"'") for part in header[1].split("."))
            found = table
        elif entry := re.match(r"\s*([\w.\"'-]+)\s*=", line):
            found = (*table, *(part.strip("\"'") for part in entry[1].split(".")))
        else:
            continue
        if len(found) > best and keys[: len(found)] == found:
            best, best_line = len(found), number
    return f"{source}, line {best_line}" if best_line else source
