"""The order rules (DESIGN.md, "The engine"), cancelling, and limits."""

import errno as e
import random

import pytest

from healfs.core.engine import Limits
from tests.unit.playbook import Playbook, policy, retry


def test_disjoint_requests_do_not_wait_for_each_other():
    play = Playbook()
    play.write("a", 0)
    play.write("b", 1)
    play.read("c", 2)
    play.flush("f")
    play.expect("send a", "send b", "send c", "send f")
    play.ok("f", "c", "b", "a")
    play.expect("answer f", "answer c", "answer b", "answer a")


@pytest.mark.parametrize("kind", ["write", "read", "zero"])
def test_what_overlaps_an_older_write_waits_until_its_reply_is_out(kind):
    play = Playbook()
    play.write("a", 0, 2)
    getattr(play, kind)("b", 1, 2)
    play.expect("send a")
    play.ok("a")
    play.expect("answer a", "send b")


def test_a_read_holds_back_nothing():
    play = Playbook()
    play.read("a", 0)
    play.write("b", 0)
    play.expect("send a", "send b")


def test_one_byte_in_common_is_an_overlap_and_touching_is_none():
    play = Playbook()
    play.write("a", 0, 1)
    play.write("touching", 1, 1)
    play.write("common", 2 - 1 / 4096, 1)
    play.expect("send a", "send touching")


def test_unaligned_requests_wait_for_what_is_in_the_same_minimum_block():
    play = Playbook(up=False)
    play.engine.start()
    play.up(align=4096)
    play.take()
    play.write("a", 0, 0.25)
    play.write("b", 0.5, 0.25)
    play.write("c", 1, 0.25)
    play.expect("send a", "send c")
    play.ok("a")
    play.expect("answer a", "send b")


def test_a_chain_goes_one_by_one():
    play = Playbook()
    for name in "abcd":
        play.write(name)
    for name, following in zip("abc", "bcd", strict=True):
        play.take()
        play.ok(name)
        play.expect(f"answer {name}", f"send {following}")


def test_a_write_that_waits_for_two_goes_when_both_are_done():
    play = Playbook()
    play.write("a", 0)
    play.write("b", 1)
    play.write("c", 0, 2)
    play.take()
    play.ok("b")
    play.expect("answer b")
    play.ok("a")
    play.expect("answer a", "send c")


def test_readers_behind_one_write_go_together():
    play = Playbook()
    play.write("a")
    play.read("b")
    play.read("c")
    play.take()
    play.ok("a")
    play.expect("answer a", "send b", "send c")


def test_order_is_kept_through_an_outage_oldest_first():
    play = Playbook()
    play.write("a", 0)
    play.write("b", 1)
    play.write("c", 0)  # behind a
    play.outage()
    play.write("d", 2)
    play.read("e", 1)  # behind b
    play.flush("f")
    play.up()
    play.expect("send a", "send b", "send d", "send f")
    play.ok("b")
    play.expect("answer b", "send e")
    play.ok("a")
    play.expect("answer a", "send c")


def test_what_was_in_flight_in_any_order_is_sent_again_oldest_first():
    play = Playbook()
    names = [f"w{number}" for number in range(50)]
    for number, name in enumerate(names):
        play.write(name, number)
    done = random.Random(3).sample(names, 20)
    play.ok(*done)
    play.outage()
    play.up()
    play.expect(*[f"send {name}" for name in names if name not in done])


def test_the_write_that_repairs_a_bad_sector_passes_the_parked_read():
    play = Playbook()
    play.read("bad")
    play.error("bad", e.ENODATA)
    play.take()
    play.write("repair")
    play.expect("send repair")
    play.ok("repair")
    play.run(2)
    play.expect("answer repair", "send bad")


def test_a_failed_write_holds_back_what_overlaps_it_and_nothing_else():
    play = Playbook()
    play.write("a", 0)
    play.error("a", e.ENOSPC)
    play.take()
    play.write("same", 0)
    play.write("other", 1)
    play.expect("send other")
    play.run(0.02)
    play.ok("a")
    play.expect("send a", "answer a", "send same")


def test_parked_requests_overlap_too():
    play = Playbook()
    play.outage()
    play.write("a", 0, 2)
    play.write("b", 1, 2)
    play.read("c", 2)
    play.up()
    play.expect("send a")
    play.ok("a")
    play.expect("answer a", "send b")
    play.ok("b")
    play.expect("answer b", "send c")


# --- cancelling --------------------------------------------------------------------------------


def test_cancel_while_parked():
    play = Playbook()
    play.outage()
    play.write("a")
    play.write("behind")
    play.cancel("a")
    play.expect("answer a EINTR")
    assert "a" in play.released
    play.up()
    play.expect("send behind")


def test_cancel_while_waiting_leaves_the_order_of_the_others():
    play = Playbook()
    play.write("a")
    play.write("middle")
    play.write("c")
    play.cancel("middle")
    play.expect("send a", "answer middle EINTR")
    play.ok("a")
    play.expect("answer a", "send c")
    play.ok("c")
    play.write("d")
    play.expect("answer c", "send d")


