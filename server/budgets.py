"""Named classes of requests: between which rungs they may be served, how soon, and at what weight.

Defaults for a bundle follow from its manifest, so that every exported model can be served without a policy.toml:

    low      the cheapest rung, always
    medium   up to the rung a third of the way up in relative compute, down to the cheapest
    high     up to the rung two thirds of the way up, down to `medium`'s
    max      the full rung, always
    auto     up to the full rung, down to the cheapest

(chosen, not tuned: even steps in cost). The deadline leaves room for a batch that is running and a batch of its own:
4 batches of 8 at the full rung, at least 100 ms, in round numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from exporter.bundle import Manifest
from server.ladder import Ladder

DEFAULT_BUDGET = "auto"
_SHARES = {"medium": 1 / 3, "high": 2 / 3}
_BATCH, _BATCHES, _LEAST_S = 8, 4, 0.1


@dataclass(frozen=True)
class Budget:
    """A class of requests.

    Attributes:
        name: as in `budget=`.
        floor, ceiling: rungs of the ladder; the cheapest it may be degraded to, and the best it may use.
        deadline_s: from the end of the upload to the answer.
        weight: share of the machine under contention, relative to the other classes.
    """

    name: str
    floor: int
    ceiling: int
    deadline_s: float
    weight: float = 1.0


def default_budgets(manifest: Manifest, ladder: Ladder) -> dict[str, Budget]:
    """The five budgets that every bundle has."""
    cheapest, full = ladder.frontier[0], ladder.full
    ceilings = {"low": cheapest, "medium": full, "high": full, "max": full, "auto": full}
    if manifest.points:
        compute = [point.relative_compute for point in manifest.points]
        for name, share in _SHARES.items():
            target = compute[cheapest] + share * (compute[full] - compute[cheapest])
            # Ties go to the more accurate rung, which stands later.
            ceilings[name] = min(reversed(ladder.frontier), key=lambda rung: abs(compute[rung] - target))
    floors = {"low": cheapest, "medium": cheapest, "high": ceilings["medium"], "max": full, "auto": cheapest}
    deadline_s = default_deadline_s(manifest)
    return {name: Budget(name, floors[name], ceilings[name], deadline_s) for name in ceilings}


def default_deadline_s(manifest: Manifest) -> float:
    """A deadline that the profiled machine can hold; 1 s where there is no profile."""
    latency = manifest.points[-1].latency if manifest.points else ()
    batch = next((entry for entry in latency if entry.batch_size >= _BATCH), latency[-1] if latency else None)
    if batch is None:
        return 1.0
    return max(_LEAST_S, _round_up(_BATCHES * batch.median_s))


def _round_up(seconds: float) -> float:
    """To the next of 1, 2, 5, 10, ... milliseconds and their powers of ten."""
    decade = 10.0 ** math.floor(math.log10(seconds))
    return next(round(decade * step, 9) for step in (1, 2, 5, 10) if decade * step >= seconds * (1 - 1e-9))


def check_budgets(budgets: Mapping[str, Budget], ladder: Ladder) -> None:
    """Raises `ValueError` unless the default budget exists and floors lie below ceilings."""
    if DEFAULT_BUDGET not in budgets:
        raise ValueError(f"budget {DEFAULT_BUDGET!r} is missing: it serves requests that name none")
    for budget in budgets.values():
        if budget.floor > budget.ceiling:
            raise ValueError(
                f"budget {budget.name!r}: its floor must cost no more than its ceiling, "
                f"got the floor {ladder.rungs[budget.floor].name} above the ceiling {ladder.rungs[budget.ceiling].name}"
            )
