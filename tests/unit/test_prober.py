"""The backoff of the one prober."""

import random

import pytest

from healfs.core.prober import FIRST_PAUSE, Prober


@pytest.fixture
def prober():
    return Prober(random.Random(7))


def test_the_first_try_after_health_is_immediate(prober):
    prober.up(100.0)
    prober.down(101.0, 1.0)
    assert prober.next_try == 101.0


def test_a_relapse_waits_and_the_wait_goes_on_growing(prober):
    now, pauses = 100.0, []
    prober.up(now)
    for _ in range(12):
        prober.down(now, 1.0)
        pauses.append(prober.next_try - now)
        now = prober.next_try
        prober.begin()
        prober.up(now)
    assert 0.75 * FIRST_PAUSE <= pauses[0] <= FIRST_PAUSE
    assert all(0.75 <= pause <= 1.0 for pause in pauses[-4:])
    assert pauses[:5] == sorted(pauses[:5])


def test_the_pause_never_exceeds_the_longest(prober):
    prober.up(0.0)
    for _ in range(50):
        prober.failed(10.0, 0.05)
        assert prober.next_try - 10.0 <= 0.05


def test_a_hint_counts_only_while_a_try_is_awaited(prober):
    assert not prober.hint()
    prober.up(0.0)
    prober.down(10.0, 1.0)
    assert prober.hint()
    prober.begin()
    assert prober.trying and not prober.hint()
    prober.failed(10.0, 1.0)
    assert prober.next_try - 10.0 <= 0.001


def test_at_most_only_brings_forward(prober):
    prober.at_most(5.0)
    assert prober.next_try is None
    prober.later(9.0)
    prober.at_most(20.0)
    assert prober.next_try == 9.0
    prober.at_most(5.0)
    assert prober.next_try == 5.0
