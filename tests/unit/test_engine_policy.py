"""Policies, live changes, time-outs, stop and cont (healfs-semantics: the policy by direction)."""

import errno as e

import pytest

from healfs.core.request import Kind
from tests.unit.playbook import BLOCK, Playbook, policy, retry

# --- policies ----------------------------------------------------------------------------------


def test_report_answers_at_once_failed_and_lost():
    play = Playbook(policy("report"))
    play.run(10)
    play.write("a", 0)
    play.error("a", e.ENOSPC)
    play.expect("send a", "answer a ENOSPC")
    play.write("b", 1)
    play.lose()
    play.expect("send b", "close", "connect", "answer b EIO")
    play.write("c", 2)
    play.expect("answer c EIO")


def test_what_fails_again_and_again_is_seen_while_the_disk_is_ready():
    play = Playbook()
    play.run(10)
    play.write("a", 0)
    assert play.engine.status()["retrying"] is None
    play.error("a", e.EDQUOT)
    seen = {"requests": 1, "seconds": 0.0, "reason": "Disk quota exceeded"}
    assert play.engine.status()["retrying"] == seen
    play.run(3)  # it is in flight again
    assert play.engine.status()["retrying"] == seen | {"seconds": 3.0}
    play.error("a", e.ENOSPC)
    seen |= {"seconds": 3.0, "reason": "No space left on device"}
    assert play.engine.status()["retrying"] == seen
    play.run(3)
    play.ok("a")
    assert play.engine.status()["retrying"] is None


def test_policy_is_by_direction():
    play = Playbook(policy(read="report", write=retry()))
    play.run(10)
    play.outage()
    play.read("r")
    play.write("w")
    play.flush("f")
    play.zero("z", 1)
    play.expect("answer r EIO")
    play.engine.set_policy(policy(read=retry(), write="report"))
    assert {"w", "f", "z"} <= set(play.answers)
    play.read("r2")
    assert "r2" not in play.answers


def test_ignore_gives_zeroes_and_success_but_never_for_a_flush():
    play = Playbook(policy("ignore"))
    play.run(10)
    play.outage()
    play.read("r")
    play.write("w")
    play.zero("z")
    play.flush("f")
    assert play.answers["r"] == (0, bytes(BLOCK))
    assert play.answers["w"] == play.answers["z"] == (0, None)
    assert play.answers["f"] == (e.EIO, None)
    totals = play.engine.status()["totals"]
    assert totals["ignored_bytes"] == 3 * BLOCK


def test_a_live_change_acts_on_what_is_parked_waiting_and_failing():
    play = Playbook()
    play.run(10)
    play.write("failing", 5)
    play.error("failing", e.ENOSPC)
    play.engine.set_policy(policy("report"))
    assert play.answers.pop("failing") == (e.ENOSPC, None)
    play.engine.set_policy(policy())
    play.outage()
    play.write("parked")
    play.write("waiting")
    play.flush("f")
    play.engine.set_policy(policy("report"))
    assert set(play.answers) == {"parked", "waiting", "f"}
    play.engine.set_policy(policy())
    play.write("next")
    assert "next" not in play.answers
    play.up()
    assert play.take()[-1] == "send next"


# --- what waits for a range that is not settled -------------------------------------------------


class Fenced(Playbook):
    """The fence decides, and fails; the backend has a volatile cache and blocks of 4096 bytes."""

    def __init__(self, given=None, **keywords):
        super().__init__(given, up=False, **keywords)
        self.engine.fence = True
        self.fencing = False
        self.flying = []
        self.on_send = self.flying.append
        self.engine.start()
        self.back()

    def fence(self):
        self.fencing = True

    def back(self):
        self.flying.clear()
        self.up(volatile_cache=True, align=BLOCK)

    def drive(self):
        while self.flying:
            request = self.flying.pop(0)
            data = bytes(request.length) if request.kind is Kind.READ else None
            self.engine.completed(request, 0, data)

    def fences(self, error="no power switch"):
        """The next run of it ends."""
        for _ in range(100):
            if self.fencing:
                break
            self.run(0.25)
        self.fencing = False
        self.engine.fenced(error)


