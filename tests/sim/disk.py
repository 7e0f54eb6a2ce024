"""A simulated backend: a stable store, a volatile cache before it, and one connection at a time.

It does what a bad but honest server may do, and no more: whatever it gets wrong is named in
Options. Chance depends on the request, not on what else happens.
"""

from __future__ import annotations

import errno as e
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from healfs.core.request import Done, Kind, Request
from tests.sim.oracle import Violation, decode, encode, first_value, op_id
from tests.sim.plan import ERRNOS, SECTOR, Plan, chance

if TYPE_CHECKING:
    from tests.sim.world import World

REFUSED = (e.EINVAL, e.EOPNOTSUPP)


@dataclass(slots=True, eq=False)
class Cached:
    """One value of one sector in the volatile cache, oldest first in its list."""

    value: int
    attempt: Attempt
    clean: bool = False  # a failed flush marked it so: it is never written back


@dataclass(slots=True, eq=False)
class Attempt:
    """A request in the server's hands, and what will become of it."""

    request: Request
    done: Done
    session: int
    luck: float
    errno: int = 0
    tells_after: float = 0.0
    applied: bool = False
    replied: bool = False
    data: bytearray | memoryview | None = None
    covers: list[tuple[int, Cached]] | None = None  # of a flush


class Disk:
    """The store itself. `changed(sector, value)` hears of every change of stable storage."""

    def __init__(self, sectors: int, changed: Callable[[int, int], None]) -> None:
        self.stable = [first_value(sector) for sector in range(sectors)]
        self.cache: dict[int, list[Cached]] = {}
        self._changed = changed

    def visible(self, sector: int) -> int:
        cached = self.cache.get(sector)
        return cached[-1].value if cached else self.stable[sector]

    def write(self, sector: int, value: int, attempt: Attempt) -> None:
        self.cache.setdefault(sector, []).append(Cached(value, attempt))

    def destage(self, sector: int, upto: Cached) -> None:
        """Write a sector's cached values back, as far as this one."""
        cached = self.cache.get(sector, [])
        if upto not in cached:
            return
        where = cached.index(upto)
        if not upto.clean:
            self._set(sector, upto.value)
            del cached[: where + 1]
        if not cached:
            del self.cache[sector]

    def _set(self, sector: int, value: int) -> None:
        if self.stable[sector] != value:
            self.stable[sector] = value
            self._changed(sector, value)

    def evict(self, sector: int) -> None:
        """What is clean, though never written back, is forgotten."""
        cached = self.cache.get(sector, [])
        if cached and cached[-1].clean:
            del self.cache[sector]

    def write_through(self, sector: int, value: int) -> None:
        self.cache.pop(sector, None)
        self._set(sector, value)

    def lose_cache(self, seed: int, number: int) -> int:
        """Each sector keeps what was written back by chance, and loses the rest; how many do."""
        for sector, cached in sorted(self.cache.items()):
            kept = int(chance(seed, number, sector) * (len(cached) + 2))
            dirty = [c for c in cached[:kept] if not c.clean]
            if kept <= len(cached) and dirty:
                self._set(sector, dirty[-1].value)
        lost = sum(cached[-1].value != self.stable[sector] for sector, cached in self.cache.items())
        self.cache.clear()
        return lost


