"""The ring of payloads against a plain list of what was kept."""

import mmap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from healfs.core import ring as ring_module
from healfs.core.ring import PayloadRing

MESSAGE = 4 * mmap.PAGESIZE
STEPS = st.lists(
    st.tuples(st.booleans(), st.integers(1, MESSAGE), st.integers(0, 1 << 16)), max_size=80
)


@settings(max_examples=200, deadline=None)
@given(STEPS, st.integers(2, 5))
def test_what_is_kept_stays_as_it_is_until_it_is_released(steps, messages):
    ring = PayloadRing(memoryview(bytearray(messages * MESSAGE)), MESSAGE)
    kept = []
    for number, (keep, length, choice) in enumerate(steps):
        if keep or not kept:
            content = bytes([number % 255 + 1]) * length
            target = ring.target()
            assert len(target) >= MESSAGE
            target[:length] = content
            kept.append((ring.keep(length), content))
        else:
            ring.release(kept.pop(choice % len(kept))[0])
        for slot, content in kept:
            assert bytes(slot.data) == content
        assert 0 <= ring.used <= ring.size
        assert ring.overflow == sum(len(slot.data) for slot, _ in kept if not slot.end)
    for slot, _ in kept:
        ring.release(slot)
    assert ring.overflow == 0
    assert ring.used == 0


@settings(max_examples=200, deadline=None)
@given(STEPS, st.integers(2, 5), st.integers(0, 100))
def test_the_oldest_is_moved_to_where_others_were_and_nothing_else_changes(steps, messages, at):
    """As the log does it; what was freed by an attempt that may still read it is no gap."""
    ring = PayloadRing(memoryview(bytearray(messages * MESSAGE)), MESSAGE)
    kept, pinned = [], []
    for number, (keep, length, choice) in enumerate(steps):
        if keep or not kept:
            content = bytes([number % 255 + 1]) * length
            ring.target()[:length] = content
            kept.append((ring.keep(length), content))
        else:
            slot, content = kept.pop(choice % len(kept))
            if choice % 7 == 0 and slot.end:
                slot.pinned = True
                pinned.append((slot, content))
            ring.release(slot)
        oldest = ring.oldest()
        if number >= at and oldest is not None and not oldest.pinned:
            [content] = [content for slot, content in kept if slot is oldest]
            copy = ring.store_in_gap(oldest.data)
            if copy is not None:
                assert copy.end > oldest.end
                kept = [(slot, content) for slot, content in kept if slot is not oldest]
                kept.append((copy, content))
                before = ring.used
                ring.release(oldest)
                ring.close_gap()
                assert ring.used < before
        for slot, content in kept + pinned:
            assert bytes(slot.data) == content
        assert 0 <= ring.used <= ring.size
    ring.unpin([slot for slot, _ in pinned])
    for slot, _ in kept:
        ring.release(slot)
    assert ring.used == 0


def test_the_oldest_of_a_full_ring_is_moved_behind_others_freed():
    memory = memoryview(bytearray(4 * MESSAGE))
    ring = PayloadRing(memory, MESSAGE)
    slots = []
    for _ in range(4):
        ring.target()[:MESSAGE] = bytes([len(slots) + 1]) * MESSAGE
        slots.append(ring.keep(MESSAGE))
    ring.release(slots[1])
    ring.release(slots[2])
    assert ring.store(b"x") is None
    copy = ring.store_in_gap(slots[0].data)
    assert copy is not None and copy.end == slots[2].end
    ring.release(slots[0])
    ring.close_gap()
    assert ring.used == 2 * MESSAGE and bytes(copy.data) == bytes([1]) * MESSAGE
    assert bytes(slots[3].data) == bytes([4]) * MESSAGE
    assert ring.store_in_gap(copy.data) is None
    ring.target()
    assert ring.keep(MESSAGE).end


def test_what_is_moved_lies_in_one_piece():
    ring = PayloadRing(memoryview(bytearray(4 * MESSAGE)), MESSAGE)
    slots = []
    for length in (*[MESSAGE] * 4, mmap.PAGESIZE):
        if ring.target() and len(slots) == 4:
            ring.release(slots[0])
            ring.release(slots[1])
            ring.target()
        slots.append(ring.keep(length))
    assert slots[4].place == 0 and slots[4].end
    ring.release(slots[3])
    ring.release(slots[4])
    copy = ring.store_in_gap(slots[2].data)
    assert copy is not None and copy.place == 3 * MESSAGE and len(copy.data) == MESSAGE


