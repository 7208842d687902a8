"""HTTP to a gateway: what it serves, and one image at a time. The only module that knows aiohttp.

The client shares the machine with what it measures more often than not, so it does little per request: connections are
kept alive, addresses and bodies are built before the run, answers are read with `json` and looked at in five places.
There are as many connections as requests are open at once, because a bounded pool would hold requests back when the
gateway is slow, which is when they count.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
from pydantic import ValidationError
from yarl import URL

from loadtest.batch_counts import BatchCounts
from loadtest.errors import TargetError
from loadtest.outcomes import SERVE_REASONS
from loadtest.trace import Trace
from server.decision import ServeReason, ShedReason
from server.schemas import Models, PolicyBody

# Below uvicorn's 5 s after which it closes an idle connection: a request sent at that moment would fail.
_KEEPALIVE_S = 3.0
_LOOP_TIME: Final = "vmoe_event_loop_cpu_seconds_total"
_LOOP_DECODE: Final = "vmoe_event_loop_decode_cpu_seconds_total"
_SHED: Final[dict[str, ShedReason]] = {"overloaded": "deadline", "over_share": "share", "queue_full": "queue_full"}


@dataclass(frozen=True)
class Target:
    """What a gateway says of itself.

    Attributes:
        labels: class names.
        deadline_s: of each budget.
        workers, max_batch_size: batches at once and images in each; None of something that is no gateway.
    """

    url: str
    model: str
    labels: tuple[str, ...]
    policy: str
    policy_source: str
    deadline_s: Mapping[str, float]
    workers: int | None
    max_batch_size: int | None


@dataclass(frozen=True, slots=True)
class PointUsed:
    """The operating point of an answer; C and K are None for a dense model."""

    capacity_factor: float | None
    num_selected_experts: int | None
    slots: tuple[int, ...]
    accuracy: float | None
    relative_compute: float


@dataclass(frozen=True, slots=True)
class Answered:
    """A classification."""

    point: PointUsed
    index: int
    reason: ServeReason
    deadline_met: bool
    queue_s: float
    inference_s: float
    decode_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Shed:
    """Refused on arrival."""

    reason: ShedReason


@dataclass(frozen=True, slots=True)
class Expired:
    """Dropped from the queue."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Everything else: no connection, no answer in time for the client, an error."""

    why: str


Reply = Answered | Shed | Expired | Failed