class Server:
    def __init__(self, plan: Plan, world: World, block: int = SECTOR) -> None:
        self.plan = plan
        self.options = plan.options
        self.world = world
        self._block = block
        self.disk = Disk(plan.sectors, world.stable_changed)
        self.session = 0  # 0: no connection; numbers only grow
        self.last_session = 0
        self._hands: list[Attempt] = []  # of the living connection, not replied
        self._ghosts: list[Attempt] = []
        self.still_reading: list[Attempt] = []  # until there is a connection, which waits for them
        self._tries: dict[tuple[int, int, int], int] = {}
        self.untaken: set[int] = set()  # ids of requests that no socket ever took
        self._calm = False
        self.through = False
        # Faults that are on, until a time or for a number of requests:
        self.away_until = 0.0
        self.other_until = 0.0
        self.frozen_until = 0.0
        self.full_until = 0.0
        self.relapse_until = 0.0
        self.stubborn_until = 0.0
        self.offline_until = 0.0
        self.fail_next = self.hang_next = self.delay_next = self.short_next = 0
        self.fail_flushes = self.fail_fuas = 0
        self.which_errno = 0
        self.bad_sectors: set[int] = set()
        self._dies_after = 0

    # --- the connection --------------------------------------------------------------------

    def accept(self) -> int:
        """A new connection. What the old one left in flight has its fate already."""
        reading, self.still_reading = self.still_reading, []
        for attempt in reading:
            self._apply(attempt, torn=False)
        self.last_session += 1
        self.session = self.last_session
        self._dies_after = 0
        if self.options.through:
            self.through = chance(self.plan.seed, self.session, 3) < 0.5
        if self.world.now < self.relapse_until:
            self._dies_after = 1 + int(chance(self.plan.seed, self.session) * 8)
        return self.session

    def break_off(self, *, crash: bool) -> None:
        """The connection ends: none of its attempts is answered any more."""
        if not self.session:
            return
        hands, self._hands = self._hands, []
        self.session = 0
        for attempt in hands:
            if not attempt.applied and attempt.request.kind is not Kind.READ:
                self._abandon(attempt)
        if crash and self.options.cache_loss:
            lost = self.disk.lose_cache(self.plan.seed, self.last_session)
            self.world.happened["cache_loss"] += lost > 0
            self.world.say("the volatile cache is lost")

    def _abandon(self, attempt: Attempt) -> None:
        luck = attempt.luck * 8 % 1
        if attempt.request.kind is Kind.FLUSH or luck < 0.3:
            return
        if self.options.reads_on and attempt.request.kind is Kind.WRITE:
            attempt.data = attempt.request.data  # no copy
            self.still_reading.append(attempt)
        elif luck < 0.5 or not self.options.late:
            self._apply(attempt, torn=self.options.torn)
        else:
            # The bytes left long ago; somebody between holds them back.
            attempt.data = bytearray(attempt.request.data or b"")
            self._ghosts.append(attempt)
            delay = (luck - 0.5) / 0.5 * self.plan.settle * 0.999
            self.world.later(delay, self._haunt, attempt)

    def _haunt(self, attempt: Attempt) -> None:
        if attempt in self._ghosts:
            self._ghosts.remove(attempt)
            self.world.say(f"late: {attempt.request}")
            self.world.happened["late"] += 1
            self._apply(attempt, torn=False)

    def fence(self) -> None:
        """No abandoned attempt is applied any more."""
        self._ghosts.clear()

    # --- requests --------------------------------------------------------------------------

    def receive(self, request: Request, done: Done) -> None:
        if (request.offset | request.length) % self._block:
            raise Violation("misaligned", str(request))
        self.untaken.discard(id(request))
        if not self.session:
            self.untaken.add(id(request))
            return  # into a connection that is dead and not yet known to be
        seed, kind = self.plan.seed, int(request.kind)
        key = (kind, request.offset, op_id(request))
        tries = self._tries[key] = self._tries.get(key, 0) + 1
        attempt = Attempt(request, done, self.session, chance(seed, *key, tries))
        self._hands.append(attempt)
        if request.kind is Kind.FLUSH or request.fua:  # its fsync is everybody's
            attempt.covers = self._covered(attempt.session)
        if self._dies_after:
            self._dies_after -= 1
            if not self._dies_after:
                self.world.say("the server dies again")
                self.world.disconnect(crash=True, notice=0.001)
                return
        if self._refuses(attempt):
            pass
        elif self.hang_next and not self._calm:
            self.hang_next -= 1
            self.world.say(f"hangs: {request}")
            return
        delay = 0.0001 + attempt.luck * 0.002
        if self.delay_next:
            self.delay_next -= 1
            delay += attempt.luck * 8
        if self.options.inside and attempt.luck > 0.5 and self.world.now >= self.frozen_until:
            self._carry_out(attempt)
            self._reply(attempt)
        else:
            self.world.later(delay, self._apply_now, attempt)

    def _covered(self, session: int) -> list[tuple[int, Cached]]:
        """The newest value of each sector that a flush sent now must make stable."""
        covers = []
        for sector, cached in self.disk.cache.items():
            for entry in reversed(cached):
                own = not self.options.session_flush or entry.attempt.session == session
                self.world.happened["session_flush"] += entry.attempt.replied and not own
                if entry.attempt.replied and own:
                    covers.append((sector, entry))
                    break
        return covers

    def _refuses(self, attempt: Attempt) -> bool:
        kind, now = attempt.request.kind, self.world.now
        writes = kind in (Kind.WRITE, Kind.WRITE_ZEROES)
        if now < self.offline_until:
            attempt.errno = e.EIO
        elif kind is Kind.READ and self.bad_sectors.intersection(_sectors(attempt.request)):
            attempt.errno = e.ENODATA
        elif writes and now < self.full_until:
            attempt.errno = e.ENOSPC
        elif writes and now < self.stubborn_until:
            attempt.errno = e.EIO
        elif kind is Kind.FLUSH and self.fail_flushes:
            self.fail_flushes -= 1
            attempt.errno = e.EIO
        elif attempt.request.fua and self.fail_fuas:
            self.fail_fuas -= 1
            attempt.errno, attempt.tells_after = e.EIO, attempt.luck * 0.02
            self.world.happened["fua_fails"] += 1
        elif self.fail_next:
            self.fail_next -= 1
            attempt.errno = ERRNOS[(self.which_errno + self.fail_next) % len(ERRNOS)]
            if attempt.errno in REFUSED and kind not in (Kind.WRITE_ZEROES, Kind.DISCARD):
                attempt.errno = e.EIO  # every server can read, write and flush
        return attempt.errno != 0

    def _apply_now(self, attempt: Attempt) -> None:
        if attempt.session != self.session:
            return
        if self.world.now < self.frozen_until:
            self.world.later(self.frozen_until - self.world.now, self._apply_now, attempt)
            return
        if self.short_next and not attempt.errno and attempt.request.length > SECTOR:
            self.short_next -= 1
            self._transfer_half(attempt)
            return
        self._carry_out(attempt)
        delay = attempt.tells_after or attempt.luck * 7 % 1 * 0.001
        self.world.later(0.0001 + delay, self._reply, attempt)

    def _transfer_half(self, attempt: Attempt) -> None:
        """A short transfer: the rest follows later, unless the connection ends before."""
        request = attempt.request
        self.world.say(f"short: {request}")
        self.world.happened["short"] += 1
        half = request.length // SECTOR // 2
        self._apply(attempt, torn=False, part=range(half))
        attempt.applied = False
        self.world.later(0.001 + attempt.luck * 3, self._transfer_rest, attempt, half)

    def _transfer_rest(self, attempt: Attempt, half: int) -> None:
        if attempt.session != self.session:
            return
        first = attempt.data if attempt.request.kind is Kind.READ else None
        self._apply(attempt, torn=False, part=range(half, attempt.request.length // SECTOR))
        if first is not None and attempt.data is not None:
            attempt.data = first + attempt.data
        self._reply(attempt)

    def _carry_out(self, attempt: Attempt) -> None:
        if not attempt.errno:
            self._apply(attempt, torn=False)
        elif attempt.covers is not None:
            self._fail_flush(attempt)
        elif self.options.torn and attempt.errno not in REFUSED and attempt.luck < 0.5:
            self._apply(attempt, torn=True)

    def _apply(self, attempt: Attempt, *, torn: bool, part: range | None = None) -> None:
        """`part`: of its sectors only these, counted from its first."""
        request = attempt.request
        attempt.applied = True
        if request.kind is Kind.FLUSH:
            for sector, entry in attempt.covers or ():
                self.disk.destage(sector, entry)
            return
        if request.kind is Kind.READ:
            sectors = _sectors(request)
            values = [self.disk.visible(sectors[index]) for index in part or range(len(sectors))]
            attempt.data = encode(values)
            return
        if request.kind is Kind.WRITE:
            source = request.data if attempt.data is None else attempt.data
            if source is None:
                raise Violation("garbage", f"{request}: its payload was let go in flight")
            values = decode(source)
        else:
            values = [0] * (request.length // SECTOR)
        lazy = request.kind is Kind.DISCARD  # it may do nothing: TRIM promises no zeroes
        for index, sector in enumerate(_sectors(request)):
            if part is not None and index not in part:
                continue
            if (torn or lazy) and chance(int(attempt.luck * 1e9), index) < 0.5:
                self.world.happened["torn"] += torn
                continue
            self.bad_sectors.discard(sector)
            if (request.fua or self.through) and not torn:
                self.disk.write_through(sector, values[index])
            else:
                self.disk.write(sector, values[index], attempt)

    def _fail_flush(self, attempt: Attempt) -> None:
        """As Linux does: the pages that could not be written are clean from now on."""
        if self.options.flush_loses and attempt.errno == e.EIO:
            for sector, entry in attempt.covers or ():
                if chance(int(attempt.luck * 1e9), sector) < 0.5:
                    for cached in self.disk.cache.get(sector, []):
                        cached.clean = True
                        if cached is entry:
                            break

    def _reply(self, attempt: Attempt) -> None:
        if attempt.session != self.session:
            return
        if self.world.now < self.frozen_until:
            self.world.later(self.frozen_until - self.world.now, self._reply, attempt)
            return
        attempt.replied = True
        self._hands.remove(attempt)
        data = attempt.data if attempt.request.kind is Kind.READ and not attempt.errno else None
        if self.options.evicts and attempt.covers is not None and attempt.errno:
            for sector, _ in attempt.covers:
                self.disk.evict(sector)
        attempt.done(attempt.request, attempt.errno, data)

    def calm(self) -> None:
        """All faults end; what hung is answered."""
        self._calm = True
        self.away_until = self.other_until = self.frozen_until = self.full_until = 0.0
        self.relapse_until = self.stubborn_until = self.offline_until = 0.0
        self.fail_next = self.fail_flushes = self.hang_next = self.delay_next = self.short_next = 0
        self.fail_fuas = 0
        self._dies_after = 0
        self.bad_sectors.clear()


def _sectors(request: Request) -> range:
    return range(request.offset // SECTOR, (request.offset + request.length) // SECTOR)
