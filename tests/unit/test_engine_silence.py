"""No answer at all is an outage too: slow-after, hangs, and what is given up in one."""

import errno as e

import pytest

from healfs.core.request import Kind
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


# --- what nobody waits for ----------------------------------------------------------------------


@pytest.mark.parametrize("action", ["report", "ignore"])
def test_a_silence_ends_though_the_policy_answers_all_at_once(action):
    """A server has lost one request and answers all others: a READ of our own finds that out."""
    play = Playbook(policy(action), slow_after=5)
    play.write("lost")
    play.run(6)
    assert play.state == "stalled" and "lost" in play.answers
    play.write("a", 1)
    assert "a" in play.answers  # and was not sent
    asked = []
    play.on_send = asked.append
    play.run(5)
    assert asked and {(r.kind, r.internal) for r in asked} == {(Kind.READ, True)}
    for request in asked:
        play.engine.completed(request, e.EIO)  # an answer is an answer
    assert play.state == "ready" and play.told("HEALFS_RECOVERED")
    play.take()
    play.write("b", 2)
    play.expect("send b")


def test_what_was_given_up_makes_no_outage_of_a_quiet_disk():
    play = Playbook(slow_after=5)
    play.write("hung")
    play.run(3)
    play.cancel("hung")
    play.run(100)
    assert play.state == "ready" and not play.told("HEALFS_OUTAGE")
    play.read("a", 1)
    play.run(4)
    play.ok("a")
    play.read("b", 1)
    play.run(6)  # but this one is waited for
    assert play.state == "stalled"


def test_a_silence_lasts_since_the_last_answer():
    """However old what hangs is: the policy's clock is the outage's."""
    play = Playbook(policy(retry(timeout=10)), slow_after=5)
    play.write("hung")
    for number in range(8):
        play.run(1)
        play.read(f"r{number}", 1)
        play.ok(f"r{number}")
    play.run(1)
    play.read("last", 2)
    play.run(6)
    assert play.state == "stalled" and play.answers.get("last") is None
    play.read("new", 3)
    assert "new" not in play.answers  # the outage is younger than the timeout


def test_an_answer_that_comes_in_pieces_is_no_silence():
    """A megabyte over a slow link takes longer than slow-after."""
    play = Playbook(slow_after=5)
    play.read("long", 0)
    for _ in range(10):
        play.run(4)
        play.heard_at = play.now
    assert play.state == "ready"
    play.run(4.9)
    assert play.state == "ready" and not play.told("HEALFS_OUTAGE")
    play.run(0.2)
    assert play.state == "stalled"
    assert play.engine.status()["outages"]["current_seconds"] == pytest.approx(5.1)
