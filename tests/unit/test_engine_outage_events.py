"""What the engine tells of an outage: its beginning, its kind, its end, and nothing of a retry."""

from __future__ import annotations

import errno as e

import pytest

from tests.unit.playbook import Playbook, policy, retry

OUTAGE = ("HEALFS_OUTAGE", "HEALFS_OUTAGE_CHANGED", "HEALFS_MISMATCH", "HEALFS_RECOVERED")


def told(play: Playbook) -> list[tuple[str, object]]:
    return [(name, data.get("kind")) for name, data in play.events if name in OUTAGE]


def test_a_thousand_tries_and_relapses_are_one_outage():
    play = Playbook()
    play.run(10)
    play.write("a")
    for _ in range(1000):
        play.lose()
        play.run(3, refuse=True)
        play.up()
    play.ok("a")
    assert len(play.connects) > 2000
    assert told(play) == [("HEALFS_OUTAGE", "away"), ("HEALFS_RECOVERED", None)]
    [begin] = play.told("HEALFS_OUTAGE")
    assert begin["reason"] == "Connection reset by peer"
    [end] = play.told("HEALFS_RECOVERED")
    assert end["seconds"] == pytest.approx(3000, abs=1)
    assert end["requests_waited"] == 1 and end["longest_wait"] == end["seconds"]


def test_each_change_of_kind_is_told():
    play = Playbook()
    play.run(10)
    play.write("a")
    play.run(6)
    assert told(play) == [("HEALFS_OUTAGE", "silent")]
    play.lose()
    play.up(mismatch="it is disk B")
    play.refuse()
    play.refuse()
    play.up()
    play.run(6)
    play.ok("a")
    assert told(play) == [
        ("HEALFS_OUTAGE", "silent"),
        ("HEALFS_OUTAGE_CHANGED", "away"),
        ("HEALFS_MISMATCH", None),
        ("HEALFS_OUTAGE_CHANGED", "away"),
        ("HEALFS_OUTAGE_CHANGED", "silent"),
        ("HEALFS_RECOVERED", None),
    ]


def test_requests_that_waited_are_counted_once_and_the_longest_wait_is_known():
    play = Playbook(policy(write=retry(20)))
    play.run(10)
    play.write("early", 0)
    play.read("r", 1)
    play.lose()
    play.run(5, refuse=True)
    play.write("late", 2)
    play.run(16, refuse=True)  # the writes are given up, 20 s after the loss
    assert play.answers["early"][0] == play.answers["late"][0] == e.EIO
    play.write("at once", 3)  # answered without a wait
    play.run(9, refuse=True)
    play.up()
    play.lose()  # a relapse counts nobody again
    play.run(5, refuse=True)
    play.up()
    play.ok("r")
    [end] = play.told("HEALFS_RECOVERED")
    assert end["requests_waited"] == 3
    assert end["longest_wait"] == end["seconds"] == pytest.approx(35, abs=1)


def test_a_flush_that_waited_is_counted():
    play = Playbook()
    play.run(10)
    play.flush("f")
    play.run(6)
    play.ok("f")
    [end] = play.told("HEALFS_RECOVERED")
    assert (end["requests_waited"], end["longest_wait"]) == (1, pytest.approx(6))


def test_an_outage_that_nobody_felt():
    play = Playbook()
    play.run(10)
    play.lose()
    play.run(2, refuse=True)
    play.up()
    [end] = play.told("HEALFS_RECOVERED")
    assert (end["requests_waited"], end["longest_wait"]) == (0, 0)


def test_a_bug_of_ours_is_told_once():
    play = Playbook()
    play.engine.fault("the channel")
    play.engine.fault("the channel")
    [told] = play.told("HEALFS_FAULTED")
    assert "the channel" in str(told["reason"])