def test_a_full_ring_takes_ordinary_memory_and_comes_back():
    ring = PayloadRing(memoryview(bytearray(2 * MESSAGE)), MESSAGE)
    slots = []
    for _ in range(4):
        ring.target()
        slots.append(ring.keep(MESSAGE))
    assert ring.overflow == 2 * MESSAGE
    for slot in slots:
        ring.release(slot)
    ring.target()
    assert ring.keep(MESSAGE).end
    assert ring.overflow == 0


def test_a_ring_that_is_shut_gives_no_room_until_it_is_unpinned():
    memory = bytearray(4 * MESSAGE)
    ring = PayloadRing(memoryview(memory), MESSAGE)
    ring.target()[:5] = b"first"
    kept = ring.keep(5)
    ring.shut()
    ring.release(kept)
    assert ring.at < 0 and ring.store(b"no") is None
    ring.target()[:6] = b"second"
    outside = ring.keep(6)
    assert bytes(memory[:6]) == b"first\0" and not outside.end and ring.overflow == 6
    ring.release(outside)
    ring.unpin([])
    assert ring.at == 0
    ring.target()
    assert ring.keep(5).end


def test_payloads_begin_on_a_page():
    ring = PayloadRing(memoryview(bytearray(8 * MESSAGE)), MESSAGE)
    for length in (1, 4095, 4096, 4097):
        before = ring.used
        ring.target()
        ring.keep(length)
        assert before % mmap.PAGESIZE == ring.used % mmap.PAGESIZE == 0


def test_one_old_payload_holds_back_the_tail_and_loses_nothing():
    ring = PayloadRing(memoryview(bytearray(4 * MESSAGE)), MESSAGE)
    ring.target()[:4] = b"old!"
    old = ring.keep(4)
    for _ in range(50):
        ring.target()[:4] = b"new!"
        ring.release(ring.keep(MESSAGE))
    assert bytes(old.data) == b"old!"


def test_a_ring_too_small_for_two_messages_is_refused():
    with pytest.raises(ValueError, match="too small"):
        PayloadRing(memoryview(bytearray(MESSAGE)), MESSAGE)


class There:
    """Which bytes of the memory have their pages."""

    def __init__(self, memory):
        self.memory = memory
        self.end = 0

    def populate(self, start, end):
        assert start == self.end < end
        self.end = end

    def drop(self, start, end):
        assert end >= self.end
        self.end = start
        self.memory[start:end] = bytes(end - start)


@settings(max_examples=200, deadline=None)
@given(STEPS, st.integers(2, 5))
def test_nothing_is_read_to_a_page_that_is_not_there_nor_is_what_is_kept_given_back(
    steps, messages
):
    memory = bytearray(messages * MESSAGE)
    pages = There(memory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring_module, "STEP", MESSAGE)
        ring = PayloadRing(memoryview(memory), MESSAGE, pages)
        kept = []
        for number, (keep, length, choice) in enumerate(steps):
            ring.target()
            if ring.at >= 0:
                assert ring.head % ring.size + MESSAGE <= pages.end
            if choice % 3 == 0:
                ring.shrink()
                assert kept or ring.is_small
            if keep or not kept:
                content = bytes([number % 255 + 1]) * length
                ring.target()[:length] = content
                kept.append((ring.keep(length), content))
            else:
                ring.release(kept.pop(choice % len(kept))[0])
            for slot, content in kept:
                assert bytes(slot.data) == content
        for slot, _ in kept:
            ring.release(slot)
        ring.shrink()
        assert pages.end == MESSAGE


def test_a_successor_has_the_pages_of_what_it_takes_over_and_gives_back_the_others():
    memory = bytearray(8 * MESSAGE)
    ring = PayloadRing(memoryview(memory), MESSAGE, There(memory))
    ring.target()[:1] = b"x"
    slot = ring.keep(1)
    pages = There(memory)
    PayloadRing(memoryview(memory), MESSAGE, pages).restore([slot])
    assert pages.end == len(memory)
    pages = There(memory)
    memory[-1] = 1  # the predecessor's
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring_module, "STEP", MESSAGE)
        PayloadRing(memoryview(memory), MESSAGE, pages).restore([])
    assert pages.end == MESSAGE and not memory[-1]
