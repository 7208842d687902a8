"""Time of a decision while 1,000 requests wait: `python -m tests.benchmarks.decision_time`.

Deadlines are lax (10 s), so that 1,000 requests are admitted. Of mixed budgets every fifth request is of each default
budget: the costliest case, since floors and ceilings differ within a batch.
"""

from __future__ import annotations

import time
from itertools import count, cycle
from statistics import median

from loadtest.subject import Subject
from server.budgets import DEFAULT_BUDGET
from server.deadline_queue import Request
from server.policy_file import POLICY_NAMES, PolicyName, parse_policy

WAITING = 1000
DECISIONS = 100
_GAP_S = 0.001  # between arrivals, on the virtual clock: the arrival-rate estimate has something to see


def decision_us(subject: Subject, policy: PolicyName, *, mixed: bool, decisions: int = DECISIONS) -> float:
    """Median microseconds of `Scheduler.next_batch` with `WAITING` requests in the queue."""
    names = ("low", "medium", "high", "max", "auto") if mixed else (DEFAULT_BUDGET,)
    tables = "".join(f"[budgets.{name}]\ndeadline_ms = 10000\n" for name in names)
    active = parse_policy(f'policy = "{policy}"\n{tables}', subject.manifest, subject.ladder, "benchmark")
    scheduler = subject.scheduler(active)
    budgets = cycle([active.budgets[name] for name in names])
    clock = count()
    now, waiting, taken = 0.0, 0, []
    for _ in range(decisions):
        for _ in range(WAITING - waiting):
            now = next(clock) * _GAP_S
            budget = next(budgets)
            refusal = scheduler.offer(Request(now, now + budget.deadline_s, budget, budget.floor, budget.ceiling), now)
            assert refusal is None, refusal
        before_s = time.perf_counter()
        batch, _ = scheduler.next_batch(now)
        taken.append(time.perf_counter() - before_s)
        assert batch is not None
        waiting = WAITING - len(batch.requests)
        scheduler.on_batch_done(batch, now + batch.median_s)
    return 1e6 * median(taken)


def decision_times(subject: Subject) -> dict[str, dict[str, float]]:
    """By policy: microseconds with one budget and with five."""
    return {
        policy: {
            "uniform_us": decision_us(subject, policy, mixed=False),
            "mixed_us": decision_us(subject, policy, mixed=True),
        }
        for policy in POLICY_NAMES
    }


if __name__ == "__main__":
    from tests.benchmarks.policies import BUNDLE

    for name, times in decision_times(Subject.load(BUNDLE)).items():
        print(f"{name:12} uniform {times['uniform_us']:6.0f} us   mixed {times['mixed_us']:6.0f} us")
