"""What `python -m loadtest run` does: one run of a schedule, of a closed loop, or as many as a search needs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from loadtest.closed_loop import ClosedPlan, measure_closed
from loadtest.generator import Plan, measure
from loadtest.images import SAMPLE, Images, load_images
from loadtest.live_results import Terms
from loadtest.prediction import Predictor
from loadtest.processes import measure_in_processes
from loadtest.progress import LiveProgress
from loadtest.report import Report
from loadtest.schedule import Mix
from loadtest.search import Objective, Phase, Trial, find_max
from loadtest.subject import Subject
from loadtest.trace import Trace
from loadtest.validity import least_requests


@dataclass(frozen=True)
class Session:
    """A gateway, and how it is measured.

    Attributes:
        images: folder, data set or file; the sample of this repository where it is None.
        seed: of schedules, wishes and images.
        console: for the progress bar.
        processes: that share a schedule.
        loaded: images by class names, so that the trials of a search read and encode them once.
    """

    url: str
    images: Path | None
    terms: Terms
    seed: int
    console: Console
    processes: int = 1
    loaded: dict[tuple[str, ...], Images] = field(default_factory=dict)

    def run(self, trace: Trace, name: str, seed: int | None = None, predict: Path | None = None) -> Report:
        """Offers a schedule, warm-up included.

        Arguments:
            predict: the bundle that is served; the report then says how well the simulator predicted.
        """
        plan = Plan(trace, name, self.terms, self.seed if seed is None else seed)
        predictor = None
        if predict is not None:
            self.console.print("probing the gateway")
            predictor = asyncio.run(Predictor.of(self.url, Subject.load(predict), self._load, self.terms.timeout_s))
        with LiveProgress(len(trace), self.console) as progress:
            shown = progress.update
            if self.processes > 1:
                report = measure_in_processes(self.url, plan, self._load, shown, self.processes)
            else:
                report = asyncio.run(measure(self.url, plan, self._load, lambda recorder: shown(recorder.take_tally())))
        return report if predictor is None else predictor.beside(report, plan)

    def run_closed(self, users: int, duration_s: float, mix: Mix) -> Report:
        """Lets users wait for their answers; `duration_s` is without the warm-up."""
        plan = ClosedPlan(users, self.terms.warmup_s + duration_s, mix, self.terms, self.seed)
        with LiveProgress(None, self.console) as progress:
            shown = progress.update
            return asyncio.run(
                measure_closed(self.url, plan, self._load, lambda recorder: shown(recorder.take_tally()))
            )

    def find_max(
        self,
        start_hz: float,
        duration_s: float,
        objective: Objective,
        draw: Callable[[float, float, int], tuple[str, Trace]],
    ) -> Report:
        """Searches the highest rate at which the objective holds; the report of the last run, with all trials.

        Arguments:
            duration_s: of a trial, without its warm-up; longer where the rate is too low for the percentile.
            draw: description and schedule of this rate, total duration and seed.
        """
        last: Report | None = None

        def trial(phase: Phase, rate_hz: float, seed: int) -> Trial:
            nonlocal last
            # A tenth more: the number of random arrivals varies.
            enough_s = max(duration_s, 1.1 * least_requests(self.terms.percentile) / rate_hz)
            name, trace = draw(rate_hz, self.terms.warmup_s + enough_s, seed)
            self.console.print(f"{phase}: {rate_hz:,.1f} requests/s for {enough_s:.3g} s")
            last = self.run(trace, name, seed)
            return judged(last, objective, phase, rate_hz, seed)

        search = find_max(start_hz, self.seed, objective, trial)
        assert last is not None
        return last.model_copy(update={"search": search})

    def _load(self, labels: tuple[str, ...]) -> Images:
        if labels not in self.loaded:
            self.loaded[labels] = load_images(self.images or SAMPLE, labels)
        return self.loaded[labels]


def judged(report: Report, objective: Objective, phase: Phase, rate_hz: float, seed: int) -> Trial:
    """A run as a trial. One that is not valid does not hold: a rate is found when it can be shown."""
    assert report.live is not None
    unanswered = 1 - report.answered / report.offered if report.offered else 1.0
    return Trial(
        phase=phase,
        rate_hz=rate_hz,
        seed=seed,
        offered=report.offered,
        p99_s=report.latency_s.p99,
        unanswered=unanswered,
        effective_accuracy=report.effective_accuracy,
        missed=objective.missed(report.latency_s.p99, unanswered),
        invalid=report.live.invalid_reasons,
        interrupted=report.live.interrupted,
    )
