"""Which images share a batch and when it leaves. No I/O and no clock: the engine passes `now`.

Images leave in order of arrival. A batch leaves when it is full, or when its oldest image has waited `max_wait_s`. Any
operating points may share a batch: every image brings its own slots and K, and only its own pairs are computed.

A scheduler that weighs deadlines and load takes the place of this class.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Work:
    """One image to infer. Shapes: H, W and c of the model's input, L MoE layers.

    Attributes:
        image: (H, W, c) uint8.
        slots: (L,) slots per expert of each MoE layer; empty for a dense model.
        num_selected_experts: K; 0 for a dense model.
        explain: also say which expert processed which token.
    """

    image: npt.NDArray[np.uint8]
    slots: tuple[int, ...]
    num_selected_experts: int
    explain: bool


@dataclass(frozen=True)
class Inference:
    """What the model says about one image. C classes, L MoE layers, E experts, S tokens, K choices.

    Attributes:
        logits: (C,) float32.
        kept: (L,) float32, share of the K * S assignments that were processed.
        expert_load: (L, E) int64, tokens processed by each expert.
        token_experts: (L, S, K) int64, expert that processed the token as its k-th choice, or -1; None if not asked.
        queue_s, inference_s: time in the queue, and of the batch in the backend.
    """

    logits: npt.NDArray[np.float32]
    kept: npt.NDArray[np.float32]
    expert_load: npt.NDArray[np.int64]
    token_experts: npt.NDArray[np.int64] | None
    queue_s: float
    inference_s: float


@dataclass(frozen=True, eq=False)
class Entry:
    """One image in the queue: when it came, and where its answer goes."""

    work: Work
    arrival_s: float
    reply: asyncio.Future[Inference] = field(repr=False)


class BatchQueue:
    """First in, first out."""

    def __init__(self, max_batch_size: int, max_wait_s: float) -> None:
        self._max_batch_size, self._max_wait_s = max_batch_size, max_wait_s
        self._entries: dict[Entry, None] = {}  # a dict keeps the order and forgets a cancelled entry in constant time

    def offer(self, entry: Entry) -> None:
        self._entries[entry] = None

    def discard(self, entry: Entry) -> None:
        """Forgets an entry whose client has gone; does nothing when it has left already."""
        self._entries.pop(entry, None)

    def due_s(self) -> float | None:
        """When the next batch leaves if nobody else arrives; None when the queue is empty."""
        oldest = next(iter(self._entries), None)
        return None if oldest is None else oldest.arrival_s + self._max_wait_s

    def next_batch(self, now: float) -> list[Entry]:
        """The batch that leaves now, empty when it is better to wait."""
        due = self.due_s()
        if due is None or (len(self._entries) < self._max_batch_size and now < due):
            return []
        batch = list(islice(self._entries, self._max_batch_size))
        for entry in batch:
            del self._entries[entry]
        return batch

    def clear(self) -> list[Entry]:
        """Takes everything out, at shutdown."""
        entries = list(self._entries)
        self._entries.clear()
        return entries
