"""The write log: what it keeps, what a flush takes away, what a killed worker leaves."""

import sys
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from healfs.core import ring, writelog
from healfs.core.request import Kind, Request
from healfs.core.ring import PAGE
from healfs.core.writelog import HEADER, RESERVED, Attempt, WriteLog, memory_size, visible

ENTRIES = 2 * RESERVED + 16
MESSAGE = 2 * PAGE
PAYLOAD = 16 * PAGE
KINDS = st.sampled_from([Kind.WRITE, Kind.WRITE, Kind.DISCARD, Kind.WRITE_ZEROES])


def _nobody(request, errno, data):
    raise AssertionError("the log answers nobody")


class World:
    """A log, the requests given to it, and the bytes that each ought to have."""

    def __init__(self):
        self.memory = bytearray(memory_size(PAYLOAD, ENTRIES))
        self.log = WriteLog(memoryview(self.memory), ENTRIES, MESSAGE)
        self.content = {}  # by order
        self.order = 0

    def arrive(self, length=PAGE, offset=0, kind=Kind.WRITE, *, fua=False, may_unmap=False):
        """A request as the channel makes it: the payload was read to the ring's target."""
        self.order += 1
        request = Request(kind, offset, length, _nobody, fua=fua, may_unmap=may_unmap)
        request.order, request.tag = self.order, self.order * 2
        self.content[self.order] = None
        if kind is Kind.WRITE:
            content = bytes([self.order % 255 + 1]) * length
            self.log.ring.target()[:length] = content
            slot = self.log.ring.keep(length)
            slot.request, request.owner, request.data = request, slot, slot.data
            self.content[self.order] = content
        return request

    def entered(self, *arguments, completed=False, **keywords):
        request = self.arrive(*arguments, **keywords)
        assert self.log.enter(request)
        if completed:
            self.log.complete(request)
        return request

    def intact(self, requests):
        for request in requests:
            data = None if request.data is None else bytes(request.data)
            assert data == self.content[request.order], f"other bytes in {request}"

    def orders(self):
        return set(_recovered(self.memory))


def _recovered(memory):
    """What a successor finds, by order: everything about a request that it needs."""
    found, _ = WriteLog(memoryview(bytearray(memory)), ENTRIES, MESSAGE).recover(_nobody)
    assert len({r.order for r in found}) == len(found), "an entry was found twice"
    assert [r.order for r in found] == sorted(r.order for r in found)
    return {r.order: _facts(r) for r in found}


def _facts(request):
    return (
        *(request.kind, request.offset, request.length, request.fua, request.may_unmap),
        *(request.tag, bool(request.completed)),
        None if request.data is None else bytes(request.data),
    )


def _records(memory):
    """How many entries a successor has room for, those that it finds included."""
    world = World()
    world.log = WriteLog(memoryview(bytearray(memory)), ENTRIES, MESSAGE)
    world.log.recover(_nobody)
    world.order = 1000
    while world.log.enter(world.arrive(kind=Kind.DISCARD)):
        pass
    return len(world.log)


def _kill_points(memory, action):
    """The memory as a SIGKILL leaves it before each statement of the log's and the ring's."""
    files = {writelog.__file__, ring.__file__}
    left = []

    def trace(frame, event, argument):
        if frame.f_code.co_filename in files:
            left.append(bytes(memory))
            assert len(left) < 1000, "it does not end"
            return trace
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    left.append(bytes(memory))
    assert len(left) > 3
    return left


# --- the take-over ------------------------------------------------------------------------------

ENTRY = st.tuples(
    KINDS, st.integers(1, MESSAGE), st.integers(0, 1 << 40), *[st.booleans() for _ in range(3)]
)


@settings(max_examples=100, deadline=None)
@given(st.lists(ENTRY, max_size=8), st.lists(st.integers(0, 1 << 40), max_size=4))
def test_a_successor_finds_what_was_entered(entries, noted):
    world = World()
    expected = {}
    for kind, length, offset, fua, may_unmap, completed in entries:
        keywords = {"fua": fua, "may_unmap": may_unmap, "completed": completed}
        request = world.entered(length, offset, kind, **keywords)
        expected[request.order] = _facts(request)
    for order, start in enumerate(noted, 1000):
        world.log.note(Attempt(start, start + PAGE, order, 12.5, foreign=order % 2 == 1))
    assert _recovered(world.memory) == expected

    log = WriteLog(memoryview(world.memory), ENTRIES, MESSAGE)
    found, attempts = log.recover(_nobody)
    assert [(a.start, a.end, a.order, a.until, a.foreign) for a in attempts] == [
        (start, start + PAGE, order, 12.5, order % 2 == 1)
        for order, start in enumerate(noted, 1000)
    ]
    assert len(log) == len(entries)
    world.log, world.order = log, 2000
    while log.enter(new := world.arrive(MESSAGE)):  # into what is free, not over what is not
        found.append(new)
    world.intact(found)


