# cython: annotation_typing=False
"""Where the requests are that are not answered yet: each is in one of these groups."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from healfs.core.request import Request
from healfs.core.retries import Retries


class Queues:
    """All by the request's order.

    What was given up in flight (answered, but in the backend's hands) and the engine's own
    requests are in `in_flight`, too; a request that was given up while it waited stays in
    `waiting` until nothing older is before it.
    """

    def __init__(self, retries: Retries) -> None:
        self.in_flight: dict[int, Request] = {}
        self.covered: dict[int, Request] = {}  # flushes answered with the one in flight
        self.parked: OrderedDict[int, Request] = OrderedDict()  # may be sent, oldest first
        self.waiting: dict[int, Request] = {}  # behind an older overlapping write
        self.no_room: OrderedDict[int, Request] = OrderedDict()  # writes, for room in the log
        self.flushes: dict[int, Request] = {}  # for the next flush
        self.undecided: dict[int, Request] = {}  # failed; the probe is out
        self.retries = retries  # failed, to be tried again

    def unanswered(self) -> Iterator[Request]:
        """In no order; not to be changed meanwhile."""
        for group in (
            self.in_flight,
            self.covered,
            self.parked,
            self.waiting,
            self.no_room,
            self.flushes,
            self.undecided,
        ):
            yield from (r for r in group.values() if not r.answered)
        yield from (r for r in self.retries if not r.answered)

    def forget_parked(self, request: Request) -> None:
        """Take a request out of whatever it is parked in."""
        for group in (self.parked, self.no_room, self.flushes, self.undecided):
            group.pop(request.order, None)
        self.retries.discard(request)

    def park_again(self, requests: list[Request]) -> None:
        """Back into the queue, oldest first (the seed series sent them last-in first-out)."""
        newest = next(reversed(self.parked), 0)
        in_order = True
        for request in requests:
            in_order &= request.order > newest
            newest = request.order
            self.parked[newest] = request
        if not in_order:
            self.parked = OrderedDict(sorted(self.parked.items()))

    def take_flying(self) -> dict[int, Request]:
        """The connection is gone: take what was in flight."""
        flying, self.in_flight = self.in_flight, {}
        return flying

    def take_held_up(self, now: float) -> list[Request]:
        """The connection is gone: take the unanswered ones that waited for something of it."""
        taken = self.retries.take_all(now)
        for group in (self.no_room, self.covered, self.flushes, self.undecided):
            taken += [request for request in group.values() if not request.answered]
            group.clear()
        return taken

    def counts(self) -> tuple[int, int, int]:
        """Of the guest's requests: in flight, parked, given up but in the backend's hands."""
        in_flight = sum(not r.answered for r in self.in_flight.values())
        in_flight += sum(not r.answered for r in self.covered.values())
        parked = sum(not r.answered for r in self.waiting.values())
        parked += sum(map(len, (self.parked, self.no_room, self.flushes, self.undecided)))
        parked += len(self.retries)
        given_up = sum(r.answered and not r.internal for r in self.in_flight.values())
        return in_flight, parked, given_up
