"""No answer at all is an outage too: slow-after, hangs, and what is given up in one."""

import errno as e

import pytest

from healfs.core.engine import Limits
from healfs.core.request import Kind
from tests.unit.playbook import BLOCK, Playbook, policy, retry
from tests.unit.test_engine_recovery import Disk

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


# --- what waits for one that hangs and was given up -----------------------------------------------


class _Flying(Disk):
    """One write hangs, the others do well."""

    def __init__(self, *arguments, fua=False, **keywords):
        super().__init__(*arguments, slow_after=5, **keywords)
        self.hung = self.request("hung", Kind.WRITE, 5 * BLOCK, BLOCK, fua=fua)
        self.flying.clear()

    def goes_on(self, seconds):
        """Others are written and answered."""
        for _ in range(seconds):
            self.run(1)
            name = f"other {len(self.answers)}"
            self.write(name, 9)
            self.drive()


def test_what_waits_for_it_does_so_under_retry_timeout():
    disk = _Flying(policy(retry(timeout=10)))
    disk.goes_on(8)
    disk.write("b", 5)
    disk.goes_on(3)
    assert disk.answers["hung"] == (e.EIO, None)
    disk.read("r", 5)
    disk.goes_on(6)
    assert not disk.answers.keys() & {"b", "r"}
    disk.goes_on(2)
    assert disk.answers["b"] == (e.EIO, None) and "r" not in disk.answers
    disk.goes_on(3)
    assert disk.answers["r"] == (e.EIO, None)
    disk.run(100)
    disk.write("late", 5)
    disk.run(20)  # and where nothing else goes on
    assert disk.answers["late"] == (e.EIO, None)
    disk.engine.completed(disk.hung, 0)
    assert disk.state == "ready" and not disk.engine.writes_outstanding


@pytest.mark.parametrize("given", [policy(), policy(retry(timeout=10))])
def test_a_flush_that_waits_for_it_is_not_forgotten(given):
    """It has succeeded, and waits for a FUA write that was given up."""
    disk = _Flying(given, fua=True)
    disk.goes_on(11)
    disk.engine.cancel(disk.hung)
    disk.flush("f")
    disk.drive()
    disk.run(9.9)
    assert "f" not in disk.answers and disk.told("HEALFS_OUTAGE")
    disk.run(0.2)
    assert disk.answers.get("f") == (None if given == policy() else (e.EIO, None))
    disk.flying.clear()
    disk.engine.completed(disk.hung, 0)
    disk.flush("g")
    disk.drive()
    assert disk.succeeded("g")


def test_a_flush_behind_one_that_hangs_is_under_retry_timeout():
    disk = _Flying(policy(retry(timeout=10)))
    disk.flush("f")
    (hung,) = disk.flying.values()
    disk.flying.clear()
    disk.goes_on(3)
    disk.flush("g")
    disk.goes_on(6)
    assert not disk.answers.keys() & {"f", "g"}
    disk.goes_on(2)
    assert disk.answers["f"] == (e.EIO, None) and "g" not in disk.answers
    disk.goes_on(3)
    assert disk.answers["g"] == (e.EIO, None)
    disk.flush("late")
    disk.engine.completed(hung, 0)
    disk.drive()
    assert disk.succeeded("late")


def test_a_replay_that_waits_for_it_is_an_outage():
    disk = _Flying(policy(retry(timeout=30)))
    disk.engine.cancel(disk.hung)
    disk.written("a", 0)
    disk.flush("f")
    disk.drive(lambda request: e.EIO)
    disk.read("r", 9)
    disk.run(6)
    assert disk.state == "stalled" and not disk.answers.keys() & {"f", "r"}
    disk.run(30)
    assert disk.answers["f"] == disk.answers["r"] == (e.EIO, None)
    disk.engine.completed(disk.hung, e.EIO)
    disk.drive()
    assert (Kind.WRITE, 0, 1) in disk.replayed() and disk.state == "ready"


@pytest.mark.parametrize("waits", ["write", "flush"])
def test_the_silence_begins_when_somebody_waits_for_it(waits):
    """Not with the last answer of a disk that nobody used since."""
    disk = _Flying(policy(retry(timeout=10)), fua=True)
    disk.engine.cancel(disk.hung)
    disk.run(100)
    if waits == "write":
        disk.write("b", 5)
    else:
        disk.flush("b")
        disk.drive()
    disk.run(4.9)
    assert disk.state == "ready"
    disk.run(4.9)
    assert "b" not in disk.answers and disk.told("HEALFS_OUTAGE")
    disk.run(0.3)
    assert disk.answers["b"] == (e.EIO, None)


def test_a_disk_whose_requests_in_flight_are_all_given_up_is_stalled():
    disk = _Flying(policy(retry(timeout=30)), limits=Limits(in_flight=1))
    disk.engine.cancel(disk.hung)
    disk.read("r", 9)
    disk.run(6)
    assert disk.state == "stalled"
    disk.run(30)
    assert disk.answers["r"] == (e.EIO, None)
