"""Query parameters of /classify, and the operating point that they ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from server.errors import InvalidParameter
from server.metrics import CUSTOM
from server.policy import Budget, Decision, FixedPolicy

_DEFAULT_TOP = 5


class ClassifyQuery(BaseModel):
    """As they stand in the URL; an unknown name is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: Annotated[
        Budget | None,
        Field(description="How much compute the image may use. Default `auto`. Not together with `capacity_factor`."),
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
        budget: name of the budget, or `custom`; a label of the metrics.
        decision: the operating point; None for a dense model.
        top: number of predictions.
        explain: whether to say which patches the experts processed.
    """

    budget: str
    decision: Decision | None
    top: int
    explain: bool


def interpret(query: ClassifyQuery, policy: FixedPolicy, num_classes: int) -> Ask:
    """Checks what the schema cannot know.

    Raises:
        InvalidParameter: the message says what is allowed.
    """
    if query.top is not None and query.top > num_classes:
        raise InvalidParameter(f"top must be between 1 and {num_classes}, the number of classes, got {query.top}")
    top = min(_DEFAULT_TOP, num_classes) if query.top is None else query.top
    factor, experts = query.capacity_factor, query.num_selected_experts
    if factor is None and experts is None:
        budget = query.budget or "auto"
        return Ask(budget, policy.for_budget(budget), top, query.explain)
    if factor is None or experts is None:
        missing = "capacity_factor" if factor is None else "num_selected_experts"
        raise InvalidParameter(f"capacity_factor and num_selected_experts go together; {missing} is missing")
    if query.budget is not None:
        raise InvalidParameter(
            f"budget={query.budget} and capacity_factor={factor:g} exclude each other: send a budget or a point"
        )
    return Ask(CUSTOM, policy.for_point(factor, experts), top, query.explain)
