"""The ring of payloads against a plain list of what was kept."""

import mmap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
