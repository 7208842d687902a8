from __future__ import annotations

import signal

import pytest

from loadtest.subject import Subject
from loadtest.tuner.bench import Bench
from loadtest.tuner.objective import Goal, Objective
from loadtest.tuner.search import Candidate, best, front, search
from loadtest.tuner.stopping import Stop
from server.policy_file import POLICY_NAMES, default_policy

OBJECTIVE = Objective(Goal.effective_accuracy, p99_ms=60, max_shed=0.2)
TRIALS = 12


def run(subject: Subject, bench: Bench, seed: int, trials: int = TRIALS) -> list[Candidate]:
    found, count = search(
        bench,
        OBJECTIVE,
        subject.policy("foresight").config,
        trials=trials,
        seed=seed,
        progress=lambda done, best: None,
        stopped=lambda: False,
    )
    assert count == trials
    return found


@pytest.fixture(scope="module")
def found(subject: Subject, bench: Bench) -> list[Candidate]:
    return run(subject, bench, seed=5)


def test_search_when_it_begins_then_the_default_policy_is_trial_0_and_every_policy_follows(
    subject: Subject, found: list[Candidate]
) -> None:
    assert found[0].number == 0
    for each in found[: len(POLICY_NAMES)]:
        name = each.active.config.policy
        assert each.active.config == default_policy(subject.manifest, subject.ladder, name).config
    assert found[0].active.config.policy == "foresight"
    assert {each.active.config.policy for each in found[: len(POLICY_NAMES)]} == set(POLICY_NAMES)


def test_search_when_repeated_with_the_same_seed_then_trials_and_figures_are_the_same(
    subject: Subject, bench: Bench, found: list[Candidate]
) -> None:
    def seen(candidates: list[Candidate]) -> list[object]:
        return [(each.number, each.active.text, each.figures) for each in candidates]

    assert seen(run(subject, bench, seed=5)) == seen(found)
    assert [each.active.text for each in run(subject, bench, seed=6)] != [each.active.text for each in found]


def test_best_when_asked_then_no_other_ranks_before_it(found: list[Candidate]) -> None:
    chosen = best(found)
    assert all(chosen.verdict.rank <= each.verdict.rank for each in found)


def test_front_when_asked_then_everybody_is_covered_and_no_member_by_another(found: list[Candidate]) -> None:
    members = front(found)
    assert members

    def covers(one: Candidate, other: Candidate) -> bool:
        return one.verdict.gain >= other.verdict.gain and one.verdict.p99_ms <= other.verdict.p99_ms

    for each in found:
        assert any(covers(member, each) for member in members)
    for member in members:
        assert [each for each in members if covers(each, member)] == [member]


def test_search_when_stopped_then_it_ends_after_the_trial_and_keeps_what_it_has(subject: Subject, bench: Bench) -> None:
    stop = Stop()

    def interrupt(done: int, best: Candidate) -> None:
        if done == 2:
            signal.raise_signal(signal.SIGINT)

    with stop.on_interrupt():
        candidates, trials = search(
            bench,
            OBJECTIVE,
            subject.policy("foresight").config,
            trials=1000,
            seed=1,
            progress=interrupt,
            stopped=stop,
        )
    assert (trials, len(candidates)) == (2, 2)


def test_stop_when_interrupted_twice_then_the_second_is_a_keyboard_interrupt() -> None:
    before = signal.getsignal(signal.SIGINT)
    stop = Stop()
    with stop.on_interrupt():
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