def test_a_successor_has_the_records_that_were_free():
    world = World()
    kept = [world.entered(kind=Kind.WRITE_ZEROES) for _ in range(20)]
    for request in kept[::2]:
        world.log.leave(request)
    log = WriteLog(memoryview(world.memory), ENTRIES, MESSAGE)
    log.recover(_nobody)
    world.log = log
    count = 10
    while log.enter(world.arrive(kind=Kind.DISCARD)):
        count += 1
    assert count == log.limit


def test_a_forgotten_attempt_and_an_entry_that_left_are_not_found():
    world = World()
    attempt = Attempt(0, PAGE, 7, 1.0)
    world.log.note(attempt)
    world.log.leave(world.entered())
    world.log.forget(attempt)
    log = WriteLog(memoryview(world.memory), ENTRIES, MESSAGE)
    assert log.recover(_nobody) == ([], [])


@pytest.mark.plain
def test_a_worker_killed_in_enter_leaves_the_record_whole_or_free():
    world = World()
    old = world.entered(completed=True)
    old_facts = _facts(old)
    world.log.leave(world.entered(kind=Kind.DISCARD))  # its record is the next to be used
    new = world.arrive(100, 512, fua=True)
    for memory in _kill_points(world.memory, lambda: world.log.enter(new)):
        found = _recovered(memory)
        assert found.pop(old.order) == old_facts
        assert found in ({}, {new.order: _facts(new)})


@pytest.mark.plain
def test_a_worker_killed_in_complete_or_leave_loses_no_other_entry():
    world = World()
    other, request = world.entered(), world.entered()
    facts = {other.order: _facts(other)}
    for action in (lambda: world.log.complete(request), lambda: world.log.leave(request)):
        for memory in _kill_points(world.memory, action):
            found = _recovered(memory)
            found.pop(request.order, None)
            assert found == facts


@pytest.mark.plain
def test_a_worker_killed_in_move_up_loses_nothing():
    """An answered write survives a worker's crash at any moment (promise 3)."""
    world = World()
    stuck = world.entered(MESSAGE, completed=True)
    world.log.lost()
    for _ in range(3):
        world.entered(MESSAGE)
    expected = _recovered(world.memory)
    place = stuck.owner.place
    left = _kill_points(world.memory, world.log.move_up)
    assert stuck.owner.place != place
    for memory in left:
        assert _recovered(memory) == expected
    for table in {memory[HEADER:-PAYLOAD] for memory in left}:
        assert _records(bytes(HEADER) + table + bytes(PAYLOAD)) == World().log.limit


# --- the payloads -------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("aaaceeefmlp"), st.integers(1, MESSAGE), st.integers(0, 99)),
        max_size=60,
    )
)
def test_payloads_are_kept_whatever_moves_them(steps):
    world = World()
    waiting, entered, completed = deque(), [], []  # as the engine has them

    def answered(request):
        world.log.leave(request)
        assert request.data is None

    for step, length, choice in steps:
        if step == "a":
            waiting.append(world.arrive(length))
        elif step == "e" and waiting and world.log.enter(waiting[choice % len(waiting)]):
            entered.append(waiting[choice % len(waiting)])
            waiting.remove(entered[-1])
        elif step == "c" and entered:
            completed.append(entered.pop(choice % len(entered)))
            world.log.complete(completed[-1])
        elif step == "f":
            world.log.trim(world.log.mark())
            completed = [r for r in completed if r.record >= 0]
        elif step == "m":
            world.log.move_up()
        elif step == "l":
            world.log.lost()
        elif step == "p" and entered:
            answered(entered.pop(choice % len(entered)))  # with an error, as the policy says
        world.intact([*waiting, *entered, *completed])
        found = _recovered(world.memory)
        assert found == {r.order: _facts(r) for r in (*entered, *completed)}
    for request in (*waiting, *entered, *completed):
        answered(request)
    assert world.log.ring.used == world.log.ring.overflow == len(world.log) == 0


def test_what_waits_for_room_does_not_hold_back_the_ring():
    """evict: the oldest in the ring is not in the log yet, and newer ones are flushed."""
    world = World()
    first = world.arrive(MESSAGE)
    others = [world.entered(MESSAGE, completed=True) for _ in range(7)]
    outside = [world.arrive(MESSAGE), world.arrive(MESSAGE)]
    assert not any(r.owner.end for r in outside)
    assert world.log.enter(outside[0])  # it takes the place of the first, which goes out
    assert not first.owner.end and not world.log.enter(outside[1])
    world.intact([first, *others, *outside])
    world.log.trim(world.log.mark())
    assert all(r.data is None for r in others)
    assert world.log.enter(outside[1]) and world.log.enter(first)
    world.intact([first, *outside])


@pytest.mark.timeout(15)
def test_move_up_leaves_alone_what_the_backend_reads_or_a_flush_will_free():
    world = World()
    oldest = world.entered(MESSAGE, completed=True)
    for _ in range(4):
        world.entered(MESSAGE)
    place = oldest.owner.place
    world.log.move_up()
    assert oldest.owner.place == place  # the next flush frees it
    world.log.lost()
    oldest.owner.pinned = True
    world.log.move_up()
    assert oldest.owner.place == place
    oldest.owner.pinned = False
    world.log.move_up()
    assert oldest.owner.place != place
    world.intact([oldest])


