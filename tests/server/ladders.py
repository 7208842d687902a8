"""A ladder of four rungs whose batches take 2 ms plus 1.0, 1.2, 1.5 and 2.0 ms an image; accuracies 0.80 to 0.90."""

from __future__ import annotations

from server.budgets import Budget
from server.deadline_queue import Request
from server.ladder import Ladder, Rung
from server.latency import LatencyModel
from server.policies.base import Policy
from server.policies.fixed import Fixed
from server.scheduler import Limits, Scheduler
from vmoe.operating_point import OperatingPoint

BASE_S = 0.002
IMAGE_S = (0.0010, 0.0012, 0.0015, 0.0020)
ACCURACY = (0.80, 0.85, 0.88, 0.90)
MAX_BATCH = 8
FULL = 3


def ladder() -> Ladder:
    rungs = [Rung(OperatingPoint(0.25 * (i + 1), 1), (i + 1,), ACCURACY[i], ACCURACY[i], None) for i in range(4)]
    return Ladder(rungs, range(4))


def latency(*, sigma: float = 0.0, quantile: float = 0.9) -> LatencyModel:
    """Sigma is at least 0.02 in the model: q-quantiles lie 2.6 % above the medians at q = 0.9."""
    sizes = (1, 2, 4, 8)
    table = [[BASE_S + image_s * size for size in sizes] for image_s in IMAGE_S]
    return LatencyModel(table, [sigma] * len(sizes), sizes, MAX_BATCH, quantile)


AUTO = Budget("auto", 0, FULL, 0.1)


def request(
    arrival_s: float = 0.0,
    budget: Budget = AUTO,
    *,
    deadline_s: float | None = None,
    floor: int | None = None,
    ceiling: int | None = None,
    size_bytes: int = 0,
) -> Request:
    """A request of a budget; its deadline and its range may differ."""
    return Request(
        arrival_s,
        arrival_s + budget.deadline_s if deadline_s is None else deadline_s,
        budget,
        budget.floor if floor is None else floor,
        budget.ceiling if ceiling is None else ceiling,
        size_bytes,
    )


def scheduler(policy: Policy | None = None, **limits: int) -> Scheduler:
    return Scheduler(ladder(), latency(), policy or Fixed(), Limits(**{"max_batch_size": MAX_BATCH, **limits}))