def _held(play):
    """A replay of two writes to one block: the newer one waits for an attempt of the older."""
    play.write("a", 0, 0.125)
    play.drive()
    play.write("b", 0.5, 0.125)
    play.drive()
    play.lose()
    play.back()
    play.lose()  # the older one is in flight
    play.fences()
    play.back()
    play.run(20)
    play.drive()
    assert play.state == "replaying"
    play.read("r", 9)
    play.write("w", 9)
    play.flush("f")
    play.take()
    return play


@pytest.fixture
def held():
    return _held(Fenced(slow_after=100))


def test_a_timeout_that_has_passed_acts_on_a_replay_when_it_has_to_wait():
    play = _held(Fenced(policy(retry(timeout=10)), slow_after=100))
    assert {play.answers[name][0] for name in "rwf"} == {e.EIO}


def test_a_timeout_that_passes_in_a_replay_acts_when_that_has_to_wait():
    play = Fenced(policy(retry(timeout=10)), slow_after=100)
    play.write("a", 0, 0.125)
    play.drive()
    play.write("b", 0.5, 0.125)
    play.drive()
    play.lose()
    play.back()
    play.lose()
    play.fences()
    play.back()
    play.read("r", 9)
    play.run(20)
    assert "r" not in play.answers  # the replay goes on
    play.drive()
    assert play.state == "replaying" and play.answers["r"] == (e.EIO, None)


@pytest.mark.parametrize("given", ["report", "ignore"])
def test_a_live_change_acts_on_what_waits_for_a_replay_that_waits(held, given):
    held.engine.set_policy(policy(given))
    held.write("late", 10)
    failed = e.EIO if given == "report" else 0
    assert held.answers["r"][0] == held.answers["w"][0] == held.answers["late"][0] == failed
    assert held.answers["f"] == (e.EIO, None)
    assert held.state == "replaying"
    held.engine.set_policy(policy())
    held.write("x", 11)
    held.fences("")
    held.drive()
    assert held.state == "ready" and held.answers["x"] == (0, None)


def test_a_timeout_acts_on_what_waits_for_a_replay_that_waits(held):
    held.engine.set_policy(policy(retry(timeout=50)))
    held.run(28)
    assert not held.answers.keys() - {"a", "b"}
    held.run(3)
    assert {held.answers[name][0] for name in "rwf"} == {e.EIO}


def test_stop_acts_in_a_replay_that_waits(held):
    held.engine.set_policy(policy("stop"))
    assert held.state == "paused"
    held.fences("")
    held.engine.resume()
    held.drive()
    assert held.state == "ready" and held.answers["w"] == (0, None)


