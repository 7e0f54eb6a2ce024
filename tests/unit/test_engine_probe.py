"""EIO and EROFS may mean that the backend is away: the probe decides."""

import errno as e
import random

import pytest

from healfs.core.engine import Engine
from healfs.core.request import Kind
from tests.unit.playbook import FENCED, Playbook, policy, retry

OFFLINE = "the device is offline"


class Probed(Playbook):
    """A playbook of a backend whose EIO and EROFS say little; a test tells what the probe finds."""

    def __init__(self, given=None, **geometry):
        super().__init__(given, up=False)
        ambiguous = frozenset({e.EIO, e.EROFS})
        more = FENCED | {"ambiguous": ambiguous, "rng": random.Random(1)}
        self.engine = Engine(self, given or policy(), lambda: self.now, **more)
        self.engine.start()
        self.up(**geometry)
        self.expect("connect")
        self.run(2)  # of health: the first try after a loss comes at once

    def probe(self):
        self._say("probe")


@pytest.mark.parametrize("errno", [e.EIO, e.EROFS])
def test_what_fails_while_the_backend_is_away_waits_for_it(errno):
    play = Probed()
    play.write("a")
    play.read("b", 1)
    play.error("a", errno)
    play.expect("send a", "send b", "probe")
    play.engine.probed(OFFLINE)
    play.expect("close", "connect")
    assert play.state == "stalled" and play.engine.status()["reason"] == OFFLINE
    play.up()
    play.expect("send a", "send b")
    play.ok("a", "b")
    assert play.answers == {"a": (0, None), "b": (0, b"r" * 4096)}
    assert play.engine.status()["outages"]["count"] == 1


@pytest.mark.parametrize("errno", [e.EIO, e.EROFS])
def test_what_fails_while_the_backend_is_there_is_the_policys(errno):
    play = Probed(policy(retry(interval=1.0), read="report"))
    play.write("a")
    play.read("b", 1)
    play.error("a", errno)
    play.error("b", errno)
    play.expect("send a", "send b", "probe")
    play.engine.probed("")
    play.expect("probe")  # for what failed since the first began
    play.engine.probed("")
    play.expect(f"answer b {e.errorcode[errno]}")
    assert play.state == "ready" and play.counts["parked"] == 1
    play.run(2)
    play.expect("send a")
    play.error("a", errno)
    play.expect("probe")  # each time anew
    play.engine.probed("")
    play.run(5)
    play.expect("send a")


def test_while_nobody_knows_the_rest_goes_on_and_newer_writes_there_wait():
    play = Probed()
    play.write("a")
    play.error("a", e.EIO)
    play.write("b")
    play.write("c", 1)
    play.ok("c")
    play.expect("send a", "probe", "send c", "answer c")
    play.run(4)
    play.expect()
    play.engine.probed("")
    play.run(2)
    play.expect("send a")
    play.ok("a")
    play.expect("answer a", "send b")


def test_other_errors_need_no_probe():
    play = Probed(policy("report"))
    play.write("a")
    play.error("a", e.ENOSPC)
    play.expect("send a", "answer a ENOSPC")


def test_a_probe_that_ends_after_the_loss_tells_nothing_new():
    play = Probed()
    play.write("a")
    play.error("a", e.EIO)
    play.lose()
    play.expect("send a", "probe", "close", "connect")
    play.engine.probed(OFFLINE)
    play.expect()
    play.up()
    play.expect("send a")
    play.error("a", e.EIO)
    play.expect("probe")


def test_under_report_an_absent_backend_is_reported():
    play = Probed(policy("report"))
    play.write("a")
    play.error("a", e.EIO)
    play.engine.probed(OFFLINE)
    play.expect("send a", "probe", "close", "connect", "answer a EIO")
    assert play.state == "stalled"


@pytest.mark.parametrize("kind", [Kind.WRITE, Kind.FLUSH])
def test_a_replay_that_fails_asks_too(kind):
    play = Probed(volatile_cache=True)
    own = []
    play.on_send = lambda request: own.append(request) if request.internal else None
    play.write("a")
    play.ok("a")
    play.lose()
    play.up(volatile_cache=True)
    play.run(2)
    if kind is Kind.FLUSH:
        play.engine.completed(own.pop(), 0)
    play.take()
    piece = own.pop()
    assert piece.kind is kind
    play.engine.completed(piece, e.EIO)
    assert "probe" in play.take()
    play.engine.probed(OFFLINE)
    play.expect("close", "connect")
    play.up(volatile_cache=True)
    for _ in range(2):
        play.engine.completed(own.pop(), 0)
    play.flush("f")
    play.ok("f")
    assert play.state == "ready" and play.answers["f"] == (0, None)


def test_a_probe_says_nothing_of_what_failed_after_it_began():
    """The device may have gone since it looked."""
    play = Probed(policy(read="report", write=retry()))
    play.read("a")
    play.write("b", 1)
    play.error("a", e.EIO)
    play.error("b", e.EIO)
    play.expect("send a", "send b", "probe")
    play.engine.probed("")
    play.expect("answer a EIO", "probe")
    play.engine.probed(OFFLINE)
    assert play.state == "stalled" and "b" not in play.answers


def test_a_probe_of_the_last_connection_says_nothing_of_this_one():
    """It hung as long as that one did."""
    play = Probed()
    play.write("a")
    play.error("a", e.EIO)
    play.expect("send a", "probe")
    play.lose()
    play.run(1)
    play.up()
    play.take()
    play.error("a", e.EIO)  # sent again
    play.expect()
    play.engine.probed("the storage does not answer")
    assert play.state == "ready"
    play.expect("probe")
    play.engine.probed(OFFLINE)
    assert play.state == "stalled"
