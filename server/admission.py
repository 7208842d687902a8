"""A permit before work: bounds what is in the gateway at any time, in images and in bytes.

A request takes its permit before its body is read and gives it back when it is answered, so uploads, decoding and the
queue together stay within the limits. What does not fit is refused at once.
"""

from __future__ import annotations

import asyncio
from typing import Self

from server.errors import QueueFull
from server.metrics import Metrics


class Admission:
    """Counts what is admitted.

    Attributes:
        images: admitted and not yet answered.
        size_bytes: held by their uploads.
    """

    def __init__(self, max_images: int, max_bytes: int, metrics: Metrics) -> None:
        self._max_images, self._max_bytes, self._metrics = max_images, max_bytes, metrics
        self.images = 0
        self.size_bytes = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def permit(self, budget: str) -> Permit:
        """To be entered, from the first byte of the body to the answer; refusals count as shed under `budget`."""
        return Permit(self, budget)

    async def wait_empty(self) -> None:
        """Until everything that was admitted is answered."""
        await self._empty.wait()

    def take(self, images: int, size_bytes: int, budget: str) -> None:
        """Raises `QueueFull`, and takes nothing, where that does not fit."""
        if self.images + images > self._max_images:
            self._metrics.shed(budget, "queue_full")
            raise QueueFull(f"{self.images} images are waiting, {images} more do not fit: at most {self._max_images}")
        if self.size_bytes + size_bytes > self._max_bytes:
            self._metrics.shed(budget, "queue_bytes")
            raise QueueFull(f"{self.size_bytes} bytes are waiting, the limit is {self._max_bytes}")
        self.images += images
        self.size_bytes += size_bytes
        self._empty.clear()

    def give_back(self, images: int, size_bytes: int) -> None:
        self.images -= images
        self.size_bytes -= size_bytes
        if not self.images:
            self._empty.set()


class Permit:
    """The share of one request: one image from the start, more images and bytes as they turn up."""

    def __init__(self, admission: Admission, budget: str) -> None:
        self._admission, self._budget = admission, budget
        self._images = 0
        self._size_bytes = 0

    def __enter__(self) -> Self:
        """Raises `QueueFull` where no image more fits."""
        self.add(images=1)
        return self

    def __exit__(self, *_: object) -> None:
        self._admission.give_back(self._images, self._size_bytes)
        self._images = self._size_bytes = 0

    def add(self, images: int = 0, size_bytes: int = 0) -> None:
        """Raises `QueueFull` where that does not fit; what was admitted before stays so."""
        self._admission.take(images, size_bytes, self._budget)
        self._images += images
        self._size_bytes += size_bytes
