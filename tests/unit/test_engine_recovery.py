"""What was answered and not flushed, after an error, an outage or with a log that is full."""

import errno as e
from collections.abc import Callable

import pytest

from healfs.core.engine import Limits
from healfs.core.request import Kind, Request
from tests.unit.playbook import BLOCK, Playbook, policy, retry

BIG = 64 << 20
CHUNK = 16  # blocks: 64 KiB


class Disk(Playbook):
    """A playbook whose backend has a volatile cache, and that answers by a rule.

    `drive` answers all that is in flight and what is sent upon that; `own` are the pieces of
    replays and the flushes among it.
    """

    def __init__(self, *arguments, size=BIG, **keywords):
        super().__init__(*arguments, up=False, **keywords)
        self.flying: dict[int, Request] = {}
        self.pieces: list[Request] = []  # of replays, all there were
        self.on_send = self._note
        self.engine.start()
        self.back(size)
        self.take()

    def back(self, size=BIG, **keywords):
        self.up(size, **{"volatile_cache": True} | keywords)

    def _note(self, request):
        self.flying[request.order] = request
        if request.internal and request.kind not in (Kind.FLUSH, Kind.READ):
            self.pieces.append(request)

    def close(self):
        super().close()
        self.flying.clear()

    def request(self, name, kind, offset=0, length=0, *, fua=False):
        """As the channel makes it: the payload is in the ring, or outside when there is no room."""

        def answered(request, errno, data):
            assert name not in self.answers, f"a second answer to {name}"
            self.answers[name] = errno, None if data is None else bytes(data)

        request = Request(kind, offset, length, answered, fua=fua)
        if kind is Kind.WRITE:
            ring = self.engine.log.ring
            ring.target()[:length] = _content(name, length)
            slot = request.owner = ring.keep(length)
            request.data, slot.request = slot.data, request
        self.engine.submit(request)
        return request

    def drive(self, rule: Callable[[Request], int] = lambda request: 0, rounds: int = 8) -> None:
        for _ in range(rounds):
            flying, self.flying = self.flying, {}
            for request in flying.values():
                data = bytes(request.length) if request.kind is Kind.READ else None
                self.engine.completed(request, rule(request), data)

    def drive_for(self, seconds, rule=lambda request: 0, step=0.25):
        end = self.now + seconds
        while self.now < end:
            self.run(step)
            self.drive(rule)

    def written(self, name, block, blocks=1):
        """A write that the backend has done, and that is answered."""
        self.write(name, block, blocks)
        self.drive()
        assert self.answers[name] == (0, None)

    def replayed(self):
        return [(r.kind, r.offset // BLOCK, r.length // BLOCK) for r in self.pieces]

    def succeeded(self, name):
        return self.answers.get(name) == (0, None)


def _content(name, length):
    return (name.encode() * length)[:length]


def _touches(block):
    def rule(request):
        first = request.offset <= block * BLOCK < request.offset + request.length
        return e.EIO if first and request.kind is Kind.WRITE else 0

    return rule


def _replays_fail(request):
    return e.EIO if request.internal and request.kind is not Kind.FLUSH else 0


# --- a failed FUA write -------------------------------------------------------------------------


def test_a_failed_fua_write_makes_all_that_is_not_flushed_come_again():
    """Its own fsync has used up the error that tells of everybody's writes."""
    disk = Disk()
    disk.written("a", 0)
    fua = disk.request("b", Kind.WRITE, 5 * BLOCK, BLOCK, fua=True)
    disk.flush("early")
    disk.drive(lambda request: e.EIO if request is fua else 0, rounds=1)
    assert not disk.succeeded("early")
    disk.flush("late")
    assert disk.state == "replaying" and not disk.succeeded("late")
    disk.drive(lambda request: e.EIO if request is fua else 0)
    assert (Kind.WRITE, 0, 1) in disk.replayed()
    disk.drive_for(5)
    assert all(disk.succeeded(name) for name in ("b", "early", "late"))
    disk.flush("last")
    disk.drive()
    assert disk.state == "ready" and disk.succeeded("last") and not len(disk.engine.log)


def _flush_of(disk):
    return next(r for r in disk.flying.values() if r.kind is Kind.FLUSH)


@pytest.mark.parametrize("errno", [e.EIO, e.EINVAL])
@pytest.mark.parametrize("flush_last", [True, False])
def test_a_flush_beside_a_failed_fua_write_proves_nothing(flush_last, errno):
    """Either may have been told of the error of a's bytes, whichever is answered first."""
    disk = Disk()
    disk.written("a", 0)
    fua = disk.request("b", Kind.WRITE, 5 * BLOCK, BLOCK, fua=True)
    disk.flush("f")
    flush = _flush_of(disk)
    disk.flying.clear()
    if flush_last:
        disk.engine.completed(fua, errno)
        disk.engine.completed(flush, 0)
    else:
        disk.engine.completed(flush, 0)
        assert "f" not in disk.answers and disk.counts["in_flight"] == 2
        disk.engine.completed(fua, errno)
    assert "f" not in disk.answers and disk.state == "replaying"
    disk.drive_for(5)
    assert (Kind.WRITE, 0, 1) in disk.replayed()
    assert disk.succeeded("f")
    assert disk.answers["b"] == (0 if errno == e.EIO else e.EINVAL, None)


def test_a_flush_waits_for_the_fua_writes_beside_it_and_for_no_newer_ones():
    disk = Disk()
    disk.written("a", 0)
    first = disk.request("b", Kind.WRITE, 5 * BLOCK, BLOCK, fua=True)
    disk.flush("f")
    flush = _flush_of(disk)
    second = disk.request("c", Kind.WRITE, 6 * BLOCK, BLOCK, fua=True)
    disk.flying.clear()
    disk.engine.completed(flush, 0)
    disk.request("d", Kind.WRITE, 7 * BLOCK, BLOCK, fua=True)
    disk.flush("g")  # for the next one
    disk.engine.completed(first, 0)
    assert "f" not in disk.answers
    disk.engine.completed(second, 0)
    assert disk.succeeded("f") and "g" not in disk.answers and "d" not in disk.answers
    disk.drive()
    assert disk.succeeded("g") and disk.succeeded("d")


def test_a_flush_that_waits_for_a_fua_write_goes_with_the_connection():
    disk = Disk()
    disk.written("a", 0)
    disk.request("b", Kind.WRITE, 5 * BLOCK, BLOCK, fua=True)
    disk.flush("f")
    disk.engine.completed(_flush_of(disk), 0)
    disk.lose()
    assert "f" not in disk.answers
    disk.back()
    disk.drive()
    assert (Kind.WRITE, 0, 1) in disk.replayed() and disk.succeeded("f")


def test_a_pause_waits_for_a_flush_that_waits_for_a_fua_write():
    disk = Disk()
    disk.written("a", 0)
    fua = disk.request("b", Kind.WRITE, 5 * BLOCK, BLOCK, fua=True)
    disk.flush("f")
    disk.engine.completed(_flush_of(disk), 0)
    disk.flying.clear()
    disk.engine.pause()
    assert not disk.told("HEALFS_DRAINED")
    disk.engine.completed(fua, 0)
    assert disk.succeeded("f") and disk.succeeded("b")
    disk.drive()
    assert disk.told("HEALFS_DRAINED") == [{"unflushed": 0}]


@pytest.mark.parametrize("by", ["flush", "fua"])
def test_a_fua_write_that_ends_after_a_failure_beside_it_is_not_stable_either(by):
    disk = Disk()
    disk.written("a", 0)
    fua = disk.request("b", Kind.WRITE, 5 * BLOCK, BLOCK, fua=True)
    if by == "flush":
        disk.flush("f")
        failed = _flush_of(disk)
    else:
        failed = disk.request("f", Kind.WRITE, 6 * BLOCK, BLOCK, fua=True)
    disk.flying.clear()
    disk.engine.completed(failed, e.EIO)
    disk.engine.completed(fua, 0)
    assert not disk.answers.keys() - {"a"}
    disk.drive_for(5)
    assert disk.succeeded("b") and disk.succeeded("f")


@pytest.mark.parametrize("given_up", [False, True])
def test_a_refused_fua_write_proves_nothing_either(given_up):
    """Its flush may have been refused, after it was told of everybody's error."""
    disk = Disk()
    disk.written("a", 0)
    fua = disk.request("b", Kind.WRITE, 5 * BLOCK, BLOCK, fua=True)
    if given_up:
        disk.engine.cancel(fua)
    disk.drive(lambda request: e.EINVAL if request is fua else 0, rounds=1)
    assert disk.answers["b"] == (e.EINTR if given_up else e.EINVAL, None)
    disk.flush("f")
    assert disk.state == "replaying" and not disk.succeeded("f")
    disk.drive()
    assert (Kind.WRITE, 0, 1) in disk.replayed()
    assert disk.succeeded("f") and disk.state == "ready" and not len(disk.engine.log)


def test_a_failed_fua_write_that_nobody_waits_for_any_more_is_no_better():
    disk = Disk()
    disk.written("a", 0)
    fua = disk.request("b", Kind.WRITE, 5 * BLOCK, BLOCK, fua=True)
    disk.engine.cancel(fua)
    disk.drive(lambda request: e.EIO if request is fua else 0)
    assert (Kind.WRITE, 0, 1) in disk.replayed() and disk.answers["b"] == (e.EINTR, None)
    disk.flush("f")
    disk.drive()
    assert disk.succeeded("f") and not len(disk.engine.log)


@pytest.mark.parametrize("what", ["flush", "write"])
def test_what_fails_after_a_silence_is_replayed(what):
    disk = Disk(slow_after=5)
    disk.written("a", 0)
    if what == "flush":
        disk.flush("b")
    else:
        disk.request("b", Kind.WRITE, 5 * BLOCK, BLOCK, fua=True)
    (hung,) = disk.flying.values()
    disk.run(6)
    assert disk.state == "stalled"
    del disk.flying[hung.order]
    disk.engine.completed(hung, e.EIO)
    disk.drive_for(5)
    assert (Kind.WRITE, 0, 1) in disk.replayed()
    assert disk.state == "ready" and disk.succeeded("b")


def test_a_failed_write_without_fua_is_its_own_matter():
    disk = Disk()
    disk.written("a", 0)
    disk.write("b", 5)
    disk.drive(_touches(5), rounds=1)
    disk.flush("f")
    disk.drive(rounds=1)
    assert disk.succeeded("f") and not disk.pieces


# --- before the first connection ----------------------------------------------------------------


@pytest.fixture
def unseen():
    """mount --no-wait: the size is known, and nothing else."""
    play = Playbook(up=False)
    play.engine.size = BIG
    play.engine.start()
    play.take()
    return play


def test_writes_before_the_first_connection_are_ordered_by_the_largest_block(unseen):
    unseen.request("a", Kind.WRITE, 0, 512)
    unseen.request("b", Kind.WRITE, 512, 512)
    unseen.request("c", Kind.WRITE, 65536 - 512, 512)
    unseen.request("d", Kind.WRITE, 65536, 512)
    unseen.up(BIG, align=65536)
    unseen.expect("send a", "send d")
    unseen.ok("a")
    unseen.expect("answer a", "send b")
    unseen.ok("b")
    unseen.expect("answer b", "send c")


@pytest.mark.parametrize("align", [1, 512])
def test_after_it_the_blocks_of_the_backend_count(unseen, align):
    unseen.up(BIG, align=align)
    unseen.request("a", Kind.WRITE, 0, 512)
    unseen.request("b", Kind.WRITE, 512, 512)
    unseen.expect("send a", "send b")


# --- one write that does not land ---------------------------------------------------------------


def _bad_range(request):
    return e.ENOSPC if request.kind is Kind.WRITE and request.offset == 0 else 0


@pytest.mark.parametrize("given", [None, policy(retry(timeout=3600))])
def test_a_write_that_never_lands_stops_no_other(given):
    """Sixteen times as many bytes as the log has room for go past it."""
    disk = Disk(given)
    disk.write("bad")
    disk.drive(_bad_range)
    for number in range(1, 1000):
        disk.write(f"w{number}", number * CHUNK, CHUNK)
        disk.drive(_bad_range)
    disk.drive_for(5, _bad_range)
    assert len(disk.answers) == 999 and "bad" not in disk.answers
    bad = []
    disk.drive_for(3, lambda r: bad.append(bytes(r.data)) or 0 if r.kind is Kind.WRITE else 0)
    assert bad == [_content("bad", BLOCK)] and disk.succeeded("bad")


def test_a_suspect_entry_stops_no_other_write():
    """Answered and refused in the replay: it is moved up, too, and is written as it was."""
    disk = Disk()
    disk.written("bad", 0)
    disk.lose()
    disk.take()
    disk.back()
    rule = _touches(0)
    disk.drive(rule)
    for number in range(1, 300):
        disk.write(f"w{number}", number * CHUNK, CHUNK)
        disk.drive_for(0.5, rule)
    disk.drive_for(5, rule)
    assert len(disk.answers) == 300
    disk.read("r", 0)
    disk.drive()
    assert disk.answers["r"] == (0, _content("bad", BLOCK))
    disk.pieces.clear()
    disk.flush("f")
    landed = []
    disk.drive_for(5, lambda r: landed.append((r.offset, bytes(r.data))) or 0 if r.data else 0)
    assert (0, _content("bad", BLOCK)) in landed and disk.succeeded("f")


@pytest.mark.timeout(15)  # moving up without an end
@pytest.mark.parametrize("kind", [Kind.WRITE, Kind.WRITE_ZEROES, Kind.DISCARD])
def test_a_ring_half_full_of_failing_writes_stops_no_other(kind):
    disk = Disk()

    def rule(request):
        return e.ENOSPC if request.kind is Kind.WRITE and request.offset < BIG // 2 else 0

    for number in range(40):
        disk.write(f"bad{number}", number * CHUNK, CHUNK)
        disk.drive(rule)
    disk.request("good", kind, BIG // 2, BLOCK)
    disk.drive(rule)
    assert disk.answers == {"good": (0, None)}
    disk.drive_for(10)
    assert len(disk.answers) == 41


def _fill(disk):
    """Answered writes without a flush until the ring is full: one goes to ordinary memory."""
    for number in range(100):
        disk.write(f"fill{number}", number * CHUNK, CHUNK)
        if f"fill{number}" in disk.answers or disk.counts["parked"]:
            break
        disk.drive(rounds=1)
    else:
        raise AssertionError("the ring is never full")
    return f"fill{number}"


class Unflushed(Disk):
    """Flushes are not answered."""

    def drive(self, rule=lambda request: 0, rounds=8):
        flushes = {o: r for o, r in self.flying.items() if r.kind is Kind.FLUSH}
        self.flying = {o: r for o, r in self.flying.items() if o not in flushes}
        super().drive(rule, rounds)
        self.flying |= flushes


def _others_are_answered(disk, seconds):
    """Reads go on, so the disk is not silent."""
    for _ in range(seconds):
        disk.read(f"r{disk.now}", 15000)
        disk.drive(rounds=1)
        disk.run(1)


def test_a_write_that_waits_for_room_does_so_under_retry_timeout():
    disk = Unflushed(policy(write=retry(timeout=20)))
    name = _fill(disk)
    _others_are_answered(disk, 19)
    assert name not in disk.answers and disk.state == "ready"
    _others_are_answered(disk, 3)
    assert disk.answers[name] == (e.EIO, None)
    assert disk.counts["parked"] == 0


def test_without_a_timeout_it_waits_until_there_is_room():
    disk = Unflushed()
    name = _fill(disk)
    _others_are_answered(disk, 100)
    assert name not in disk.answers
    Disk.drive(disk)
    assert disk.succeeded(name)


@pytest.mark.parametrize("given", [policy("report"), policy("stop"), policy(retry(timeout=20))])
def test_a_log_full_of_what_is_refused_is_an_error_like_any_other(given):
    """A thin disk without space takes writes into its cache and refuses them with the flush."""
    disk = Disk(given)

    def refuses(request):
        return e.ENOSPC if request.internal else 0

    for number in range(200):
        disk.write(f"w{number}", number * CHUNK, CHUNK)
        disk.drive(refuses)
    disk.drive_for(3, refuses)
    waits = [n for n in range(200) if f"w{n}" not in disk.answers]
    assert disk.engine.latched
    if given == policy("report"):
        assert not waits and disk.answers["w199"] == (e.ENOSPC, None)
        return
    assert waits[0] > 0 and waits[-1] == 199
    if given == policy("stop"):
        assert disk.state == "paused" and disk.engine.no_space
        disk.engine.resume()
    else:
        disk.drive_for(20, refuses)
        assert disk.answers["w199"] == (e.ENOSPC, None)
    disk.drive_for(10)  # there is space again
    assert len(disk.answers) == 200 and disk.state == "ready" and not disk.engine.latched


def test_a_read_beside_a_flush_that_fails_shows_what_the_log_has():
    """Linux takes a page that it could not write for a clean one, and may drop it."""
    disk = Disk()
    disk.written("old", 0, 2)
    disk.written("w", 1)
    disk.flush("f")
    disk.read("r", 0, 3)
    disk.drive(lambda request: e.EIO if request.kind is Kind.FLUSH else 0, rounds=1)
    shown = _content("old", BLOCK) + _content("w", BLOCK) + bytes(BLOCK)
    assert disk.answers["r"] == (0, shown)


def test_a_fua_write_whose_failure_is_ignored_is_not_overwritten_by_the_replay():
    """The backend has done it; whether it is stable is not certain: a flush has failed before."""
    disk = Disk(policy(write="ignore"))
    disk.written("old", 0)
    disk.flush("f")
    disk.drive(lambda request: e.EIO if request.kind is Kind.FLUSH else 0, rounds=3)
    assert disk.engine.latched and disk.state == "ready"
    disk.request("new", Kind.WRITE, 0, BLOCK, fua=True)
    disk.drive(rounds=1)
    assert disk.succeeded("new")
    disk.pieces.clear()
    disk.drive_for(2)
    assert [bytes(r.data[:3]) for r in disk.pieces] == [b"new"]
    assert not disk.engine.latched


class Blocks(Disk):
    """The backend takes whole blocks, and reads what it is not given of one."""

    def __init__(self):
        super().__init__()
        self.engine.settle = 5.0

    def back(self, size=BIG, **keywords):
        super().back(size, align=BLOCK, **keywords)


def test_what_was_refused_does_not_go_below_a_late_write_beside_it_in_its_block():
    """That carries the rest of its block as it was, without what had been refused."""
    disk = Blocks()
    disk.request("refused", Kind.WRITE, 0, 512)
    disk.drive()
    disk.lose()
    disk.back()
    disk.drive(lambda request: 0 if request.kind is Kind.FLUSH else e.ENOSPC)
    assert disk.engine.latched and disk.state == "ready"
    disk.request("late", Kind.WRITE, 512, 512)
    disk.request("elsewhere", Kind.WRITE, BLOCK, 512)
    disk.lose()
    disk.pieces.clear()
    disk.back()
    disk.drive()
    assert not disk.pieces
    disk.run(5.0)
    assert [r.offset for r in disk.pieces] == [0]
    disk.drive()
    assert not disk.engine.latched


def test_a_piece_waits_for_the_late_one_of_the_same_write_in_its_block():
    """What is newer lies between them: the late one carries what was there before the other."""
    disk = Blocks()
    disk.request("older", Kind.WRITE, 0, 1536)
    disk.drive()
    disk.request("newer", Kind.WRITE, 512, 512)
    disk.drive()
    disk.lose()
    disk.back()
    assert [r.offset for r in disk.pieces] == [0]
    disk.lose()
    disk.pieces.clear()
    disk.back()
    disk.drive()
    assert [r.offset for r in disk.pieces] in ([], [0])
    disk.drive_for(6)
    assert {r.offset for r in disk.pieces} == {0, 512, 1024}
    assert not disk.engine.latched


def test_a_disk_that_comes_back_without_a_cache_keeps_what_is_newer_than_its_replay():
    disk = Disk()
    disk.written("oldest", 0)
    disk.written("older", 0)
    disk.lose()
    disk.back(volatile_cache=False)
    disk.drive(lambda request: e.EIO if request.kind is Kind.FLUSH else 0, rounds=2)
    assert disk.engine.latched and disk.state == "ready"
    disk.written("newest", 0)
    disk.pieces.clear()
    disk.drive_for(2)
    assert [bytes(r.data[:6]) for r in disk.pieces] == [b"newest"]
    assert not disk.engine.latched and not len(disk.engine.log)


@pytest.mark.parametrize("given", [policy("report"), policy()])
def test_a_suspect_entry_that_holds_a_full_ring_stops_no_other_write(given):
    """There is no room to move it up to, but where the others were that the replay has freed."""
    disk = Disk(given)
    disk.written("bad", 0)
    disk.flush("f")
    disk.drive(lambda request: e.EIO if request.kind is Kind.FLUSH else 0, rounds=1)
    disk.drive(_touches(0))
    assert disk.engine.latched
    for number in range(200):
        disk.write(f"w{number}", (1 + number) * CHUNK, CHUNK)
        disk.drive(_touches(0))
    disk.drive_for(20, _touches(0))
    for number in range(200, 210):
        disk.write(f"w{number}", (1 + number) * CHUNK, CHUNK)
    disk.drive_for(3, _touches(0))
    assert all(disk.succeeded(f"w{number}") for number in range(210))
    disk.read("r", 0)
    disk.drive()
    assert disk.answers["r"] == (0, _content("bad", BLOCK))


def test_entries_beside_a_suspect_do_not_pile_up():
    """Each successful flush of a replay frees what a newer entry hides."""
    disk = Disk()
    disk.written("old", 0, 16)
    disk.lose()
    disk.take()
    disk.back()
    bad = _touches(15)
    disk.drive(bad)
    disk.write("beside", 0, 15)
    disk.drive(bad)
    for number in range(300):
        disk.write(f"w{number}", 3)
        disk.drive_for(2, bad, step=1)
    assert disk.state == "ready" and len(disk.answers) == 302
    assert disk.engine.status()["write_log"]["requests"] <= 6
    disk.flush("f")
    disk.pieces.clear()
    disk.drive_for(5)
    assert disk.succeeded("f") and not len(disk.engine.log)


# --- the replay ---------------------------------------------------------------------------------


def test_retry_timeout_runs_on_through_a_relapse_after_the_replay():
    """A server that dies with the first request of each connection: no guest has an answer."""
    disk = Disk(policy(retry(timeout=10)))
    disk.run(10)
    disk.written("a", 0)
    disk.lose()
    disk.write("b", 1)
    disk.run(6, refuse=True)
    disk.back()
    disk.drive(rounds=2)  # the replay
    assert disk.state == "ready" and not disk.told("HEALFS_RECOVERED")
    disk.lose()
    disk.run(4.1, refuse=True)
    assert disk.answers["b"] == (e.EIO, None)
    disk.back()
    disk.drive()
    assert [told["requests_waited"] for told in disk.told("HEALFS_RECOVERED")] == [1]


def test_a_replay_that_is_due_in_a_silence_comes_after_it():
    """The backend refuses an entry, then hangs: when it answers again, so does the replay."""
    disk = Disk(policy(retry(interval=30)), slow_after=5)
    disk.written("a", 0)
    disk.lose()
    disk.take()
    disk.back()
    gap, last = 0.0, disk.now
    while gap < 8:  # the pauses grow
        disk.run(0.25)
        if disk.pieces:
            gap, last = disk.now - last, disk.now
            disk.drive(_replays_fail)
            disk.pieces.clear()
    disk.read("r", 50)
    disk.run(45)
    assert disk.state == "stalled" and not disk.pieces
    disk.drive(rounds=1)
    assert disk.state == "ready" and "r" in disk.answers
    disk.flush("f")
    disk.drive_for(60)
    assert disk.replayed() == [(Kind.WRITE, 0, 1)] and disk.succeeded("f")


@pytest.mark.parametrize("errno", [e.EOPNOTSUPP, e.EINVAL, e.ENOSYS])
def test_zeroes_that_a_returned_server_cannot_write_are_written_as_bytes(errno):
    disk = Disk()
    disk.zero("z", 1, 600)
    disk.drive()
    assert disk.succeeded("z")
    disk.lose()
    disk.take()
    disk.back()
    written = {}

    def rule(request):
        if request.kind is Kind.WRITE_ZEROES:
            return errno
        if request.kind is Kind.WRITE:
            assert len(request.data) == request.length and not any(request.data)
            written.update(dict.fromkeys(range(request.offset, request.offset + request.length)))
        return 0

    disk.drive(rule)
    assert disk.state == "ready"
    assert written.keys() == set(range(BLOCK, 601 * BLOCK))
    assert max(r.length for r in disk.pieces if r.kind is Kind.WRITE) <= 1 << 20
    disk.flush("f")
    disk.drive(rule)
    assert disk.succeeded("f") and not len(disk.engine.log)


def test_the_next_replay_asks_again_whether_it_can():
    disk = Disk()
    disk.zero("z", 1, 2)
    disk.drive()
    zeroes, write = Kind.WRITE_ZEROES, Kind.WRITE
    for errno, kinds in ((e.EOPNOTSUPP, [zeroes, write]), (0, [zeroes])):
        disk.lose()
        disk.run(40, refuse=True)
        disk.take()
        disk.pieces.clear()
        disk.back()

        def rule(request, errno=errno):
            return errno if request.kind is zeroes else 0

        disk.drive(rule, rounds=len(kinds))  # not the flush: all comes again
        assert [r.kind for r in disk.pieces] == kinds


# --- another disk -------------------------------------------------------------------------------


@pytest.fixture
def other():
    """Another disk came back, and a write waits to be replayed."""
    disk = Disk()
    disk.written("a", 0)
    disk.lose()
    disk.back(mismatch="it is disk B")
    assert disk.state == "mismatch"
    disk.take()
    return disk


def test_accept_is_for_the_disk_that_the_operator_saw(other):
    other.engine.accept(replay=True)
    other.back(mismatch="it is disk B")
    assert other.replayed() == [(Kind.WRITE, 0, 1)]
    other.drive()
    assert other.state == "ready"


@pytest.mark.parametrize("refused", [False, True])
def test_accept_is_for_no_third_disk(other, refused):
    other.engine.accept(replay=True)
    if refused:  # the try that accept begins
        other.refuse()
        other.run(2)
    other.back(mismatch="it is disk C")
    assert other.state == "mismatch" and not other.pieces
    assert other.told("HEALFS_MISMATCH")[-1]["reason"] == "it is disk C"


def test_accept_is_used_up_by_the_disk_that_comes(other):
    other.engine.accept(replay=True)
    other.back()  # the right one, after all
    other.drive()
    assert other.state == "ready"
    other.lose()
    other.back(mismatch="it is disk B")
    assert other.state == "mismatch"


def test_a_disk_that_is_smaller_is_never_accepted(other):
    other.engine.accept(replay=True)
    other.back(BIG // 2, mismatch="it is disk B")
    assert other.state == "mismatch" and not other.pieces


@pytest.mark.parametrize("mismatch", ["its minimum_block is '8192', was '1'", ""])
def test_a_disk_with_larger_blocks_is_never_accepted(other, mismatch):
    """What is parked would not fit: it is ordered by the blocks that the disk had."""
    for _ in range(2):
        other.back(align=8192, mismatch=mismatch)
        assert other.state == "mismatch" and not other.pieces
        other.engine.accept(replay=True)
    assert "8192" in other.told("HEALFS_MISMATCH")[-1]["reason"]
    other.back(mismatch="its blocks are as small")
    other.engine.accept(replay=True)
    other.back(mismatch="its blocks are as small")
    assert other.replayed() == [(Kind.WRITE, 0, 1)]


# --- many requests ------------------------------------------------------------------------------


class Counted(int):
    """An order that counts how often it is compared."""

    compared = 0

    def __lt__(self, other):
        Counted.compared += 1
        return int(self) < int(other)

    def __gt__(self, other):
        Counted.compared += 1
        return int(self) > int(other)

    def __eq__(self, other):
        Counted.compared += 1
        return int(self) == int(other)

    __hash__ = int.__hash__


class Ordered(Request):
    __slots__ = ("_order",)

    @property
    def order(self):
        return self._order

    @order.setter
    def order(self, value):
        self._order = Counted(value)


def _comparisons_of_a_stop(count):
    play = Playbook(size=count * BLOCK, limits=Limits(in_flight=count))
    for number in range(count):
        request = Ordered(Kind.READ, number * BLOCK, BLOCK, lambda *answer: None)
        play.engine.submit(request)
        play.engine.completed(request, e.EIO)
    Counted.compared = 0
    play.engine.set_policy(policy("stop"))
    assert play.state == "paused" and play.counts["parked"] == count
    return Counted.compared


@pytest.mark.plain
def test_a_stop_with_thousands_of_failing_requests_is_not_quadratic():
    fewer, more = _comparisons_of_a_stop(1000), _comparisons_of_a_stop(2000)
    assert 0 < more < 3 * fewer


# --- what hangs, and room in the log ------------------------------------------------------------


def test_a_write_that_hangs_and_holds_the_log_is_no_reason_to_flush_again_and_again():
    disk = Disk()
    hung = disk.request("hung", Kind.WRITE, 0, BLOCK)
    del disk.flying[hung.order]  # it is not answered
    flushes = []

    def drive():
        def rule(request):
            flushes.extend([request] * (request.kind is Kind.FLUSH))
            return 0

        disk.drive(rule, rounds=200)
        assert not disk.flying, "it never rests"

    for number in range(200):
        disk.write(f"w{number}", CHUNK * (number + 1), CHUNK)
        drive()
    waiting = sum(f"w{number}" not in disk.answers for number in range(200))
    assert waiting > 100 and len(flushes) < 100
    seen = len(flushes)
    for _ in range(10):
        disk.run(1)
        drive()
    assert len(flushes) <= seen + 10
    disk.engine.completed(hung, 0)
    disk.drive(rounds=400)
    assert all(disk.succeeded(f"w{number}") for number in range(200)) and disk.succeeded("hung")


def test_writes_that_wait_for_their_range_take_no_room_from_others():
    disk = Disk(size=BIG)
    disk.engine.fence = True
    disk.fence = lambda: None
    blocks = range(0, 60 * CHUNK, CHUNK)  # 60 of 64 KiB: nearly all of the log
    for block in blocks:
        disk.write(f"a{block}", block, CHUNK)
    disk.lose()
    disk.engine.fenced("it does not answer")
    disk.run(30)
    disk.back()
    disk.drive()
    for block in blocks:
        assert disk.succeeded(f"a{block}")
        disk.write(f"b{block}", block, CHUNK)  # newer, to ranges that are not settled
    others = range(100 * CHUNK, 200 * CHUNK, CHUNK)
    for block in others:
        disk.write(f"c{block}", block, CHUNK)
        disk.drive()
    assert all(disk.succeeded(f"c{block}") for block in others)
    assert not any(f"b{block}" in disk.answers for block in blocks)
    disk.run(30)
    disk.engine.fenced("")
    disk.drive()
    assert all(disk.succeeded(f"b{block}") for block in blocks)


@pytest.mark.plain
def test_a_read_that_fails_beside_suspects_leaves_nothing_behind():
    disk = Disk(policy(read="report"))
    disk.written("a", 0)
    disk.flush("f")
    disk.drive(lambda request: e.EIO if request.kind is not Kind.READ else 0, rounds=4)
    for number in range(20):
        disk.read(f"r{number}", 0, 2)
        disk.drive(lambda request: e.EIO)
        assert disk.answers[f"r{number}"] == (e.EIO, None)
    assert not disk.engine._overlays
