"""How well does the simulator predict a live run? The same trace and policy, on a machine calibrated beforehand.

probe of the gateway -> calibration      before the run, so that nothing is fitted to what is compared
live run             -> report           measured
trace, policy, calibration -> simulator  predicted: `Report.prediction`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from loadtest.calibration import Calibration, calibrate, probe
from loadtest.client import connect
from loadtest.errors import LoadtestError
from loadtest.generator import Plan
from loadtest.images import Images
from loadtest.report import Compared, PolicyUsed, Prediction, Report, Setup, summarise
from loadtest.simulator import Machine, simulate
from loadtest.subject import Subject
from server.budgets import Budget
from server.policy_file import ActivePolicy, PolicyConfig
from server.schemas import BudgetPoint, PolicyBody


@dataclass(frozen=True)
class Predictor:
    """A gateway to simulate.

    Attributes:
        active: its policy; max_batch_size, workers: its limits.
    """

    subject: Subject
    active: ActivePolicy
    calibration: Calibration
    max_batch_size: int
    workers: int

    @classmethod
    async def of(
        cls, url: str, subject: Subject, images: Callable[[tuple[str, ...]], Images], timeout_s: float
    ) -> Predictor:
        """Probes the gateway at `url`, which nobody else may use meanwhile.

        Raises:
            LoadtestError: it serves something else, or says too little.
        """
        async with connect(url, timeout_s) as client:
            target = client.target
            if target.model != subject.manifest.name:
                raise LoadtestError(
                    f"the gateway serves {target.model}, and {subject.directory} is {subject.manifest.name}: "
                    "give the bundle that it serves"
                )
            body = await client.policy()
            active = policy_in_force(body, subject)
            found = await probe(client, images(target.labels))
        size = body.max_batch_size
        return cls(subject, active, calibrate(found, subject, size), size, body.workers)

    def predict(self, plan: Plan, offered: int | None = None) -> Report:
        """Simulates a plan.

        Arguments:
            offered: requests after the warm-up that count; None for all.
        """
        calibration, trace, warmup_s = self.calibration, plan.trace, plan.terms.warmup_s
        scheduler = self.subject.scheduler(self.active, max_batch_size=self.max_batch_size, workers=self.workers)
        for batch in calibration.batches:  # the gateway's model has seen them
            scheduler.latency.observe(batch.rungs, batch.seconds)
        machine = Machine(
            self.subject.latency(self.max_batch_size),
            noise=calibration.noise,
            slowdown=calibration.slowdown,
            seed=plan.seed,
            surroundings=calibration.surroundings,
        )
        outcomes = simulate(trace, scheduler, self.active, machine, grace_s=plan.terms.grace_s)
        first = int(np.searchsorted(trace.arrival_s, warmup_s))
        keep = slice(first, None if offered is None else first + offered)
        setup = Setup(
            kind="simulated",
            policy=PolicyUsed(name=self.active.config.policy, source=self.active.source),
            bundle=str(self.subject.directory),
            manifest_sha256=self.subject.manifest_sha256,
            trace=plan.trace_name,
            trace_sha256=trace.sha256,
            workers=self.workers,
            max_batch_size=self.max_batch_size,
            seed=plan.seed,
            noise=calibration.noise,
            slowdown=calibration.slowdown,
            surroundings=calibration.surroundings,
        )
        return summarise(trace.part(keep, warmup_s), outcomes.part(keep), self.subject.ladder, setup)

    def beside(self, measured: Report, plan: Plan) -> Report:
        """The report of a live run of `plan` with the prediction added."""
        predicted = self.predict(plan, measured.offered)
        calibration = self.calibration
        prediction = Prediction(
            slowdown=calibration.slowdown,
            noise=calibration.noise,
            surroundings=calibration.surroundings,
            crowd_hz=calibration.crowd_hz,
            slo_attainment=_compared(predicted.slo_attainment, measured.slo_attainment),
            effective_accuracy=_compared(predicted.effective_accuracy, measured.effective_accuracy),
            shed_ratio=_compared(predicted.shed_ratio, measured.shed_ratio),
            p50_s=_compared(predicted.latency_s.p50, measured.latency_s.p50),
            p99_s=_compared(predicted.latency_s.p99, measured.latency_s.p99),
        )
        return measured.model_copy(update={"prediction": prediction})


def policy_in_force(body: PolicyBody, subject: Subject) -> ActivePolicy:
    """What a gateway says of its policy, for a bundle.

    Raises:
        LoadtestError: it names a point that the bundle does not have.
    """
    tables = {body.policy: body.parameters} if body.parameters else {}  # `fixed` has none
    # Not strict: the gateway gives every parameter as a float.
    config = PolicyConfig.model_validate({"policy": body.policy, "quantile": body.quantile, **tables}, strict=False)
    rungs = {
        (rung.point.capacity_factor, rung.num_selected_experts): place
        for place, rung in enumerate(subject.ladder.rungs)
        if rung.point is not None
    }

    def rung(point: BudgetPoint | None) -> int:
        found = None if point is None else rungs.get((point.capacity_factor, point.num_selected_experts))
        if found is None:
            raise LoadtestError(
                f"the gateway's policy names the point {point}, which {subject.directory} does not have: "
                "give the bundle that it serves"
            )
        return found

    budgets = {
        name: Budget(name, rung(budget.floor), rung(budget.ceiling), budget.deadline_ms / 1000, budget.weight)
        for name, budget in body.budgets.items()
    }
    return ActivePolicy(config, budgets, body.source, text="")


def _compared(predicted: float | None, measured: float | None) -> Compared:
    difference = None if predicted is None or measured is None else predicted - measured
    return Compared(predicted=predicted, measured=measured, difference=difference)
