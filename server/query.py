"""Query parameters of /classify, checked against policy and model: what a request allows the scheduler to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from exporter.bundle import Manifest
from server.budgets import DEFAULT_BUDGET, Budget
from server.errors import InvalidParameter
from server.ladder import Ladder, Rung
from server.metrics import CUSTOM
from server.pinned_point import pin
from server.policy_file import ActivePolicy

_DEFAULT_TOP = 5


class ClassifyQuery(BaseModel):
    """As they stand in the URL; an unknown name is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: Annotated[
        str | None,
        Field(
            description="Between which points the image may be served, and how soon: `low`, `medium`, `high`, `max`, "
            "`auto`, or another one of `/v1/policy`. Default `auto`. Not together with `capacity_factor`.",
            examples=["auto"],
        ),
    ] = None
    deadline_ms: Annotated[
        float | None,
        Field(
            ge=1,
            allow_inf_nan=False,
            description="When the answer is due, from the end of the upload; at most the request timeout. Default: the "
            "budget's. Decoding counts. What cannot be answered in time is refused at once.",
        ),
    ] = None
    min_accuracy: Annotated[
        float | None,
        Field(
            ge=0,
            le=1,
            allow_inf_nan=False,
            description="Serve at no point that was measured to be less accurate. Not together with `capacity_factor`.",
        ),
    ] = None
    capacity_factor: Annotated[
        float | None,
        Field(description="C: buffer slots per assignment, above 0. Needs `num_selected_experts`."),
    ] = None
    num_selected_experts: Annotated[
        int | None, Field(description="K: experts per token, from 1. Needs `capacity_factor`.")
    ] = None
    top: Annotated[
        int | None, Field(ge=1, description="Number of predictions, at most the number of classes. Default 5.")
    ] = None
    explain: Annotated[bool, Field(description="Also list which patches the experts of each layer processed.")] = False


@dataclass(frozen=True)
class Ask:
    """What a request wants, checked against the model.

    Attributes:
        budget: the class under which it counts; its name is a label of the metrics.
        floor, ceiling: rungs between which it may be served; equal for a pinned point.
        pinned: the point that the client chose, None when it left the choice to us.
        deadline_s: from the end of the upload to the answer.
        top: number of predictions.
        explain: whether to say which patches the experts processed.
    """

    budget: Budget
    floor: int
    ceiling: int
    pinned: Rung | None
    deadline_s: float
    top: int
    explain: bool


def interpret(query: ClassifyQuery, policy: ActivePolicy, manifest: Manifest, ladder: Ladder, timeout_s: float) -> Ask:
    """Checks what the schema cannot know.

    Arguments:
        timeout_s: the longest deadline.

    Raises:
        InvalidParameter: the message says what is allowed.
    """
    num_classes = len(manifest.labels)
    if query.top is not None and query.top > num_classes:
        raise InvalidParameter(f"top must be between 1 and {num_classes}, the number of classes, got {query.top}")
    top = min(_DEFAULT_TOP, num_classes) if query.top is None else query.top
    if query.deadline_ms is not None and query.deadline_ms > 1000 * timeout_s:
        raise InvalidParameter(
            f"deadline_ms must be between 1 and {1000 * timeout_s:g}, the request timeout, got {query.deadline_ms:g}"
        )
    budget, pinned = _class_of(query, policy, manifest, ladder)
    floor, ceiling = budget.floor, budget.ceiling
    if query.min_accuracy is not None:
        floor, ceiling = _accurate_range(query.min_accuracy, budget, ladder)
    deadline_s = budget.deadline_s if query.deadline_ms is None else query.deadline_ms / 1000
    return Ask(budget, floor, ceiling, pinned, deadline_s, top, query.explain)


def _class_of(
    query: ClassifyQuery, policy: ActivePolicy, manifest: Manifest, ladder: Ladder
) -> tuple[Budget, Rung | None]:
    """The budget that is named; or one of its own for a pinned point, and that point."""
    factor, experts = query.capacity_factor, query.num_selected_experts
    if factor is None and experts is None:
        name = query.budget or DEFAULT_BUDGET
        if (budget := policy.budgets.get(name)) is None:
            raise InvalidParameter(f"budget must be one of {', '.join(policy.budgets)}, got {name[:40]!r}")
        return budget, None
    if factor is None or experts is None:
        missing = "capacity_factor" if factor is None else "num_selected_experts"
        raise InvalidParameter(f"capacity_factor and num_selected_experts go together; {missing} is missing")
    for name in ("budget", "min_accuracy"):
        if (value := getattr(query, name)) is not None:
            raise InvalidParameter(
                f"{name}={str(value)[:40]} and capacity_factor={factor:g} exclude each other: "
                f"send {name} or a point of your own"
            )
    pinned, charged = pin(manifest, ladder, factor, experts)
    return Budget(CUSTOM, charged, charged, policy.budgets[DEFAULT_BUDGET].deadline_s), pinned


def _accurate_range(min_accuracy: float, budget: Budget, ladder: Ladder) -> tuple[int, int]:
    """The budget's range without the rungs below `min_accuracy`.

    Policies choose on the frontier, where accuracy grows with cost; only the ends of the range may be others: a budget
    may name a dominated rung, and the full rung belongs to the frontier even if a cheaper one is more accurate.
    """
    within = {budget.floor, budget.ceiling, *(r for r in ladder.frontier if budget.floor <= r <= budget.ceiling)}
    measured = {rung: found for rung in sorted(within) if (found := ladder.rungs[rung].accuracy) is not None}
    if not measured:
        raise InvalidParameter(
            f"min_accuracy={min_accuracy:g} cannot be checked: no accuracy was measured for the points of budget "
            f"{budget.name!r}; leave it out"
        )
    accurate = [rung for rung, accuracy in measured.items() if accuracy >= min_accuracy]
    if not accurate:
        best = max(rung.accuracy or 0 for rung in ladder.rungs)
        raise InvalidParameter(
            f"min_accuracy must be at most {max(measured.values()):g}, the best of budget {budget.name!r} "
            f"(of all points: {best:g}), got {min_accuracy:g}"
        )
    return accurate[0], accurate[-1]
