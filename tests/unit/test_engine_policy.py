"""Policies, live changes, time-outs, stop and cont (healfs-semantics: the policy by direction)."""

import errno as e

import pytest

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
