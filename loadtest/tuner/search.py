"""The search: optuna's multi-objective TPE, seeded, one trial after the other: a seed gives the same trials everywhere.

It maximises the gain and minimises the 99th percentile, under the constraints of the objective. Trial 0 is the default
policy with default parameters, then come the other policies with theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import optuna

from loadtest.tuner.bench import Bench, RunAll, one_by_one
from loadtest.tuner.objective import Objective, Verdict, judge
from loadtest.tuner.space import candidate, defaults, suggest
from server.policy_file import POLICY_NAMES, ActivePolicy, PolicyConfig
from server.provenance import Expected


@dataclass(frozen=True, eq=False)
class Candidate:
    """A policy and what the search saw of it.

    Attributes:
        number: of the trial that proposed it first.
        figures: one per load.
    """

    number: int
    active: ActivePolicy
    figures: tuple[Expected, ...]
    verdict: Verdict


def search(
    bench: Bench,
    objective: Objective,
    base: PolicyConfig,
    *,
    trials: int,
    seed: int,
    progress: Callable[[int, Candidate], None],
    stopped: Callable[[], bool],
    run_all: RunAll = one_by_one,
) -> tuple[list[Candidate], int]:
    """Every policy that was tried, in the order of trials, and their number; what is proposed again is not run again.

    Arguments:
        base: its budgets are kept.
        progress: called after each trial with their number and the best candidate yet.
        stopped: asked after each trial.

    Raises:
        LoadtestError: the goal is unknown on this bundle.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    names = sorted(POLICY_NAMES, key=lambda name: name != PolicyConfig().policy)  # the default first
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=optuna.samplers.TPESampler(seed=seed))
    for name in names:
        study.enqueue_trial(defaults(name))
    found: dict[str, Candidate] = {}
    for number in range(trials):
        trial = study.ask()
        active = candidate(suggest(trial, names), base, bench.subject, f"trial {number}")
        if active.text not in found:
            figures = bench.figures(active, run_all)
            found[active.text] = Candidate(number, active, figures, judge(objective, figures))
        verdict = found[active.text].verdict
        trial.set_constraint("p99_ms", verdict.p99_ms - objective.p99_ms)
        trial.set_constraint("shed_ratio", verdict.shed_ratio - objective.max_shed)
        study.tell(trial, (verdict.gain, verdict.p99_ms))
        progress(number + 1, best(list(found.values())))
        if stopped():
            break
    return list(found.values()), number + 1


def best(candidates: Sequence[Candidate]) -> Candidate:
    """By the objective; the earlier of two that are alike."""
    return min(candidates, key=lambda each: (each.verdict.rank, each.number))


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats in both gain and 99th percentile, by gain."""
    kept: list[Candidate] = []
    admitting = [each for each in candidates if all(figures.p99_ms is not None for figures in each.figures)]
    for each in sorted(admitting, key=lambda each: (-each.verdict.gain, each.verdict.p99_ms, each.number)):
        if all(each.verdict.p99_ms < other.verdict.p99_ms for other in kept):
            kept.append(each)
    return kept
