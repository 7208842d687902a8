"""How much effective accuracy could anybody reach who knows the trace beforehand? An upper bound, by two methods.

Both bound every schedule of the noise-free machine: a batch takes exactly its median in the latency model. With noise
of mean 1 they are a reference that holds on average. Weights, admission and the bounds of the queue bind no oracle.

**Work of an image.** Images of a batch in descending order of rung, T[q](m) the time of m images at rung q: the images
at rung q or above are the first m_q, and layer by layer

    latency = T[0](n) + sum over q >= 1 of (T[q](m_q) - T[q-1](m_q)) >= sum over images i of work(p_i),
    work(p) = min_m T[0](m) / m + sum over q = 1..p of min_m (T[q](m) - T[q-1](m)) / m,

m up to the largest batch that fits into the deadline. An image at rung p takes at least work(p) of machine time between
its arrival and its deadline, whatever its batch mates. (T[p](n) / n alone is no such bound: a cheap image behind a full
one pays only its increment.) Rungs that are left out of the layers cost as much as the next lower one that is not.

**Fluid.** Let every request take any amount x of machine time in its window, from all workers at once, and earn h(x):
the concave envelope of (0, 0) and (work(p), accuracy(p)) over its rungs. Every schedule is such an allocation and earns
no more. The amounts that can be served form a polymatroid (windows against time: a transportation problem), so the
greedy by slope is optimal for the separable concave sum (Federgruen and Groenevelt 1986):

    bound = sum over slopes v_1 > v_2 > ... of (v_k - v_{k+1}) F_k,

F_k the most work that can be done when every request demands its pieces of slope >= v_k alone. F_k comes from serving
the earliest deadline first, with preemption: windows are intervals, and giving each instant to the earliest deadline
present is a largest matching in a convex bipartite graph (Glover 1967).

**Batches** (`loadtest.batch_bound`), for one worker and one class with one deadline: the optimum over real batches on a
time grid rounded in favour of the schedule. Where both apply, the smaller is reported.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from loadtest.batch_bound import STEPS_PER_BATCH, batch_bound
from loadtest.report import Oracle
from loadtest.simulator import Machine, budgets_of
from loadtest.trace import Trace
from server.budgets import Budget
from server.ladder import Ladder
from server.policy_file import ActivePolicy

FLUID: Final = "fluid: preemptive, fractional, every image in its cheapest batch"
BATCHES: Final = "batches: optimal batches on a time grid, rounded in favour of the schedule"
_EPSILON_S: Final = 1e-9  # sums of floats in another order; in favour of the schedule

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Demand:
    """Requests of one kind.

    Attributes:
        arrival_s, deadline_s: (M,) absolute; the longest window stands for all when batches are chosen.
        rungs: those at which they may be answered, ascending.
    """

    arrival_s: Floats
    deadline_s: Floats
    rungs: tuple[int, ...]


def oracle(
    trace: Trace,
    active: ActivePolicy,
    ladder: Ladder,
    machine: Machine,
    *,
    workers: int,
    steps_per_batch: int | None = STEPS_PER_BATCH,
    progress: Callable[[float], None] = lambda done: None,
) -> Oracle | None:
    """The bound on a trace; None where the accuracy of a rung is unknown.

    Arguments:
        active: gives budgets with their ranges and deadlines; its policy does not matter.
        steps_per_batch: how fine the grid of the bound over batches is; None for the fluid bound alone, which takes a
            second instead of up to a minute.
    """
    accuracies = [rung.accuracy for rung in ladder.rungs if rung.accuracy is not None]
    if len(accuracies) < len(ladder):
        return None
    if not len(trace):
        return Oracle(effective_accuracy=0.0, method=FLUID)
    values = np.array(accuracies)
    # A machine that is slower for a while is bounded by one that never is.
    speed = min(machine.slowdown, 1.0) if machine.slow_until_s < np.inf or machine.slow_from_s > 0 else machine.slowdown
    medians_s = np.array(machine.latency.median_s) * speed
    budgets = budgets_of(trace, active)
    relative_s = np.where(
        np.isnan(trace.deadline_s), np.array([b.deadline_s for b in budgets])[trace.budget], trace.deadline_s
    )
    demands = _demands(trace, budgets, relative_s, medians_s)
    bound, method = fluid_bound(demands, values, medians_s, workers), FLUID
    alike = len(demands) == 1 and np.ptp(relative_s) == 0
    if steps_per_batch is not None and workers == 1 and alike:
        tighter = batch_bound(
            demands[0].arrival_s,
            float(relative_s[0]),
            demands[0].rungs,
            values,
            medians_s,
            steps_per_batch=steps_per_batch,
            progress=progress,
        )
        if tighter < bound:
            bound, method = tighter, BATCHES
    return Oracle(effective_accuracy=bound / len(trace), method=method)


def _demands(trace: Trace, budgets: Sequence[Budget], relative_s: Floats, medians_s: Floats) -> list[Demand]:
    """Requests by budget and by what their deadline, from the arrival, has room for: the same rungs and batch sizes."""
    limits_s = np.sort(np.concatenate([medians_s[0, 1:], medians_s[:, 1]]))
    room = np.searchsorted(limits_s, relative_s + _EPSILON_S, side="right")
    kinds, kind = np.unique(np.stack([trace.budget, room]), axis=1, return_inverse=True)
    return [
        Demand(
            trace.arrival_s[kind == index],
            (trace.arrival_s + relative_s)[kind == index],
            tuple(range(budgets[code].floor, budgets[code].ceiling + 1)),
        )
        for index, code in enumerate(kinds[0].tolist())
    ]


def fluid_bound(
    demands: Sequence[Demand],
    values: Floats,
    medians_s: Floats,
    workers: int,
) -> float:
    """Most value that can be earned.

    Arguments:
        values: (P,) of an answer in time at each rung.
        medians_s: (P, N + 1) of n images at each rung; what the n-th adds does not descend in the rung.
    """
    layers = _layers(demands, values, medians_s)
    envelopes = [_envelope(demand, values, medians_s, layers) for demand in demands]
    slopes = sorted({slope for envelope in envelopes for slope, _ in envelope}, reverse=True)
    total = 0.0
    for slope, following in pairwise([*slopes, 0.0]):
        work_s = [sum(piece_s for steepness, piece_s in envelope if steepness >= slope) for envelope in envelopes]
        total += (slope - following) * workers * _most_work_s(demands, [amount / workers for amount in work_s])
    return total


def _layers(demands: Sequence[Demand], values: Floats, medians_s: Floats) -> list[int]:
    """The rungs by which work is counted: the cheapest, the ends of every range, and the corners of the envelope.

    Each further layer makes the sum of minima a little smaller, so there should be no more than matter.
    """
    sizes = np.arange(1, medians_s.shape[1])
    alone_s = (medians_s[:, 1:] / sizes).min(axis=1)
    corners = _corners([(float(alone_s[rung]), float(values[rung])) for rung in range(len(values))])
    ends = {rung for demand in demands for rung in (demand.rungs[0], demand.rungs[-1])}
    return sorted({0, *ends, *corners})


def _envelope(demand: Demand, values: Floats, medians_s: Floats, layers: Sequence[int]) -> list[tuple[float, float]]:
    """(slope, s) of each piece of h, steepest first; none where no answer can be in time."""
    relative_s = float((demand.deadline_s - demand.arrival_s).max()) + _EPSILON_S
    most = int(np.searchsorted(medians_s[0], relative_s, side="right")) - 1
    if most < 1:
        return []
    sizes = np.arange(1, most + 1)
    chosen = medians_s[list(layers), 1 : most + 1]
    steps_s = (np.diff(chosen, axis=0, prepend=0.0) / sizes).min(axis=1)
    work_s = dict(zip(layers, np.cumsum(steps_s).tolist(), strict=True))
    points = [
        (work_s[max(layer for layer in layers if layer <= rung)], float(values[rung]))
        for rung in demand.rungs
        if medians_s[rung, 1] <= relative_s
    ]
    corners = [(0.0, 0.0), *(points[i] for i in _corners(points))]
    return [((b[1] - a[1]) / (b[0] - a[0]), b[0] - a[0]) for a, b in pairwise(corners)]


def _corners(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the corners of the concave envelope of (0, 0) and `points`, which ascend in their first coordinate."""
    best: list[int] = []
    for index, (x, y) in enumerate(points):
        if best and y <= points[best[-1]][1]:
            continue
        while best:
            x1, y1 = points[best[-1]]
            x0, y0 = points[best[-2]] if len(best) > 1 else (0.0, 0.0)
            if (y1 - y0) * (x - x0) > (y - y0) * (x1 - x0):
                break
            best.pop()
        best.append(index)
    return best


