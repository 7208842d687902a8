"""Where the gateway's processor time goes, per answer and by layer: `python -m tests.benchmarks.request_path`.

A closed loop of 32 users sends raw bodies, then multipart forms, at the full operating point; the gateway has all cores
but the last, the users the last one. Layers are the functions of `LAYERS`, measured in a gateway whose code is wrapped
(`layer_meter`); a second gateway, as it is, says what the wrapping adds. Writes docs/bench/request_path.md.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

import server.app
from loadtest.images import Images
from loadtest.subject import Subject
from server.cli import main as serve
from tests.benchmarks import process_tree
from tests.benchmarks.gateway_peers import png_and_jpeg
from tests.benchmarks.layer_meter import GARBAGE, OWN, LayerMeter
from tests.benchmarks.live_gateway import (
    BUNDLE,
    OUT,
    POLICIES,
    USERS,
    gateway,
    machine,
    pin,
    put_policy,
    read_images,
    saturate,
)

# In the order of a request. What a layer calls that belongs to another one counts there.
LAYERS: Final[dict[str, tuple[str, ...]]] = {
    "HTTP parser, task, request id": (
        "uvicorn.protocols.http.httptools_impl:HttpToolsProtocol.data_received",
        "uvicorn.protocols.http.httptools_impl:RequestResponseCycle.run_asgi",
        "server.request_context:RequestContext._answer",
    ),
    "query, endpoint": ("server.short_cut:ShortCut.__call__", "server.routes:interpret"),
    "body": ("server.routes:read_uploads",),
    "watch for a client that leaves": ("server.routes:_while_connected",),
    "classify": ("server.gateway:Gateway.classify",),
    "admission": ("server.scheduler:Scheduler.check", "server.scheduler:Scheduler.offer"),
    "decode: hand over": (
        "server.gateway:Gateway._decode",
        "server.decode:Decoder.decode",
    ),
    "decode: checks, pixels": ("server.decode:_decode",),
    "decode: open": ("PIL.Image:open",),
    "decode: fit to the model": ("server.decode:fit",),
    "queue": ("server.engine:Engine.check", "server.engine:Engine.infer"),
    "decision": ("server.engine:Engine._run", "server.engine:Engine._decide"),
    "batch": ("server.engine:Engine._process", "server.engine:Engine._answer"),
    "latency model": ("server.scheduler:Scheduler.on_batch_done",),
    "backend: hand over": ("server.backends.ort:OrtBackend.infer",),
    "backend: inference": ("server.backends.ort:OrtBackend._run",),
    "metrics": tuple(
        f"server.metrics:Metrics.{name}"
        for name in ("request_done", "admitted", "decided", "batch_done", "answered", "stages_done")
    ),
    "answer": ("server.engine:rank", "server.routes:describe_answer", "server.routes:_json"),
    "send": (
        "starlette.responses:Response.__call__",
        "uvicorn.protocols.http.httptools_impl:RequestResponseCycle.send",
    ),
}
_ALL: Final = "all"
_THREADS: Final = {"MainThread": "event loop", "decode": "decoding", "onnxruntime": "inference"}
THREADS: Final = (*_THREADS.values(), "others")
_PATH: Final = "/benchmark/layers"
_SERVE: Final = "serve"
_BOUNDARY = "a-boundary-of-forms"
_FORM = (
    f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="image"\r\n'
    "Content-Type: {media_type}\r\n\r\n"
)


@dataclass
class Spent:
    """Per answer.

    Attributes:
        us: microseconds of processor by thread and layer, `_ALL` for the whole thread.
        counts: calls by thread and layer; by thread, how often it waited and was preempted.
    """

    us: Counter[tuple[str, str]] = field(default_factory=Counter)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)


class Answerer:
    """ASGI middleware that tells the meter's snapshot."""

    def __init__(self, app: ASGIApp, meter: LayerMeter) -> None:
        self._app, self._meter = app, meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == _PATH:
            await JSONResponse(self._meter.snapshot())(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def resolve(target: str) -> tuple[object, str]:
    """Where a function of `LAYERS` lives, and its name there."""
    module, _, path = target.partition(":")
    owner: object = importlib.import_module(module)
    *owners, name = path.split(".")
    for each in owners:
        owner = getattr(owner, each)
    return owner, name


def serve_measured(arguments: list[str]) -> None:
    """`python -m server` with every layer wrapped."""
    meter = LayerMeter()
    for layer, targets in LAYERS.items():
        for target in targets:
            meter.wrap(layer, *resolve(target))
    short_cut = server.app.ShortCut
    server.app.ShortCut = lambda app, classify: Answerer(short_cut(app, classify), meter)  # type: ignore[misc,assignment]
    serve(arguments)


def as_forms(images: Images) -> Images:
    """Each image as a multipart form of its own."""
    bodies = [
        _FORM.format(media_type=media_type).encode() + body + f"\r\n--{_BOUNDARY}--\r\n".encode()
        for body, media_type in zip(images.bodies, images.media_types, strict=True)
    ]
    return replace(images, bodies=bodies, media_types=[f"multipart/form-data; boundary={_BOUNDARY}"] * len(bodies))


def fetch(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url + _PATH, timeout=10) as response:
        found: dict[str, Any] = json.loads(response.read())
    return found


def _thread(name: str) -> str:
    """Pools number their threads."""
    return _THREADS.get(name.partition("_")[0], "others")


def measure(url: str, images: Images) -> Spent:
    """Of a gateway that `serve_measured` runs."""
    before = fetch(url)
    _, answers = asyncio.run(saturate(url, images))
    after = fetch(url)
    found = Spent()
    for share, snapshot in ((-1 / answers, before), (1 / answers, after)):
        for name, layer, spent_ns, calls in snapshot["layers"]:
            if layer != OWN:
                found.us[_thread(name), layer] += share * spent_ns / 1000
                found.counts[_thread(name), layer] += share * calls
        for name, (spent_ns, waits, preemptions) in snapshot["threads"].items():
            found.us[_thread(name), _ALL] += share * spent_ns / 1000
            found.counts[_thread(name), "waits"] += share * waits
            found.counts[_thread(name), "preemptions"] += share * preemptions
    return found


def cost_us(url: str, pid: int, images: Images) -> float:
    """Processor time of a gateway per answer."""
    before_s = process_tree.cpu_s(pid)
    _, answers = asyncio.run(saturate(url, images))
    return 1e6 * (process_tree.cpu_s(pid) - before_s) / answers


def mean(turns: Sequence[Spent]) -> Spent:
    found = Spent()
    for turn in turns:
        for key, us in turn.us.items():
            found.us[key] += us / len(turns)
        for key, count in turn.counts.items():
            found.counts[key] += count / len(turns)
    return found


def markdown(found: Mapping[str, Spent], plain_us: Mapping[str, float], conditions: str) -> str:
    """Arguments:
    found: by kind of body.
    plain_us: processor time per answer of a gateway that is not wrapped, by the same.
    """
    first = next(iter(found.values()))
    names = " | ".join(f"{way}, us" for way in found)
    lines = [
        "# Processor time of a request, by layer\n",
        f"{conditions}\n",
        f"| thread | layer | {names} | calls |",
        "|---|---|" + "--:|" * (len(found) + 1),
    ]
    for thread in THREADS:
        layers = [layer for layer in (*LAYERS, GARBAGE) if any(each.us[thread, layer] for each in found.values())]
        rows = [(layer, [each.us[thread, layer] for each in found.values()]) for layer in layers]
        rest = [each.us[thread, _ALL] - sum(each.us[thread, layer] for layer in layers) for each in found.values()]
        rows += [("the rest", rest), ("**all**", [each.us[thread, _ALL] for each in found.values()])]
        for layer, spent_us in rows:
            calls = f"{first.counts[thread, layer]:.2f}" if layer in layers else ""
            lines.append(f"| {thread} | {layer} | {' | '.join(f'{us:.0f}' for us in spent_us)} | {calls} |")
    switches = ", ".join(
        f"{thread} {first.counts[thread, 'waits']:.2f} and {first.counts[thread, 'preemptions']:.2f}"
        for thread in THREADS
    )
    wrapped = ", ".join(f"{sum(each.us[t, _ALL] for t in THREADS):.0f} us ({way})" for way, each in found.items())
    plain = ", ".join(f"{us:.0f} us ({way})" for way, us in plain_us.items())
    lines += [
        f"\nAll threads together: {wrapped}; without the meter, in the same run: {plain}.\n",
        f"Per answer a thread goes to sleep, and is preempted ({next(iter(found))}): {switches}.\n",
    ]
    return "\n".join(lines)


def main(
    turns: Annotated[int, typer.Option(min=1, help="Of each gateway with each kind of body.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = OUT,
) -> None:
    """Measures both gateways in one run, four seconds a turn."""
    pin()
    images = png_and_jpeg(read_images(Subject.load(BUNDLE)))
    bodies = {"raw body": images, "form": as_forms(images)}
    found: dict[str, list[Spent]] = {way: [] for way in bodies}
    plain: dict[str, list[float]] = {way: [] for way in bodies}
    with ExitStack() as stack:
        wrapped_url, _ = stack.enter_context(gateway("fixed", "tests.benchmarks.request_path", _SERVE))
        url, pid = stack.enter_context(gateway("fixed"))
        for each in (wrapped_url, url):
            put_policy(each, POLICIES["fixed full"])
        for _ in range(turns):
            for way in bodies:
                found[way].append(measure(wrapped_url, bodies[way]))
                plain[way].append(cost_us(url, pid, bodies[way]))
    packages = ("onnxruntime", "uvicorn", "uvloop", "starlette", "pillow")
    conditions = (
        f"{date.today().isoformat()}, `python -m tests.benchmarks.request_path --turns {turns}` on {machine()} (load "
        f"average at the end {os.getloadavg()[0]:.1f}); {', '.join(f'{name} {version(name)}' for name in packages)}; "
        f"`{BUNDLE.name}`, float32, full point, {USERS} users in a closed loop, per answer, means of {turns} turns."
    )
    text = markdown(
        {way: mean(each) for way, each in found.items()}, {w: fmean(u) for w, u in plain.items()}, conditions
    )
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
    (out / "request_path.md").write_text(text)


if __name__ == "__main__":
    if sys.argv[1:2] == [_SERVE]:
        serve_measured(sys.argv[2:])
    else:
        typer.run(main)
