"""No answer at all is an outage too: slow-after, hangs, and what is given up in one."""

import errno as e

import pytest

from tests.unit.playbook import Playbook, policy, retry

# --- no answer at all --------------------------------------------------------------------------


def test_no_answer_for_slow_after_is_reported_as_stalled():
    play = Playbook(slow_after=5)
    play.write("a")
    play.run(4.9)
    assert play.state == "ready"
    play.run(0.2)
    assert play.state == "stalled"
    play.write("b", 1)
    play.ok("a")
    assert play.state == "ready"
    assert play.told("HEALFS_RECOVERED")[0]["seconds"] == pytest.approx(5.1)
    assert play.take() == ["send a", "answer a", "send b"]


def test_answers_to_others_are_no_silence():
    play = Playbook(slow_after=5)
    play.write("slow")
    for number in range(10):
        play.run(1)
        play.write(f"w{number}", 1)
        play.ok(f"w{number}")
    assert play.state == "ready"


def test_retry_timeout_of_a_hang_counts_from_the_sending_of_the_oldest():
    play = Playbook(policy(retry(timeout=20)), slow_after=5)
    play.run(3)
    play.write("a", 0)
    play.run(10)
    play.write("b", 1)
    play.run(9.9)
    assert not play.answers
    play.run(0.2)
    assert set(play.answers) == {"a", "b"}
    play.write("after", 2)
    assert play.answers["after"] == (e.EIO, None)


def test_a_hang_given_up_keeps_its_range():
    play = Playbook(policy(retry(timeout=6)), slow_after=5)
    play.write("a")
    play.run(7)
    assert play.answers == {"a": (e.EIO, None)}
    assert play.counts["unsettled"] == 1
    play.engine.set_policy(policy())
    play.take()
    play.write("b")
    play.run(60)
    assert "send b" not in play.take()
    play.ok("a")
    play.expect("send b")


def test_one_request_that_hangs_is_probed_by_others():
    play = Playbook(slow_after=5)
    play.write("hung", 0)
    play.run(6)
    assert play.state == "stalled"
    play.write("b", 1)
    play.run(2)
    play.take()
    play.ok("b")
    assert play.state == "ready"
    play.write("c", 2)
    play.expect("answer b", "send c")


def test_slow_after_zero_never_calls_it_a_stall():
    play = Playbook(slow_after=0)
    play.write("a")
    play.run(3600)
    assert play.state == "ready"


def test_a_hang_right_after_a_reconnect_is_reported_as_stalled():
    play = Playbook(slow_after=5)
    play.run(10)
    play.write("a")
    play.outage()
    play.up()
    play.run(6)
    assert play.state == "stalled"


def test_retry_timeout_goes_on_when_the_reconnected_backend_hangs():
    play = Playbook(policy(retry(timeout=10)), slow_after=5)
    play.run(10)
    play.write("a")
    play.outage()
    play.run(2)
    play.up()
    play.run(9)
    assert "a" in play.answers
    play.write("after", 1)
    assert "after" in play.answers


def test_a_hang_is_noticed_though_a_far_alarm_was_set_in_the_outage():
    play = Playbook(policy(retry(timeout=3600)), slow_after=5)
    play.run(10)
    play.write("a")
    play.lose()
    play.run(5, refuse=True)
    play.take()
    while "connect" not in play.log:
        play.run(0.01)
    play.up()
    play.ok("a")
    play.write("b")
    play.run(6)
    assert play.state == "stalled"


def test_cont_during_a_hang_does_not_hide_it():
    play = Playbook(slow_after=5)
    play.write("a")
    play.run(6)
    assert play.state == "stalled"
    play.engine.pause()
    play.engine.resume()
    play.run(6)
    assert play.state == "stalled"