def test_cancel_in_flight_holds_back_newer_writes_until_the_backend_let_go():
    play = Playbook()
    play.write("a")
    play.write("b")
    play.cancel("a")
    play.expect("send a", "answer a EINTR")
    assert "a" not in play.released  # its payload may still be read
    assert play.counts["unsettled"] == 1
    play.ok("a")
    play.expect("send b")
    assert "a" in play.released


def test_cancel_in_flight_then_an_error_is_nobodys_business():
    play = Playbook()
    play.write("a")
    play.cancel("a")
    play.error("a", e.EIO)
    play.expect("send a", "answer a EINTR")
    play.run(5)
    play.expect()


def test_cancel_while_failing():
    play = Playbook()
    play.read("a")
    play.error("a", e.EIO)
    play.cancel("a")
    play.run(5)
    play.expect("send a", "answer a EINTR")


def test_cancel_twice_answers_once():
    play = Playbook()
    play.outage()
    play.write("a")
    play.cancel("a")
    play.cancel("a")
    play.expect("answer a EINTR")


def test_fail_all_answers_everything_and_says_what_was_given_up():
    play = Playbook()
    play.write("flying", 0)
    play.write("waiting", 0)
    play.read("failing", 3)
    play.error("failing", e.EIO)
    play.outage()
    play.write("parked", 1)
    play.flush("f")
    given_up = play.engine.fail_all(e.EIO)
    assert given_up == {
        "write": {"requests": 3, "bytes": 3 * 4096},
        "read": {"requests": 1, "bytes": 4096},
        "flush": {"requests": 1, "bytes": 0},
    }
    assert {errno for errno, _ in play.answers.values()} == {e.EIO}
    assert len(play.answers) == 5
    play.up()
    assert not [line for line in play.take() if line.startswith("send")]


def test_fail_all_with_a_hung_backend():
    play = Playbook()
    play.write("hung")
    play.write("behind")
    play.run(10)
    play.take()
    play.engine.fail_all()
    play.expect("answer behind EIO", "answer hung EIO")
    play.write("later")  # the range is not settled as long as the backend has it
    assert play.counts == {"in_flight": 0, "parked": 1, "unsettled": 1}
    play.ok("hung")
    play.expect("send later")


def test_fail_all_sends_nothing_that_waited():
    play = Playbook()
    play.write("failing")
    play.error("failing", e.EIO)
    play.write("behind")
    play.read("reader")
    play.take()
    play.engine.fail_all()
    play.expect("answer reader EIO", "answer behind EIO", "answer failing EIO")
    play.run(10)
    play.expect()
    play.write("later")
    play.expect("send later")


def test_fail_all_in_a_pause_and_in_a_mismatch_leaves_the_disk_as_it_is():
    play = Playbook()
    play.engine.pause()
    play.write("a")
    play.engine.fail_all()
    play.write("b")
    assert play.state == "paused" and play.answers == {"a": (e.EIO, None)}
    play.engine.fail_all()
    play.engine.resume()
    play.outage()
    play.up(mismatch="another")
    play.write("c")
    play.engine.fail_all()
    play.write("d")
    play.run(30)
    assert play.state == "mismatch" and set(play.answers) == {"a", "b", "c"}
    assert play.engine.policy == policy()


def test_a_flush_in_flight_that_was_failed_is_not_in_flight_any_more():
    play = Playbook()
    play.flush("f")
    play.engine.fail_all()
    play.flush("later")
    assert play.counts == {"in_flight": 0, "parked": 1, "unsettled": 0}
    play.ok("f")
    play.expect("send f", "answer f EIO", "send later")
    play.ok("later")
    play.expect("answer later")


# --- limits, and a backend that answers before send returns ------------------------------------


def test_no_more_in_flight_than_the_limit():
    play = Playbook(limits=Limits(in_flight=2))
    for number, name in enumerate("abcd"):
        play.write(name, number)
    play.expect("send a", "send b")
    play.ok("b")
    play.expect("answer b", "send c")
    play.ok("a", "c")
    play.expect("answer a", "send d", "answer c")


def test_retries_of_failed_requests_respect_the_limit_in_flight():
    play = Playbook(limits=Limits(in_flight=1))
    play.write("a", 0)
    play.error("a", e.EIO)
    play.write("b", 1)
    play.run(2)
    play.expect("send a", "send b")
    play.ok("b")
    play.expect("answer b", "send a")


def test_one_rate_limit_holds_for_all_failed_requests():
    play = Playbook(limits=Limits(failed_retries_per_second=100))
    for number in range(100):
        play.write(f"w{number}", number)
    for number in range(100):
        play.error(f"w{number}", e.EIO)
    play.sends.clear()
    play.run(0.5)
    assert 1 <= len(play.sends) <= 51
    play.run(1)
    assert len(play.sends) == 100


def test_every_payload_is_released_exactly_once():
    play = Playbook(policy(retry(timeout=2)))
    play.write("a", 0)
    play.write("b", 0)
    play.write("c", 1)
    play.error("c", e.EIO)
    play.cancel("b")
    play.outage()
    play.write("d", 3)
    play.run(3, refuse=True)
    play.up()
    for name in "abcd":
        assert play.released.count(name) == 1, name
