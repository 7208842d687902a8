"""Regions and a registry that maps them as a server does. `tests/triton` has real servers."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from server.backends.base import BackendError
from server.backends.triton.failure import CallFailed, Reason
from server.backends.triton.shared_memory import SEGMENTS, Region, SharedImages, check_version

SIZE = 64


class Mapper:
    """Attributes:
    mapped: regions by name.
    in_use: names that a request still reads.
    failure: what the next registrations end with, after they have succeeded.
    """

    def __init__(self) -> None:
        self.mapped: dict[str, mmap.mmap] = {}
        self.in_use: set[str] = set()
        self.failure: BaseException | None = None

    async def register(self, name: str, size_bytes: int) -> None:
        descriptor = os.open(SEGMENTS / name, os.O_RDWR)
        self.mapped[name] = mmap.mmap(descriptor, size_bytes)
        os.close(descriptor)
        if self.failure is not None:
            raise self.failure

    async def unregister(self, name: str) -> None:
        if name in self.in_use:
            raise CallFailed("model", f"Cannot unregister shared memory region '{name}', it is currently in use.")
        self.mapped.pop(name, None)

    def read(self, name: str) -> bytes:
        return self.mapped[name][:SIZE]


def segments() -> list[str]:
    return [path.name for path in SEGMENTS.glob(f"vmoe_gateway_{os.getpid()}_*")]


def run(scenario: Callable[[Mapper, SharedImages], Awaitable[None]], size_bytes: int = SIZE) -> None:
    """Runs a scenario and checks that neither segments nor registrations are left of it."""

    async def main() -> None:
        mapper = Mapper()
        images = SharedImages(mapper, size_bytes)
        await scenario(mapper, images)
        await images.close()
        assert not mapper.mapped

    asyncio.run(main())
    assert segments() == []


def pixels(value: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.full((SIZE // 4, 4), value, np.uint8)


def lent(images: SharedImages, value: int) -> Region:
    """A region that a call was lent, wrote to, and was answered from."""
    with images.lend() as region:
        assert region is not None
        region.write(pixels(value))
    return region


def unanswered(images: SharedImages, value: int, end: BaseException) -> str:
    """Name of a region that a call wrote to before it ended otherwise."""
    names = []

    def call() -> None:
        with images.lend() as region:
            assert region is not None
            names.append(region.name)
            region.write(pixels(value))
            raise end

    with pytest.raises(type(end)):
        call()
    return names[0]


def test_region_when_written_then_the_server_reads_it_though_no_segment_has_a_name_any_more() -> None:
    async def scenario(mapper: Mapper, images: SharedImages) -> None:
        await images.refill(2, fresh=True)
        assert (len(mapper.mapped), segments()) == (2, [])
        assert mapper.read(lent(images, 7).name) == bytes([7]) * SIZE

    run(scenario)


def test_region_when_its_call_was_answered_then_the_next_call_gets_it() -> None:
    async def scenario(mapper: Mapper, images: SharedImages) -> None:
        await images.refill(1, fresh=True)
        assert lent(images, 1).name == lent(images, 2).name

    run(scenario)


def test_regions_when_all_are_lent_then_the_next_call_gets_none() -> None:
    async def scenario(mapper: Mapper, images: SharedImages) -> None:
        await images.refill(1, fresh=True)
        with images.lend() as first, images.lend() as second:
            assert (first is not None, second) == (True, None)
            await images.refill(1, fresh=False)
            assert len(mapper.mapped) == 1

    run(scenario)


@pytest.mark.parametrize("end", [CallFailed("timeout", "late"), CallFailed("model", "bad"), asyncio.CancelledError()])
def test_region_when_its_call_was_not_answered_then_it_is_never_written_again(end: BaseException) -> None:
    async def scenario(mapper: Mapper, images: SharedImages) -> None:
        await images.refill(1, fresh=True)
        name = unanswered(images, 1, end)
        mapper.in_use = {name}
        with images.lend() as none:
            assert none is None
        await images.refill(1, fresh=False)
        assert lent(images, 2).name != name
        assert mapper.read(name) == bytes([1]) * SIZE  # what its request is still to be answered from
        mapper.in_use = set()
        await images.refill(1, fresh=False)
        assert name not in mapper.mapped

    run(scenario)


def test_regions_when_the_server_lets_none_go_then_it_maps_no_more_than_twice_as_many() -> None:
    async def scenario(mapper: Mapper, images: SharedImages) -> None:
        late = CallFailed("timeout", "late")
        await images.refill(2, fresh=True)
        kept = {unanswered(images, 1, late)}
        mapper.in_use = set(kept)
        await images.refill(2, fresh=False)  # one has stayed free, so one is new
        kept |= {unanswered(images, 1, late), unanswered(images, 1, late)}
        mapper.in_use = set(kept)
        for _ in range(3):
            await images.refill(2, fresh=False)
            assert set(mapper.mapped) == kept
        with images.lend() as region:
            assert region is None
        mapper.in_use = set()
        await images.refill(2, fresh=False)
        assert (len(mapper.mapped), kept & set(mapper.mapped)) == (2, set())

    run(scenario)


def test_refill_when_the_server_may_be_another_then_every_region_is_new() -> None:
    async def scenario(mapper: Mapper, images: SharedImages) -> None:
        await images.refill(2, fresh=True)
        before = set(mapper.mapped)
        await images.refill(2, fresh=True)
        assert (len(mapper.mapped), before & set(mapper.mapped)) == (2, set())
        mapper.mapped.clear()  # restarted
        await images.refill(2, fresh=True)
        assert mapper.read(lent(images, 3).name) == bytes([3]) * SIZE

    run(scenario)


def test_refill_when_the_server_cannot_map_it_then_the_error_names_the_setting() -> None:
    async def scenario(mapper: Mapper, images: SharedImages) -> None:
        mapper.failure = CallFailed("model", "Unable to open shared memory region: '/x'")
        with pytest.raises(BackendError, match=r"triton_shared_memory is on.*Unable to open.*must run on this host"):
            await images.refill(2, fresh=True)
        assert segments() == []
        await images.refill(2, fresh=False)  # of a server that has served already: the message will do
        with images.lend() as region:
            assert region is None

    run(scenario)


@pytest.mark.parametrize("reason", ["refused", "connection"])
def test_refill_when_the_server_has_gone_then_that_is_the_failure(reason: Reason) -> None:
    async def scenario(mapper: Mapper, images: SharedImages) -> None:
        mapper.failure = CallFailed(reason, "gone")
        with pytest.raises(CallFailed, match=reason):
            await images.refill(2, fresh=True)
        mapper.failure = None

    run(scenario)


def test_refill_when_cancelled_after_the_server_had_mapped_it_then_that_region_is_let_go() -> None:
    async def scenario(mapper: Mapper, images: SharedImages) -> None:
        mapper.failure = asyncio.CancelledError()
        with pytest.raises(asyncio.CancelledError):
            await images.refill(1, fresh=True)
        (name,) = mapper.mapped
        mapper.failure = None
        await images.refill(1, fresh=False)
        assert len(mapper.mapped) == 1
        assert name not in mapper.mapped

    run(scenario)


def test_refill_when_there_is_not_so_much_memory_then_the_error_says_how_much() -> None:
    async def scenario(mapper: Mapper, images: SharedImages) -> None:
        with pytest.raises(BackendError, match=rf"triton_shared_memory needs {1 << 50} bytes more.*No space left"):
            await images.refill(1, fresh=True)
        assert segments() == []

    run(scenario, size_bytes=1 << 50)


def test_close_when_the_server_still_reads_then_it_gives_up_after_a_while() -> None:
    async def main() -> None:
        mapper = Mapper()
        images = SharedImages(mapper, SIZE)
        await images.refill(1, fresh=True)
        mapper.in_use = set(mapper.mapped)
        async with asyncio.timeout(5):
            await images.close()

    asyncio.run(main())
    assert segments() == []


@pytest.mark.parametrize(("version", "good"), [("2.49.0", False), ("2.50.0", True), ("2.51.0", True), ("3.0.0", True)])
def test_version_when_it_unmaps_what_is_being_read_then_it_is_refused(version: str, good: bool) -> None:
    if good:
        check_version(version)
        return
    with pytest.raises(BackendError, match=r"needs Triton 2\.50 or newer, and the server is 2\.49\.0"):
        check_version(version)