def _most_work_s(demands: Sequence[Demand], work_s: Sequence[float]) -> float:
    """Most time that one machine can spend on the demands, each request `work_s` of its kind at most."""
    kinds = [(demand, amount) for demand, amount in zip(demands, work_s, strict=True) if amount > 0]
    if not kinds:
        return 0.0
    arrival_s = np.concatenate([demand.arrival_s for demand, _ in kinds])
    deadline_s = np.concatenate([demand.deadline_s for demand, _ in kinds])
    amount_s = np.concatenate([np.full(len(demand.arrival_s), amount) for demand, amount in kinds])
    order = np.argsort(arrival_s, kind="stable")
    rows = zip(arrival_s[order].tolist(), deadline_s[order].tolist(), amount_s[order].tolist(), strict=True)
    waiting: list[tuple[float, float]] = []  # (deadline, work left), earliest deadline first
    now = done = 0.0
    for arrives_s, due_s, left_s in (*rows, (float("inf"), 0.0, 0.0)):
        while waiting and now < arrives_s:
            head_due_s, head_left_s = waiting[0]
            useful_s = min(head_left_s, head_due_s - now)
            if useful_s <= 0:
                heapq.heappop(waiting)
                continue
            step_s = min(useful_s, arrives_s - now)
            now += step_s
            done += step_s
            if step_s < useful_s:
                heapq.heapreplace(waiting, (head_due_s, head_left_s - step_s))
            else:
                heapq.heappop(waiting)
        now = max(now, arrives_s)
        heapq.heappush(waiting, (due_s, left_s))
    return done