# --- the trim rule ------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("wwccmmttl"), st.integers(0, 99)), max_size=60),
    st.sampled_from([None, lambda request: False]),
)
def test_a_flush_takes_away_what_was_completed_before_it_was_sent(steps, hold):
    world = World()
    sent, kept = [], {}  # kept: (session, moment of completion) by order
    flushes = []  # (session, moment of sending, mark)
    session = 0
    for moment, (step, choice) in enumerate(steps):
        if step == "w":
            sent.append(world.entered(kind=Kind.WRITE_ZEROES))
        elif step == "c" and sent:
            request = sent.pop(choice % len(sent))
            world.log.complete(request)
            kept[request.order] = session, moment
        elif step == "m":
            flushes.append((session, moment, world.log.mark()))
        elif step == "t" and flushes:
            on, at, mark = flushes.pop(choice % len(flushes))
            if on == session:  # the engine asks for no other
                world.log.trim(mark, hold)
                kept = {o: k for o, k in kept.items() if k[0] != on or k[1] > at}
        elif step == "l":
            session += 1
            world.log.lost()
        expected = {r.order for r in sent} | kept.keys()
        assert world.orders() == expected
        assert {r.order for r in world.log.unflushed()} == kept.keys()
        assert world.log.has_unflushed() == bool(kept)


def test_without_a_volatile_cache_answered_is_stable():
    world = World()
    world.log.keep = False
    request = world.entered(completed=True)
    assert request.data is None and not len(world.log) and not world.orders()


def test_what_hides_a_suspect_entry_stays_until_it_is_hidden_itself():
    world = World()
    for offset in (0, 0, 4 * PAGE, 0):
        world.entered(PAGE, offset, completed=True)
        world.log.trim(world.log.mark(), hold=lambda request: request.offset == 0)
    assert world.orders() == {4}  # the newest of those that hide, alone
    world.entered(2 * PAGE, PAGE // 2, completed=True)
    world.log.trim(world.log.mark(), hold=lambda request: False)
    assert world.orders() == {4, 5}  # 5 is newer than 4 in a part of it
    world.log.replayed([])
    assert not world.orders() and not world.log.ring.used


# --- visible ------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(KINDS, st.integers(0, 40), st.integers(1, 20)), max_size=12))
def test_visible_against_every_byte(ranges):
    entries = []
    for order, (kind, offset, length) in enumerate(ranges, 1):
        entries.append(Request(kind, offset, length, _nobody))
        entries[-1].order = order
    pieces = [(entry.order, start, end) for entry, start, end in visible(entries)]
    assert all(start < end for _, start, end in pieces)
    assert [order for order, _, _ in pieces] == sorted(order for order, _, _ in pieces)
    for byte in range(60):
        expected = []  # down to the newest that surely set it; a DISCARD may not have
        for entry in reversed(entries):
            if entry.offset <= byte < entry.offset + entry.length:
                expected.insert(0, entry.order)
                if entry.kind is not Kind.DISCARD:
                    break
        assert [order for order, start, end in pieces if start <= byte < end] == expected


# --- the saved state ----------------------------------------------------------------------------


def _saved(memory):
    return WriteLog(memoryview(bytearray(memory)), ENTRIES, MESSAGE).saved()


def test_a_new_log_has_nothing_saved():
    assert World().log.saved() is None


@pytest.mark.plain
def test_a_worker_killed_in_save_leaves_the_last_state():
    world = World()
    last = None
    for number in range(6):
        state = {"number": number, "text": "x" * (100 if number % 3 else 1000)}
        seen = []
        for memory in _kill_points(world.memory, lambda state=state: world.log.save(state)):
            seen.append(_saved(memory))
            assert seen[-1] in (last, state)
        assert seen == sorted(seen, key=lambda found: found == state) and seen[-1] == state
        last = state
        # Each worker goes on where the last one was.
        world.log = WriteLog(memoryview(world.memory), ENTRIES, MESSAGE)
        assert world.log.saved() == state


@pytest.mark.plain
def test_of_two_copies_the_whole_one_counts():
    world = World()
    world.log.save({"number": 1})
    older = bytes(world.memory)
    world.log.save({"number": 2})
    for at in [i for i, (a, b) in enumerate(zip(older, world.memory, strict=True)) if a != b]:
        torn = bytearray(world.memory)
        torn[at] ^= 0x55
        assert _saved(torn) in ({"number": 1}, {"number": 2})
        if torn[at] == older[at]:
            continue
        log = WriteLog(memoryview(torn), ENTRIES, MESSAGE)
        if log.saved() == {"number": 1}:  # the next save goes over the torn one
            left = _kill_points(torn, lambda log=log: log.save({"number": 3}))
            assert all(_saved(memory) in ({"number": 1}, {"number": 3}) for memory in left)


def test_a_state_that_does_not_fit_is_refused_and_the_last_one_stays():
    world = World()
    world.log.save({"number": 1})
    for _ in range(2):
        with pytest.raises(ValueError, match="too large"):
            world.log.save({"text": "x" * 8192})
    assert _saved(world.memory) == {"number": 1}
