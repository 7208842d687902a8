"""What a gateway costs beside the profile: a short probe of one that nobody else uses, and what explains it.

    alone     one user          latency and stages without competition
    crowd     32 users          throughput, batches, the loop's work per answer
    refused   a deadline of 1 ms, which none can meet: the loop's work per refusal

All users send their next image when they have the last answer. The loop's work is its processor time by the gateway's
own metric, so it does not depend on who else runs. With N answers in B batches in the T s of the crowd:

    slowdown    measured over profiled time of a batch of one, alone
    batch_s     (work per answer alone - in the crowd) / (1 - B / N): alone every answer has a batch of its own
    front_s, refuse_s    half each of the work per refusal; where the line lies between them changes no total
    answer_s    the rest of the work per answer
    way_s       what is left of the latency alone
    contention  T = B batch_s + slowdown * (profiled time of all batches) + contention * (all other work beside them)

A contention outside 0 to 1 has no meaning here; it is cut, and the slowdown then closes the account of the crowd. So a
saturated gateway is as fast simulated as it was measured, and a lonely request takes as long; unless the crowd shows a
machine so much slower that no way is left to take from.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loadtest.client import Answered, Client, Reply, Shed
from loadtest.errors import LoadtestError
from loadtest.images import Images
from loadtest.subject import Subject
from loadtest.surroundings import Surroundings
from server.budgets import DEFAULT_BUDGET

# Chosen, not tuned: twice the gateway's default batch, so that the next batch is full when one ends.
CROWD = 32
# Chosen, not tuned: a second of a small model is a few hundred answers; their medians are stable to a few percent.
ALONE_S, SETTLE_S, CROWD_S, REFUSED_S = 1.0, 0.5, 2.0, 0.5
_PATIENT_MS, _HOPELESS_MS = 5000.0, 1.0
_LEAST = 20  # answers alone and in the crowd: of fewer, medians say little
_QUARTILES = 1.349  # between the quartiles of a normal distribution lie so many standard deviations


@dataclass(frozen=True)
class Phase:
    """Replies in the order in which they came, each with its latency and its time; s.

    Attributes:
        elapsed_s, loop_cpu_s: from the first request to the last reply.
    """

    replies: Sequence[tuple[Reply, float, float]]
    elapsed_s: float
    loop_cpu_s: float

    @property
    def answers(self) -> list[tuple[Answered, float, float]]:
        return [(reply, latency_s, at_s) for reply, latency_s, at_s in self.replies if isinstance(reply, Answered)]


@dataclass(frozen=True)
class Probe:
    """What was seen; see the module."""

    alone: Phase
    crowd: Phase
    refused: Phase


@dataclass(frozen=True)
class BatchSeen:
    """Rungs of a batch, and how long it took."""

    rungs: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Calibration:
    """A machine to simulate.

    Attributes:
        surroundings, slowdown, noise: see `Surroundings` and `Machine`.
        batches: of the probe; the gateway has learned from them, and so must a simulated scheduler.
        crowd_hz: answers per second to `CROWD` users.
    """

    surroundings: Surroundings
    slowdown: float
    noise: float
    crowd_hz: float
    batches: tuple[BatchSeen, ...]


async def probe(client: Client, images: Images, crowd_s: float = CROWD_S) -> Probe:
    """Takes about 2 s more than `crowd_s`."""
    alone = await _closed(client, images, 1, ALONE_S, _PATIENT_MS)
    await _closed(client, images, CROWD, SETTLE_S, _PATIENT_MS)
    crowd = await _closed(client, images, CROWD, crowd_s, _PATIENT_MS)
    return Probe(alone, crowd, await _closed(client, images, CROWD, REFUSED_S, _HOPELESS_MS))


async def _closed(client: Client, images: Images, users: int, duration_s: float, deadline_ms: float) -> Phase:
    address = client.address(DEFAULT_BUDGET, deadline_ms)
    replies: list[tuple[Reply, float, float]] = []
    cpu_s, start_s = await client.loop_cpu_s(), time.monotonic()
    end_s = start_s + duration_s

    async def user(image: int) -> None:
        while (sent_s := time.monotonic()) < end_s:
            headers = {"Content-Type": images.media_types[image]}
            reply = await client.classify(address, images.bodies[image], headers)
            at_s = time.monotonic()
            replies.append((reply, at_s - sent_s, at_s))
            image = (image + users) % len(images)

    await asyncio.gather(*(user(number % len(images)) for number in range(users)))
    elapsed_s = time.monotonic() - start_s
    return Phase(replies, elapsed_s, await client.loop_cpu_s() - cpu_s)


def calibrate(found: Probe, subject: Subject, max_batch_size: int) -> Calibration:
    """The machine that explains a probe.

    Raises:
        LoadtestError: the probe says too little, or is of another model.
    """
    alone, crowd = found.alone.answers, found.crowd.answers
    if min(len(alone), len(crowd)) < _LEAST:
        raise LoadtestError(
            f"the probe of the gateway got {len(alone)} answers alone and {len(crowd)} in the crowd, "
            f"{_LEAST} are needed"
        )
    latency = subject.latency(max_batch_size)
    batches = batches_of(crowd, subject, max_batch_size)
    # Alone, per answer.
    rungs = Counter(_rung(reply, subject) for reply, _, _ in alone)
    (rung, _), *_ = rungs.most_common(1)
    alone_s = np.array([reply.inference_s for reply, _, _ in alone if _rung(reply, subject) == rung])
    slowdown = float(np.median(alone_s)) / latency.uniform_s(rung, 1)
    low, high = np.quantile(np.log(alone_s), (0.25, 0.75))
    noise = float(high - low) / _QUARTILES / latency.sigma[1]
    decode_s = float(np.median([reply.decode_s for reply, _, _ in alone]))
    # The loop, per request.
    batches_per_answer = len(batches) / len(crowd)
    loop_alone_s, loop_crowd_s = (phase.loop_cpu_s / len(phase.replies) for phase in (found.alone, found.crowd))
    batch_s = 0.0
    if batches_per_answer < 1:
        batch_s = min(max((loop_alone_s - loop_crowd_s) / (1 - batches_per_answer), 0.0), loop_crowd_s)
    request_s = loop_crowd_s - batch_s * batches_per_answer
    refusals = [reply for reply, _, _ in found.refused.replies if isinstance(reply, Shed)]
    refusal_s = found.refused.loop_cpu_s / len(refusals) if len(refusals) == len(found.refused.replies) else request_s
    front_s = min(refusal_s / 2, request_s)
    answer_s = request_s - front_s
    loop_s = front_s + decode_s + batch_s + answer_s
    # Together.
    profiled_s = sum(latency.predict_s(batch.rungs) for batch in batches)
    busy_s = found.crowd.elapsed_s - len(batches) * batch_s
    beside_s = len(crowd) * (request_s + decode_s)
    contention = min(max((busy_s - slowdown * profiled_s) / beside_s, 0.0), 1.0)
    slowdown = max((busy_s - contention * beside_s) / profiled_s, slowdown / 2)
    alone_latency_s = float(np.median([seconds for _, seconds, _ in alone]))
    way_s = max(alone_latency_s - slowdown * latency.uniform_s(rung, 1) - loop_s, 0.0)
    return Calibration(
        Surroundings(front_s, decode_s, batch_s, answer_s, refusal_s - front_s, way_s, contention),
        slowdown=slowdown,
        noise=noise,
        crowd_hz=len(crowd) / found.crowd.elapsed_s,
        batches=batches,
    )


def batches_of(
    answers: Sequence[tuple[Answered, float, float]], subject: Subject, max_batch_size: int
) -> tuple[BatchSeen, ...]:
    """The batches in which images were answered, in order: those of one batch share its inference time, which is given
    to the microsecond, and come one soon after the other.

    Raises:
        LoadtestError: the points are not those of the bundle.
    """
    batches: list[BatchSeen] = []
    open_: dict[float, tuple[float, list[int]]] = {}  # by inference time: last answer, rungs
    for reply, _, at_s in answers:
        last_s, rungs = open_.get(reply.inference_s, (at_s, []))
        # Two batches that took equally long: the second cannot end before it has run.
        if rungs and (at_s - last_s >= reply.inference_s or len(rungs) == max_batch_size):
            batches.append(BatchSeen(tuple(rungs), reply.inference_s))
            rungs = []
        open_[reply.inference_s] = (at_s, [*rungs, _rung(reply, subject)])
    return (*batches, *(BatchSeen(tuple(rungs), seconds) for seconds, (_, rungs) in open_.items()))


def _rung(reply: Answered, subject: Subject) -> int:
    experts = reply.point.num_selected_experts or 0
    rung = subject.ladder.find(experts, reply.point.slots)
    if rung is None:
        raise LoadtestError(
            f"the gateway answered at K {experts} with {list(reply.point.slots)} slots, which is no operating point of "
            f"{subject.directory}: give the bundle that it serves"
        )
    return rung
