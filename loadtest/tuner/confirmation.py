"""Puts finalists in force at a running gateway, one after the other, and offers it the trace that was held out.

Whatever happens (an error, Ctrl-C, SIGTERM), the policy in force before comes back: by DELETE where it came from the
gateway's settings, else by its text.
"""

from __future__ import annotations

import asyncio
import json
import signal
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

from loadtest.errors import LoadtestError, TargetError
from loadtest.generator import Plan, measure
from loadtest.images import SAMPLE, load_images
from loadtest.live_results import Terms
from loadtest.recorder import Tally
from loadtest.report import Report
from loadtest.trace import Trace
from server.policy_source import POSTED
from server.provenance import Expected

_TIMEOUT_S: Final = 10.0  # of one request; for a request of the administrator too. Chosen, not tuned
_WARMUP_S: Final = 2.0  # as `run`, but no more than a tenth of what is offered
_PATH: Final = "/v1/admin/policy"


@dataclass(frozen=True)
class Live:
    """What a policy did on the real machine.

    Attributes:
        invalid: why the figures may not be relied on; empty where they may.
        interrupted: by hand.
    """

    figures: tuple[Expected, ...]
    invalid: tuple[str, ...]
    interrupted: bool


class Administrator:
    """A gateway's administrative routes.

    Arguments:
        key: its setting `admin_key`.
    """

    def __init__(self, url: str, key: str) -> None:
        self._url, self._headers = url.rstrip("/"), {"Authorization": f"Bearer {key}"}

    def check(self) -> None:
        """Raises `TargetError` where nobody answers, or not with this key."""
        self._ask("GET")

    def put(self, text: str) -> None:
        """Puts a policy in force.

        Raises:
            LoadtestError: the gateway refuses it.
        """
        self._ask("POST", text)

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Returns the policy that is in force now, at the end.

        Raises:
            TargetError: nobody answers there, or not with this key; or the policy could not be put back.
        """
        before = self._ask("GET")
        source = json.loads(self._ask("GET", path="/v1/policy"))["source"]
        with _terminating():
            try:
                yield
            finally:
                handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # impatience must not leave a trial in force
                try:
                    self._restore(before, source)
                finally:
                    signal.signal(signal.SIGINT, handler)

    def _restore(self, text: str, source: str) -> None:
        if source == POSTED:
            self._ask("POST", text)
            return
        try:
            self._ask("DELETE")
        except LoadtestError:  # the file has become bad since: its old content is what was in force
            self._ask("POST", text)

    def _ask(self, method: str, body: str | None = None, path: str = _PATH) -> str:
        data = None if body is None else body.encode()
        request = urllib.request.Request(self._url + path, data, self._headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
                return str(response.read().decode())
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(self._url + path, error) from error
        except (OSError, ValueError) as error:
            raise TargetError(f"{self._url} does not answer: {error}") from error


def confirm(
    url: str,
    administrator: Administrator,
    text: str,
    traces: Mapping[float, Trace],
    *,
    seed: int,
    grace_ms: float,
    images: Path | None,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> Live:
    """Puts a policy in force and measures it at every load. Call it within `Administrator.borrowed`.

    Arguments:
        grace_ms: beyond the deadline, for the way there and back.

    Raises:
        LoadtestError: the gateway refuses the policy, or goes away.
    """
    administrator.put(text)
    figures: list[Expected] = []
    invalid: list[str] = []
    for load, trace in traces.items():
        terms = Terms(min(_WARMUP_S, trace.duration_s / 10), _TIMEOUT_S, grace_ms / 1000)
        plan = Plan(trace, f"held out, load {load:g}", terms, seed)
        report = asyncio.run(
            measure(
                url,
                plan,
                lambda labels: load_images(images or SAMPLE, labels),
                lambda recorder: progress(recorder.take_tally()),
            )
        )
        assert report.live is not None, "the generator makes live reports"
        if report.live.interrupted:
            return Live(tuple(figures), tuple(invalid), interrupted=True)
        figures.append(_measured(load, report))
        invalid += [f"load {load:g}: {reason}" for reason in report.live.invalid_reasons]
    return Live(tuple(figures), tuple(invalid), interrupted=False)


def _measured(load: float, report: Report) -> Expected:
    p99_s = report.latency_s.p99
    return Expected(
        load=load,
        effective_accuracy=report.effective_accuracy,
        mean_accuracy=report.mean_accuracy,
        slo_attainment=report.slo_attainment,
        shed_ratio=report.shed_ratio,
        p99_ms=None if p99_s is None else 1000 * p99_s,
    )


def _refusal(address: str, error: urllib.error.HTTPError) -> LoadtestError:
    try:
        problem: dict[str, Any] = json.loads(error.read())
        detail = str(problem["detail"])
    except (ValueError, KeyError, TypeError):
        detail = str(error.reason)
    hint = {
        401: "; --admin-key must be the gateway's setting admin_key",
        404: "; start the gateway with the setting admin_key",
    }
    return TargetError(f"{address} answers {error.code}: {detail}{hint.get(error.code, '')}")


@contextmanager
def _terminating() -> Iterator[None]:
    """SIGTERM unwinds the stack, so that what stands in `finally` is done."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
