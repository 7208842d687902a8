"""Processor time of a program's threads by layer, for programs that know nothing of it.

A layer is a name for some functions. What runs inside them counts for their layer, less what runs in functions of other
layers that they call; what runs outside all is the thread's own. A coroutine counts while it runs, not while it waits.
Every entry and exit reads the thread's clock, about half a microsecond each, which counts for the layers.
"""

from __future__ import annotations

import functools
import gc
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass, field
from pathlib import Path
from types import coroutine
from typing import Any, Final

GARBAGE: Final = "garbage collection"
OWN: Final = "own"  # of a thread, outside all layers
_TASKS: Final = Path("/proc/self/task")


@dataclass
class _Thread:
    """What one thread has spent; only that thread writes.

    Attributes:
        open: layers that have been entered and not left, the innermost last.
        since_ns: on the thread's clock, up to when everything is booked.
    """

    name: str
    open: list[str] = field(default_factory=lambda: [OWN])
    since_ns: int = field(default_factory=time.thread_time_ns)
    spent_ns: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    def enter(self, layer: str) -> None:
        self._book()
        self.open.append(layer)

    def leave(self) -> None:
        self._book()
        self.open.pop()

    def _book(self) -> None:
        now_ns = time.thread_time_ns()
        self.spent_ns[self.open[-1]] += now_ns - self.since_ns
        self.since_ns = now_ns


class LayerMeter:
    """Wraps functions in place, and says what was spent in them."""

    def __init__(self) -> None:
        self._threads: dict[int, _Thread] = {}
        gc.callbacks.append(self._collecting)

    def wrap(self, layer: str, owner: object, name: str) -> None:
        """The function or coroutine function `name` of a module or class belongs to `layer` from now on."""
        function = getattr(owner, name)
        is_async = function.__code__.co_flags & 0x180  # CO_COROUTINE, CO_ITERABLE_COROUTINE
        setattr(owner, name, self._coroutine(layer, function) if is_async else self._function(layer, function))

    def snapshot(self) -> dict[str, Any]:
        """So far: nanoseconds and calls by thread and layer; of each thread the kernel's count of both and switches."""
        return {
            "layers": [
                [thread.name, layer, spent_ns, thread.calls[layer]]
                for thread in list(self._threads.values())
                for layer, spent_ns in dict.copy(thread.spent_ns).items()  # a collection may add one
            ],
            "threads": _kernel_counts(),
        }

    def _function(self, layer: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            thread = self._thread()
            thread.calls[layer] += 1
            thread.enter(layer)
            try:
                return function(*args, **kwargs)
            finally:
                thread.leave()

        return measured

    def _coroutine(self, layer: str, function: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
        @functools.wraps(function)
        async def measured(*args: Any, **kwargs: Any) -> Any:
            thread = self._thread()
            thread.calls[layer] += 1
            return await _by_steps(function(*args, **kwargs), thread, layer)

        return measured

    def _thread(self) -> _Thread:
        number = threading.get_ident()
        if (thread := self._threads.get(number)) is None:
            thread = self._threads[number] = _Thread(threading.current_thread().name)
        return thread

    def _collecting(self, phase: str, _: dict[str, int]) -> None:
        thread = self._thread()
        if phase == "start":
            thread.calls[GARBAGE] += 1
            thread.enter(GARBAGE)
        elif thread.open[-1] == GARBAGE:
            thread.leave()


@coroutine
def _by_steps(work: Coroutine[Any, Any, Any], thread: _Thread, layer: str) -> Generator[Any, Any, Any]:
    """Awaits `work`; each of its steps is a stay in the layer."""
    step, value = work.send, None
    while True:
        thread.enter(layer)
        try:
            awaited = step(value)
        except StopIteration as done:
            return done.value
        finally:
            thread.leave()
        try:
            value = yield awaited
            step = work.send
        except BaseException as error:  # of whoever cancels or closes: the coroutine's to handle
            step, value = work.throw, error


def _kernel_counts() -> dict[str, list[int]]:
    """By name of a thread: nanoseconds, switches that it asked for (it waits), switches that it suffered.

    Threads that Python did not start count together.
    """
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    found: dict[str, list[int]] = {}
    for task in _TASKS.iterdir():
        spent_ns = int((task / "schedstat").read_text().split()[0])
        status = (task / "status").read_text().splitlines()
        switches = [int(line.split()[1]) for line in status if "ctxt_switches" in line]
        sums = found.setdefault(names.get(int(task.name), "others"), [0, 0, 0])
        for place, count in enumerate((spent_ns, *switches)):
            sums[place] += count
    return found
