"""Outages, silence, mismatch and the latch, as playbooks with virtual time."""

import errno as e
import itertools
import logging

import pytest

from healfs.core.engine import Engine
from healfs.core.policy import Policy
from tests.unit.playbook import BLOCK, SIZE, Playbook, policy, retry

# --- the first connection, losses, the prober --------------------------------------------------


def test_requests_before_the_first_connection_wait_for_it():
    play = Playbook(up=False)
    play.engine.size = SIZE  # mount --no-wait --size
    play.engine.start()
    play.write("a")
    play.expect("connect")
    assert play.state == "connecting"
    play.up()
    play.expect("send a")
    assert play.state == "ready"


def test_a_request_outside_the_disk_is_refused_at_once():
    play = Playbook()
    play.read("a", SIZE // BLOCK)
    play.write("b", SIZE // BLOCK - 1, 2)
    play.outage()
    play.read("c", SIZE // BLOCK)
    assert {errno for errno, _ in play.answers.values()} == {e.EINVAL}
    assert len(play.answers) == 3


def test_a_loss_closes_and_tries_at_once():
    play = Playbook()
    play.run(10)
    play.write("a")
    play.take()
    play.lose()
    play.expect("close", "connect")
    assert play.state == "stalled"
    assert play.counts == {"in_flight": 0, "parked": 1, "unsettled": 0} or play.counts["parked"]


def test_one_prober_with_a_pause_that_doubles_up_to_retry_interval():
    play = Playbook(policy(retry(interval=1.0)))
    play.run(10)
    play.connects.clear()
    play.lose()
    play.run(20, refuse=True)
    gaps = [after - before for before, after in itertools.pairwise(play.connects)]
    assert 0.0075 <= gaps[0] <= 0.01
    for before, after in itertools.pairwise(gaps[:6]):
        assert 1.5 - 1e-9 <= after / before <= 8 / 3 + 1e-9  # doubled, jitter 0.75 to 1
    assert all(0.75 - 1e-9 <= gap <= 1.0 + 1e-9 for gap in gaps[7:])


def test_while_a_try_is_under_way_there_is_no_second():
    play = Playbook()
    play.run(10)
    play.lose()
    play.write("a")
    play.run(60)
    play.engine.try_now()
    assert play.take().count("connect") == 1


def test_a_relapse_waits_its_turn_in_the_backoff():
    play = Playbook()
    play.run(10)
    play.write("a")
    for _ in range(20):  # a server that dies as soon as it is back
        play.lose()
        while "connect" not in play.log:
            play.run(0.001)
        play.take()
        play.up()
    tries = play.connects[1:]
    gaps = [after - before for before, after in itertools.pairwise(tries)]
    assert all(gap >= 0.0075 - 0.001 for gap in gaps)
    assert all(gap >= 0.75 - 0.001 for gap in gaps[8:]), gaps


def test_the_backoff_starts_over_after_a_retry_interval_of_health():
    play = Playbook()
    play.run(10)
    play.lose()
    play.run(30, refuse=True)
    play.up()
    play.run(1.5)
    play.take()
    play.lose()
    play.expect("close", "connect")


def test_a_hint_tries_again_soon_and_not_before_the_next_pause():
    play = Playbook()
    play.run(10)
    play.lose()
    play.run(30, refuse=True)
    play.take()
    play.engine.try_now()
    play.expect("connect")
    play.refuse()
    play.run(0.002)
    play.expect("connect")


def test_losses_of_a_connection_that_is_gone_already_are_not_news():
    play = Playbook()
    play.run(10)
    play.lose()
    play.take()
    play.lose()
    play.expect()


def test_an_errno_of_the_class_lost_parks_all_in_flight():
    play = Playbook()
    play.run(10)
    play.write("a", 0)
    play.write("b", 1)
    play.take()
    play.error("a", e.ESHUTDOWN)
    play.expect("close", "connect")
    play.up()
    play.expect("send a", "send b")


def test_an_errno_of_the_class_lost_for_a_request_given_up_is_a_loss_too():
    play = Playbook()
    play.run(10)
    play.write("a")
    play.cancel("a")
    play.take()
    play.error("a", e.ESHUTDOWN)
    play.expect("close", "connect")


def test_events_come_once_an_outage_with_relapses_in_it():
    play = Playbook()
    play.run(10)
    play.write("a")
    for _ in range(3):
        play.lose()
        play.run(5, refuse=True)
        play.up()
    play.ok("a")
    [error] = play.told("BLOCK_IO_ERROR")
    assert error["operation"] == "write" and error["action"] == "retry" and not error["nospace"]
    [recovered] = play.told("HEALFS_RECOVERED")
    assert recovered["seconds"] == pytest.approx(15, abs=0.1)
    assert play.engine.status()["outages"]["count"] == 1


def test_the_outage_ends_with_an_answer_not_with_the_connection():
    play = Playbook()
    play.run(10)
    play.write("a")
    play.outage()
    play.run(2)
    play.up()
    play.run(1)
    assert not play.told("HEALFS_RECOVERED")
    play.ok("a")
    assert play.told("HEALFS_RECOVERED")[0]["seconds"] == pytest.approx(3)


def test_the_outage_ends_with_the_connection_when_nothing_is_parked():
    play = Playbook()
    play.run(10)
    play.outage()
    play.run(2)
    play.up()
    assert play.told("HEALFS_RECOVERED")[0]["seconds"] == pytest.approx(2)


# --- failed and refused ------------------------------------------------------------------------


@pytest.mark.parametrize("errno", [e.EIO, e.ENODATA, e.EREMOTEIO, e.ENOSPC, e.EACCES])
def test_a_failed_request_is_tried_again_and_others_flow_on(errno):
    play = Playbook()
    play.write("a", 0)
    play.error("a", errno)
    play.expect("send a")
    assert play.state == "ready"
    play.write("b", 1)
    play.ok("b")
    play.expect("send b", "answer b")
    play.run(1)
    play.expect("send a")
    play.ok("a")
    play.expect("answer a")


def test_a_failed_request_backs_off_up_to_retry_interval():
    play = Playbook()
    play.write("a", 0)
    for _ in range(12):
        play.error("a", e.EIO)
        while play.counts["in_flight"] == 0:
            play.run(0.001)
    times = [when for when, _ in play.sends]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert gaps[0] <= 0.02
    assert all(0.74 <= gap <= 1.002 for gap in gaps[-3:])


@pytest.mark.parametrize("errno", [e.EINVAL, e.EOPNOTSUPP])
def test_a_refused_request_goes_back_at_once(errno):
    play = Playbook()
    play.write("a")
    play.error("a", errno)
    play.expect("send a", f"answer a {e.errorcode[errno]}")
    play.run(5)
    play.expect()


def test_the_guest_sees_no_errno_that_a_disk_does_not_have():
    play = Playbook(policy("report"))
    play.write("a")
    play.error("a", e.EKEYEXPIRED)
    play.write("b")
    play.lose(e.ECONNREFUSED)
    assert {errno for errno, _ in play.answers.values()} == {e.EIO}


def test_failed_requests_go_with_the_outage_and_come_back_oldest_first():
    play = Playbook()
    play.run(10)
    for number, name in enumerate("abc"):
        play.write(name, number)
    play.error("a", e.EIO)
    play.outage()
    play.up()
    play.expect("send a", "send b", "send c")


# --- another disk ------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [{"size": SIZE // 2}, {"mismatch": "another export"}])
def test_another_disk_is_not_written_to(other):
    play = Playbook()
    play.run(10)
    play.write("a")
    play.outage()
    play.up(**other)
    assert play.state == "mismatch"
    play.take()
    play.run(5)
    said = play.take()
    assert "connect" in said and "send a" not in said
    play.up()
    play.expect("send a")
    assert play.state == "ready"
    assert len(play.told("HEALFS_MISMATCH")) == 1


def test_a_disk_that_grew_is_the_same_disk():
    play = Playbook()
    play.run(10)
    play.write("a")
    play.outage()
    play.up(size=2 * SIZE)
    play.expect("send a")
    assert play.engine.size == SIZE


def test_retry_timeout_holds_in_mismatch_too():
    play = Playbook(policy(retry(timeout=4)))
    play.run(10)
    play.write("a")
    play.outage()
    play.up(mismatch="another")
    for _ in range(50):
        play.run(0.1)
        if "connect" in play.take():
            play.up(mismatch="another")
    assert play.answers == {"a": (e.EIO, None)}


def test_the_wrong_disk_goes_away():
    play = Playbook()
    play.run(10)
    play.outage()
    play.up(mismatch="another")
    play.run(2)
    play.refuse()
    assert play.state == "stalled"


def test_a_mismatch_found_while_paused_is_told_at_cont():
    play = Playbook()
    play.run(10)
    play.outage()
    play.engine.pause()
    play.up(mismatch="another")
    assert play.state == "paused"
    play.engine.resume()
    assert play.state == "mismatch"
    assert play.told("HEALFS_MISMATCH")


# --- bugs of ours latch ------------------------------------------------------------------------


def test_an_exception_in_an_effect_latches(caplog):
    play = Playbook()

    def broken(request):
        raise OSError("a bug")

    play.on_send = broken
    play.write("a", 0)
    assert play.state == "faulted"
    assert "internal error" in caplog.text
    play.on_send = None
    play.take()
    play.write("b", 1)
    play.read("c", 2)
    play.run(60)
    play.expect()
    assert not play.answers
    play.engine.fail_all()
    assert set(play.answers) == {"a", "b", "c"}
    play.engine.finish()
    assert play.state == "closed"


def test_what_was_in_flight_at_a_fault_is_not_answered(caplog):
    play = Playbook()
    play.write("a")
    play.flush("f")
    play.read("r", 1)
    play.engine.fault("a test")
    play.ok("a", "r", "f")
    assert not play.answers
    play.engine.fail_all()
    assert set(play.answers) == {"a", "f", "r"}


def test_a_second_completion_latches(caplog):
    play = Playbook()
    play.write("a")
    play.ok("a")
    play.ok("a")
    assert play.state == "faulted"
    assert "second completion" in caplog.text


def test_the_latch_holds_through_a_reconnect(caplog):
    play = Playbook()
    play.run(10)
    play.write("a")
    play.engine.fault("a test")
    play.lose()
    play.up()
    play.write("b", 1)
    play.ok("a") if "send a" in play.take()[1:] else None
    assert play.state == "faulted"
    assert not play.answers


def test_a_connection_that_comes_after_the_end_is_no_internal_error(caplog):
    play = Playbook()
    play.outage()
    play.engine.finish()
    play.up()
    play.refuse()
    play.run(5)
    assert play.state == "closed"
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


# --- flushes, status ---------------------------------------------------------------------------


def test_a_flush_to_a_backend_that_cannot_flush_is_answered():
    play = Playbook(up=False)
    play.engine.start()
    play.up(can_flush=False)
    play.take()
    play.flush("f")
    play.expect("answer f")


def test_a_flush_waits_for_nothing():
    play = Playbook()
    play.write("a")
    play.flush("f")
    play.ok("f")
    play.expect("send a", "send f", "answer f")


def test_status_counts():
    play = Playbook()
    play.run(10)
    play.write("flying", 0)
    play.write("waiting", 0)
    play.write("failing", 1)
    play.error("failing", e.EIO)
    assert play.counts == {"in_flight": 1, "parked": 2, "unsettled": 0}
    play.outage()
    play.run(3)
    status = play.engine.status()
    assert play.counts["parked"] == 3
    assert status["state"] == "stalled"
    assert status["outages"]["current_seconds"] == pytest.approx(3)
    assert Policy.from_dict(status["policy"]) == policy()


def test_the_engine_needs_no_generator_and_no_limits():
    play = Playbook()
    assert Engine(play, policy(), lambda: 0.0).status()["state"] == "connecting"