def test_a_replay_that_was_stopped_while_it_waited_begins_anew(held):
    """Nothing of the one before counts for it: no flush is sent, none drops the log."""
    sent = []
    held.on_send = lambda request: (sent.append(request), held.flying.append(request))
    held.engine.set_policy(policy("stop"))
    held.engine.resume()
    held.engine.completed(held.flying.pop(), 0)  # the older one; the newer one has to wait
    assert held.state == "paused" and not held.flying
    held.fences("")
    sent.clear()
    held.engine.set_policy(policy())
    held.drive()
    own = [(r.kind, r.offset) for r in sent if r.internal]
    assert own[:3] == [(Kind.WRITE, 0), (Kind.WRITE, BLOCK // 2), (Kind.FLUSH, 0)]
    assert held.state == "ready" and held.answers["f"] == (0, None)


def test_a_replay_that_goes_on_reports_nothing():
    play = Fenced(policy("report"))
    play.write("a", 0)
    play.drive()
    play.lose()
    play.back()
    play.write("w", 1)
    assert play.state == "replaying" and "w" not in play.answers
    play.drive()
    assert play.answers["w"] == (0, None)


@pytest.fixture
def blocked():
    """The disk is ready; a write waits for an attempt of an older one."""

    def begin(given):
        play = Fenced()
        play.write("a", 0)
        play.lose()
        play.back()
        play.drive()
        assert play.state == "ready"
        play.engine.set_policy(given)
        play.write("other", 1)
        play.drive()
        play.run(100)
        play.write("b", 0)
        play.drive()
        assert play.answers.keys() == {"a", "other"}
        return play

    return begin


def test_a_write_that_waits_for_its_range_does_so_under_retry_timeout(blocked):
    play = blocked(policy(write=retry(timeout=30)))
    play.run(29.9)
    assert "b" not in play.answers
    play.run(0.2)
    assert play.answers["b"] == (e.EIO, None)
    play.fences("")
    play.drive()
    play.read("r", 0)
    play.drive()
    assert "r" in play.answers and play.counts["parked"] == 0


def test_a_failing_fence_is_an_error_like_any_other(blocked):
    play = blocked(policy("report"))
    play.run(100)
    assert "b" not in play.answers  # the fence goes on
    play.fences()
    assert play.answers["b"] == (e.EIO, None)


def test_what_is_behind_a_write_that_is_given_up_waits_no_longer(blocked):
    """A read may go, a write is the next one that waits for the range."""
    play = blocked(policy("report"))
    play.write("c", 0)
    play.read("r", 0)
    play.fences()
    play.run(0.1)
    play.drive()
    assert play.answers["c"] == (e.EIO, None) and play.answers["r"] == (0, bytes(BLOCK))
    play.write("d", 0)  # before the fence is tried again
    play.run(0.1)
    assert play.answers["d"] == (e.EIO, None)
    assert play.counts["parked"] == 0 and not play.engine.writes_outstanding
    play.fences("")
    play.write("e", 0)
    play.drive()
    assert play.answers["e"] == (0, None)


def test_a_write_that_is_cancelled_waits_for_its_range_no_longer(blocked):
    play = blocked(policy())
    play.read("r", 0)
    assert "r" not in play.answers
    play.cancel("b")
    play.drive()
    assert play.answers["r"] == (0, bytes(BLOCK))
    play.fences("")
    assert play.answers["b"] == (e.EINTR, None) and not play.flying


def test_without_a_timeout_a_write_waits_for_the_fence_for_ever(blocked):
    play = blocked(policy())
    for _ in range(100):
        play.fences()
        play.run(10)
    assert "b" not in play.answers
    play.fences("")
    play.drive()
    assert play.answers["b"] == (0, None)


def test_a_shorter_retry_interval_brings_the_next_try_forward():
    play = Playbook(policy(retry(interval=3600)))
    play.run(7200)
    play.lose()
    play.run(7200, refuse=True)
    play.connects.clear()
    play.engine.set_policy(policy(retry(interval=0.1)))
    play.run(0.2)
    assert play.connects


def test_retry_timeout_counts_from_the_start_of_the_outage():
    play = Playbook(policy(retry(timeout=10)))
    play.run(10)
    play.lose()
    play.run(6, refuse=True)
    play.write("late")
    play.run(3.9, refuse=True)
    assert not play.answers
    play.run(0.2, refuse=True)
    assert play.answers == {"late": (e.EIO, None)}


@pytest.mark.parametrize("first", [False, True])
def test_retry_timeout_does_not_wait_for_a_try_that_hangs(first):
    play = Playbook(policy(retry(timeout=30)), slow_after=0, up=not first)
    if first:  # mount --no-wait
        play.engine.size = 1 << 20
        play.engine.start()
    play.write("a")
    if not first:
        play.run(100)
        play.lose()
    play.run(29.9)
    assert not play.answers and "connect" in play.take()
    play.run(0.2)
    assert play.answers == {"a": (e.EIO, None)}


def test_a_request_after_the_timeout_gets_then_at_once():
    play = Playbook(policy(retry(timeout=10, then="ignore")))
    play.run(10)
    play.lose()
    play.run(11, refuse=True)
    play.read("r")
    assert play.answers == {"r": (0, bytes(BLOCK))}


def test_retry_timeout_runs_on_through_a_relapse():
    play = Playbook(policy(retry(timeout=10)))
    play.run(10)
    play.write("a")
    play.lose()
    play.run(6, refuse=True)
    play.up()
    play.lose()
    play.run(4.1, refuse=True)
    assert play.answers == {"a": (e.EIO, None)}


def test_retry_timeout_starts_anew_with_the_next_outage():
    play = Playbook(policy(retry(timeout=10)))
    play.run(10)
    play.write("a")
    play.lose()
    play.run(8, refuse=True)
    play.up()
    play.ok("a")
    play.run(5)
    play.write("b")
    play.lose()
    play.run(8, refuse=True)
    assert "b" not in play.answers
    play.run(2.1, refuse=True)
    assert play.answers["b"] == (e.EIO, None)


def test_a_failed_request_times_out_from_its_own_first_error():
    play = Playbook(policy(retry(timeout=3)))
    play.on_send = None
    play.write("a")
    play.run(1)
    play.error("a", e.ENODATA)
    for _ in range(40):
        if "a" in play.answers:
            break
        play.run(0.1)
        if play.counts["in_flight"]:
            play.error("a", e.ENODATA)
    assert play.answers == {"a": (e.ENODATA, None)}
    assert play.now == pytest.approx(1001 + 3, abs=0.15)


# --- stop, cont, enospc ------------------------------------------------------------------------


def test_stop_pauses_the_disk_until_cont():
    play = Playbook(policy("stop"))
    play.write("a", 0)
    play.write("b", 1)
    play.error("a", e.EIO)
    assert play.state == "paused"
    play.write("c", 2)
    play.ok("b")
    play.expect("send a", "send b", "answer b")
    assert [name for name, _ in play.events] == ["BLOCK_IO_ERROR", "STOP", "HEALFS_DRAINED"]
    play.engine.resume()
    play.expect("send a", "send c")
    assert play.told("RESUME")


def test_enospc_stops_for_want_of_space_and_reports_the_rest():
    play = Playbook(policy(write="enospc"))
    play.write("a", 0)
    play.error("a", e.EIO)
    play.expect("send a", "answer a EIO")
    play.write("b", 0)
    play.error("b", e.ENOSPC)
    assert play.state == "paused" and play.engine.no_space
    assert play.told("BLOCK_IO_ERROR")[-1]["nospace"] is True
    play.engine.resume()
    play.ok("b")
    play.expect("send b", "send b", "answer b")


def test_stop_in_an_outage_holds_everything_through_the_reconnect():
    play = Playbook(policy(retry(timeout=2, then="stop")))
    play.run(10)
    play.write("a")
    play.lose()
    play.run(3, refuse=True)
    assert play.state == "paused"
    play.take()
    play.up()
    play.read("r", 3)
    play.expect()
    play.engine.resume()
    assert play.state == "ready"
    play.expect("send a", "send r")


def test_a_policy_change_lets_what_stop_held_go():
    play = Playbook(policy("stop"))
    play.write("a")
    play.error("a", e.EIO)
    play.engine.set_policy(policy())
    assert play.state == "ready"
    play.expect("send a", "send a")


def test_a_policy_change_does_not_undo_the_operators_stop():
    play = Playbook()
    play.engine.pause()
    play.engine.set_policy(policy("report"))
    assert play.state == "paused"


def test_pause_answers_at_once_and_reports_the_drain():
    play = Playbook()
    play.write("a")
    play.engine.pause()
    play.expect("send a", "event STOP")
    play.write("b", 1)
    play.ok("a")
    play.expect("answer a", "event HEALFS_DRAINED")
    play.engine.resume()
    play.expect("event RESUME", "send b")


def test_pause_with_nothing_in_flight_is_drained_at_once():
    play = Playbook()
    play.engine.pause()
    play.expect("event STOP", "event HEALFS_DRAINED")


def test_an_error_while_paused_is_held_too():
    play = Playbook(policy("report"))
    play.write("a")
    play.engine.pause()
    play.error("a", e.EIO)
    play.expect("send a")
    play.engine.resume()
    play.expect("send a")


def test_pause_in_an_outage_and_cont_while_it_lasts():
    play = Playbook()
    play.run(10)
    play.write("a")
    play.outage()
    play.engine.pause()
    play.refuse()
    play.engine.resume()
    assert play.state == "stalled"
    play.take()
    play.up()
    play.expect("send a")
