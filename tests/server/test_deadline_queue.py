from __future__ import annotations

from server.deadline_queue import DeadlineQueue
from tests.server.ladders import request


def test_queue_when_deadlines_differ_then_the_earliest_leads_and_ties_keep_their_order() -> None:
    queue = DeadlineQueue()
    late, first, second = request(deadline_s=2.0), request(deadline_s=1.0), request(deadline_s=1.0)
    for entry in (late, first, second):
        queue.insert(entry)
    assert queue.take(0, 3) == [first, second, late]


def test_queue_when_requests_leave_then_counts_and_bytes_follow() -> None:
    queue = DeadlineQueue()
    cheap, costly = request(size_bytes=5), request(size_bytes=7, floor=2)
    for entry in (cheap, costly):
        queue.insert(entry)
    assert (queue.size_bytes, queue.uniform_floor, queue.heaviest_floor) == (12, None, 2)
    assert queue.waiting == {cheap.kind: 1, costly.kind: 1}
    position = queue.find(costly)
    assert position == 1
    queue.take(position, position + 1)
    assert (queue.size_bytes, queue.uniform_floor, queue.waiting) == (5, 0, {cheap.kind: 1})


def test_find_when_it_has_left_then_there_is_no_position() -> None:
    queue = DeadlineQueue()
    gone, stays = request(), request()
    for entry in (gone, stays):
        queue.insert(entry)
    queue.take(0, 1)
    assert (queue.find(gone), queue.find(stays)) == (None, 0)
