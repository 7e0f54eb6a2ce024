"""Pause: what is in flight is answered, what was answered is flushed, the rest is held."""

from __future__ import annotations

import errno as e
from typing import Any

from tests.unit.playbook import Playbook


def cached() -> Playbook:
    """A backend with a volatile cache: there is a write log."""
    play = Playbook(up=False)
    play.engine.start()
    play.up(volatile_cache=True)
    play.take()
    return play


def pause(play: Playbook) -> dict[str, Any]:
    value = play.engine.status()["pause"]
    assert isinstance(value, dict)
    return value


def test_a_pause_drains_then_flushes_then_holds():
    play = cached()
    play.write("a", 0)
    play.write("b", 1)
    play.take()
    play.engine.pause({"uid": 7, "pid": 8})
    play.write("c", 2)
    play.expect("event STOP")
    assert play.told("STOP") == [{"by": "operator", "reason": "stop", "uid": 7, "pid": 8}]
    assert pause(play) == {"by": "operator", "stage": "draining", "unflushed": 0, "away": False}
    play.ok("a")
    assert pause(play)["stage"] == "draining" and pause(play)["unflushed"] == 1
    play.ok("b")
    play.expect("answer a", "answer b", "send flush")
    assert pause(play) == {"by": "operator", "stage": "flushing", "unflushed": 2, "away": False}
    play.engine.completed(play._flush, 0)
    play.expect("event HEALFS_DRAINED")
    assert play.told("HEALFS_DRAINED") == [{"unflushed": 0}]
    assert pause(play) == {"by": "operator", "stage": "held", "unflushed": 0, "away": False}
    assert play.counts["parked"] == 1
    play.engine.resume({"uid": 7, "pid": 9})
    play.expect("event RESUME", "send c")
    assert play.told("RESUME") == [{"uid": 7, "pid": 9}]
    assert play.engine.status()["pause"] is None


def test_a_guests_flush_that_came_before_is_answered_one_that_came_later_is_held():
    play = cached()
    play.write("a", 0)
    play.ok("a")
    play.flush("f")
    play.write("b", 1)
    play.ok("b")
    play.flush("g")  # behind the flush in flight
    play.take()
    play.engine.pause()
    play.flush("h")
    play.ok("f")
    play.expect("answer f", "send g")
    play.ok("g")
    play.expect("answer g")
    assert pause(play) == {"by": "operator", "stage": "held", "unflushed": 0, "away": False}
    assert play.counts["parked"] == 1 and "h" not in play.answers


def test_a_pause_while_the_backend_is_away_is_held_at_once_and_says_what_is_not_flushed():
    play = cached()
    play.write("a", 0)
    play.ok("a")
    play.outage()
    play.engine.pause()
    assert play.told("HEALFS_DRAINED") == [{"unflushed": 1}]
    assert pause(play) == {"by": "operator", "stage": "held", "unflushed": 1, "away": True}


def test_the_backend_goes_away_while_it_drains():
    play = cached()
    play.write("a", 0)
    play.ok("a")
    play.write("b", 1)
    play.engine.pause()
    play.lose()
    assert play.told("HEALFS_DRAINED") == [{"unflushed": 1}]
    play.up(volatile_cache=True)  # and is back: nothing is sent before the resume
    assert play.state == "paused" and "send b" not in play.take()[-1:]
    play.engine.resume()
    play.take()
    assert play.state == "replaying"


def test_a_flush_that_fails_ends_the_drain_and_is_not_taken_for_one():
    play = cached()
    play.write("a", 0)
    play.ok("a")
    play.engine.pause()
    play.take()
    play.engine.completed(play._flush, e.ENOSPC)
    assert play.told("HEALFS_DRAINED") == [{"unflushed": 1}]
    assert pause(play) == {"by": "operator", "stage": "held", "unflushed": 1, "away": False}
    play.engine.resume()
    assert play.state == "replaying"


def test_the_operator_takes_over_a_pause_of_the_policy():
    play = cached()
    play.engine._stop_by_policy(e.ENOSPC)
    assert pause(play)["by"] == "policy" and play.engine.no_space
    play.engine.pause({"uid": 1})
    assert pause(play)["by"] == "operator"
    play.engine.resume()
    play.engine.pause()
    assert not play.engine.no_space


def test_paused_in_an_outage_the_reason_is_why_the_backend_is_away():
    play = cached()
    play.lose()
    play.refuse()
    why = play.engine.status()["reason"]
    assert why
    play.engine.pause()
    assert play.engine.status()["reason"] == why
    play.up(volatile_cache=True)
    assert pause(play)["away"] is False
    assert play.engine.status()["reason"] == "stop"


def test_the_acceptance_of_another_disk_is_told_when_it_comes_to_pass():
    play = cached()
    play.write("a")
    play.ok("a")
    play.lose()
    play.up(mismatch="it is disk B", volatile_cache=True)
    play.engine.accept(replay=False, who={"uid": 7, "pid": 8})
    assert not play.told("HEALFS_ACCEPTED")
    play.up(mismatch="it is disk B", volatile_cache=True)
    said = {"uid": 7, "pid": 8, "log": "dropped", "unflushed": 1}
    assert play.told("HEALFS_ACCEPTED") == [said]