class Client:
    """Sends to one gateway. Open it with `connect`."""

    def __init__(self, session: aiohttp.ClientSession, target: Target) -> None:
        self.target = target
        self._session = session
        self._points: dict[str, PointUsed] = {}

    def address(self, budget: str, deadline_ms: float | None) -> URL:
        """Where a request with these wishes goes."""
        query = {"budget": budget, "top": "1"} | ({} if deadline_ms is None else {"deadline_ms": f"{deadline_ms:g}"})
        return (URL(self.target.url) / "classify").with_query(query)

    def addresses(self, trace: Trace) -> list[URL]:
        """Of every request; those with the same wishes share one."""
        wishes = zip(trace.budget.tolist(), (1000 * trace.deadline_s).tolist(), strict=True)
        # NaN differs from itself; as None it is one key of the table.
        asked = [(code, None if deadline_ms != deadline_ms else deadline_ms) for code, deadline_ms in wishes]
        table = {wish: self.address(trace.budgets[wish[0]], wish[1]) for wish in set(asked)}
        return [table[wish] for wish in asked]

    async def classify(self, address: URL, body: bytes, headers: Mapping[str, str]) -> Reply:
        """Sends one image. Raises nothing but cancellation: whatever happens is an outcome."""
        try:
            async with self._session.post(address, data=body, headers=headers) as response:
                return self._read(response.status, await response.read())
        except TimeoutError:
            return Failed("timeout")
        except aiohttp.ClientError as error:
            return Failed(type(error).__name__)

    async def policy(self) -> PolicyBody:
        """The policy in force now.

        Raises:
            TargetError: it does not say.
        """
        try:
            return PolicyBody.model_validate_json(await self._get("/v1/policy"))
        except ValidationError as error:
            raise TargetError(f"{self.target.url}/v1/policy is not as this version knows it: {error}") from error

    async def loop_cpu_s(self) -> float:
        """Processor time of the gateway's event loop so far, without what it decoded.

        Raises:
            TargetError: it does not say.
        """
        lines = (line.split() for line in (await self._get("/metrics")).splitlines())
        found = {line[0]: float(line[1]) for line in lines if line and line[0] in (_LOOP_TIME, _LOOP_DECODE)}
        for name in (_LOOP_TIME, _LOOP_DECODE):
            if name not in found:
                raise TargetError(f"{self.target.url}/metrics has no {name}: is it a gateway of this version?")
        return found[_LOOP_TIME] - found[_LOOP_DECODE]

    async def batch_counts(self) -> BatchCounts | None:
        """The gateway's counters; None where it shows none, which is no reason to give up a run."""
        try:
            return BatchCounts.read(await self._get("/metrics"))
        except TargetError:
            return None

    async def _get(self, path: str) -> str:
        try:
            async with self._session.get(self.target.url + path) as response:
                return await response.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise TargetError(f"{self.target.url}{path} cannot be read: {error or type(error).__name__}") from error

    def _read(self, status: int, body: bytes) -> Reply:
        if status == 504:
            return Expired()
        try:
            content = json.loads(body)
            if status == 200:
                if content["reason"] not in SERVE_REASONS:
                    return Failed(f"200 with unknown reason {content['reason']!r}")
                times = content["times"]
                return Answered(
                    self._point(content["operating_point"]),
                    content["predictions"][0]["index"],
                    content["reason"],
                    content["deadline_met"],
                    times["queue_ms"] / 1000,
                    times["inference_ms"] / 1000,
                    times["decode_ms"] / 1000,
                    times["total_ms"] / 1000,
                )
            code = str(content["code"])
        except (ValueError, KeyError, TypeError, IndexError):
            return Failed(f"{status} from no gateway")
        return Shed(_SHED[code]) if status == 503 and code in _SHED else Failed(f"{status} {code}")

    def _point(self, found: dict[str, Any] | None) -> PointUsed:
        """One object per operating point."""
        key = repr(found)
        if key not in self._points:
            self._points[key] = (
                PointUsed(None, None, (), None, 1.0)
                if found is None
                else PointUsed(
                    found["capacity_factor"],
                    found["num_selected_experts"],
                    tuple(found["slots"]),
                    found["accuracy"],
                    found["relative_compute"] or 0.0,
                )
            )
        return self._points[key]


@asynccontextmanager
async def connect(url: str, timeout_s: float, target: Target | None = None) -> AsyncIterator[Client]:
    """A client for the gateway at `url`.

    Arguments:
        timeout_s: for one request.
        target: what is there, where it is not to be asked.

    Raises:
        TargetError: nobody answers there, or not as a gateway.
    """
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
    session = aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("Accept-Encoding", "User-Agent"),
    )
    async with session:
        yield Client(session, target or await _describe(session, url.rstrip("/")))


async def _describe(session: aiohttp.ClientSession, url: str) -> Target:
    bodies = []
    try:
        for path in ("/v1/models", "/v1/policy"):
            async with session.get(url + path) as response:
                bodies.append(await response.read())
                if response.status != 200:
                    raise TargetError(f"{url}{path} answers {response.status}; is {url} a gateway of this project?")
        (model,) = Models.model_validate_json(bodies[0]).models
        policy = PolicyBody.model_validate_json(bodies[1])
    except (aiohttp.ClientError, TimeoutError, ValueError, ValidationError) as error:
        if isinstance(error, TargetError):
            raise
        raise TargetError(f"{url} does not answer as a gateway: {error or type(error).__name__}") from error
    deadlines = {name: budget.deadline_ms / 1000 for name, budget in policy.budgets.items()}
    return Target(
        url,
        model.name,
        tuple(model.labels),
        policy.policy,
        policy.source,
        deadlines,
        policy.workers,
        policy.max_batch_size,
    )
