"""Outages, policy, pause, mismatch and the latch, as playbooks with virtual time."""

import errno as e
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
    gaps = [after - before for before, after in zip(play.connects, play.connects[1:], strict=False)]
    assert 0.0075 <= gaps[0] <= 0.01
    for before, after in zip(gaps[:5], gaps[1:6], strict=True):
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
    gaps = [after - before for before, after in zip(tries, tries[1:], strict=False)]
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
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
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
