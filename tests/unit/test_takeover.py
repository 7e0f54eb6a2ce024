"""From one worker to the next: the outage's clock, the layout, the features, the hand-over."""

import errno as e
from unittest import mock

import pytest

from healfs.core.engine import Engine
from healfs.core.request import Kind, Request
from healfs.core.writelog import MAGIC, LayoutError, WriteLog, memory_size
from healfs.fuse import negotiation, wire
from tests.unit.playbook import BLOCK, SIZE, START, Playbook, policy, retry

ENTRIES, MESSAGE = 2048, 1 << 20


class Mount(Playbook):
    """A playbook whose engine's memory is left to successors."""

    def __init__(self, given=None, **keywords):
        super().__init__(given, up=False)
        self.memory = memoryview(bytearray(memory_size(4 << 20, ENTRIES)))
        self.keywords = keywords
        self.engine = self._successor()
        self.engine.start()
        self.engine.connected(SIZE)

    def _successor(self):
        log = WriteLog(self.memory, ENTRIES, MESSAGE)
        return Engine(self, self.engine.policy, lambda: self.now, log, **self.keywords)

    def dies(self, *, died=0.0, takes_over=0.0):
        """At `died` after the start, and a successor is there at `takes_over`."""
        self.now = START + takes_over
        self.engine = self._successor()
        self.engine.take_over(START + died)
        self.engine.resent()
        self.engine.start()

    def outages(self):
        return self.engine.status()["outages"]


def test_the_outage_counts_from_the_death():
    mount = Mount()
    mount.dies(died=10, takes_over=50)
    assert mount.outages() == {"count": 1, "current_seconds": 40, "longest_seconds": 40}
    mount.now += 2
    mount.engine.connected(SIZE)
    assert mount.outages() == {"count": 1, "current_seconds": 0, "longest_seconds": 42}


def test_an_outage_that_was_there_before_the_death_counts_from_its_own_beginning():
    mount = Mount()
    mount.now = START + 5
    mount.engine.lost(e.ECONNRESET)
    mount.dies(died=10, takes_over=50)
    assert mount.outages()["current_seconds"] == 45
    mount.dies(died=60, takes_over=70)  # the next one: still the same outage
    assert mount.outages() == {"count": 1, "current_seconds": 65, "longest_seconds": 65}


def test_the_retry_timeout_counts_from_the_death():
    mount = Mount(policy(retry(30)))
    mount.dies(died=10, takes_over=50)
    answers = []
    mount.engine.submit(Request(Kind.READ, 0, 512, lambda _, errno, data: answers.append(errno)))
    assert answers == [e.EIO]


def test_a_successor_writes_nothing_where_the_old_workers_attempts_may_read():
    """The write was given up, so nobody sends it again, but its attempt may go on until the new
    connection, which waits for it."""
    mount = Mount()
    attempt = mount.request("a", Kind.WRITE, 0, 4096).data
    mount.cancel("a")
    mount.dies()
    mount.write("b", 1)
    assert bytes(attempt) == b"a" * 4096
    mount.engine.connected(SIZE)
    mount.take()
    mount.write("c", 2)
    mount.ok("b", "c")
    assert mount.answers["b"] == mount.answers["c"] == (0, None)


def test_who_makes_room_sends_nothing_more_but_the_flush_that_is_waited_for():
    mount = Playbook()
    mount.write("a", 0)
    mount.flush("f")
    mount.expect("send a", "send f")
    mount.flush("g")
    mount.engine.hold()
    mount.write("b", 0)
    mount.read("c", 2)
    assert mount.engine.in_flight == 2
    mount.expect()
    mount.ok("a")
    mount.ok("f")
    mount.expect("answer a", "answer f", "send g")
    mount.ok("g")
    mount.expect("answer g")
    assert mount.engine.in_flight == 0


# --- pieces of a replay that may still land -----------------------------------------------------


class Replaying(Mount):
    """Two writes, the newer one amid the older, are being replayed: three pieces are in flight."""

    def __init__(self, **keywords):
        super().__init__(settle=5.0, **keywords)
        self.flying = []
        self.on_send = self.flying.append
        self.write("old", 0, 5)
        self.drive()
        self.write("new", 2)
        self.drive()
        self.lose()
        self.flying.clear()
        self.engine.connected(SIZE)
        assert self.state == "replaying"
        assert sorted((r.start // BLOCK, r.end // BLOCK) for r in self.flying) == PIECES
        self.take()

    def drive(self):
        while self.flying:
            self.engine.completed(self.flying.pop(0), 0)

    def settles(self):
        """From now on; a write to the old one's range does not go before."""
        self.flying.clear()
        self.engine.connected(SIZE)
        self.drive()
        assert self.state == "ready"
        self.write("newer", 0)
        self.take()
        self.run(4.9)
        assert "send newer" not in self.take()
        self.run(0.2)
        assert "send newer" in self.take()


PIECES = [(0, 2), (2, 3), (3, 5)]


def test_what_a_replay_had_sent_is_unsettled_after_a_death():
    mount = Replaying()
    mount.dies()
    mount.settles()


def test_a_paused_replay_has_sent_what_it_has_sent():
    mount = Replaying()
    mount.engine.pause()
    mount.dies()
    mount.engine.resume()
    mount.settles()


def test_pieces_that_a_paused_replay_has_answers_for_are_settled():
    mount = Replaying()
    mount.engine.pause()
    mount.drive()
    mount.dies()
    mount.engine.resume()
    mount.engine.connected(SIZE)
    mount.drive()
    mount.write("newer", 0)
    assert mount.take()[-1] == "send newer"


@pytest.mark.plain
def test_a_second_death_knows_what_the_first_worker_had_sent():
    """Even where there were no records for all of it."""
    mount = Replaying()
    mount.engine.pause()
    with mock.patch.object(WriteLog, "note", lambda self, attempt: None):
        mount.dies()
    mount.engine.connected(SIZE)
    mount.dies()
    mount.engine.resume()
    mount.settles()


@pytest.mark.parametrize("dies", [False, True])
def test_pieces_of_one_entry_do_not_hold_back_what_lies_between_them(dies):
    """Else a replay waits for the settle time, or for a fence that never succeeds."""
    mount = Replaying()
    if dies:
        mount.dies()
    else:
        mount.lose()
    mount.flying.clear()
    mount.engine.connected(SIZE)
    assert sorted((r.start // BLOCK, r.end // BLOCK) for r in mount.flying) == PIECES
    mount.drive()
    assert mount.state == "ready"


def test_one_piece_that_is_settled_leaves_the_others_unsettled():
    mount = Replaying()
    mount.lose()
    mount.run(3)
    mount.flying.clear()
    mount.engine.connected(SIZE)
    first = next(r for r in mount.flying if r.start == 0)
    mount.flying.remove(first)
    mount.drive()
    mount.lose()  # only the first one is in flight
    mount.engine.connected(SIZE)
    mount.drive()
    mount.write("first", 0)
    mount.write("last", 4)
    mount.take()
    mount.run(2.1)
    assert "send last" in mount.take()
    mount.drive()
    mount.run(2)
    assert "send first" not in mount.take()
    mount.run(1.1)
    assert "send first" in mount.take()


@pytest.mark.parametrize("first", [MAGIC.replace(b"1", b"2"), b"\xff" * len(MAGIC)])
def test_a_memory_of_another_layout_is_not_touched(first):
    memory = bytearray(memory_size(4 << 20, ENTRIES))
    memory[: len(first)] = first
    before = bytes(memory)
    with pytest.raises(LayoutError, match="layout"):
        WriteLog(memoryview(memory), ENTRIES, MESSAGE)
    assert memory == before


def reply(*, major=7, flags=0x4040B039, flags2=0x80, max_write=wire.MAX_WRITE, background=12):
    """As libfuse replies to INIT, with what healfs does not set itself."""
    message = bytearray(wire.INIT_OUT_SIZE)
    negotiation._INIT_OUT.pack_into(
        message, 16, major, 31, 131072, flags, background, 9, max_write, 1, 256, 0, flags2
    )
    return bytes(message)


def test_who_negotiates_the_same_features_fits():
    assert negotiation.difference(reply(), reply(background=99)) == ""
    assert negotiation.difference(reply(max_write=4096), reply()) == ""


@pytest.mark.parametrize(
    ("was", "now", "words"),
    [
        (reply(), reply(flags=0x4040B038), "flags 0x1)"),
        (reply(flags2=0x81), reply(), "flags 0x100000000)"),
        (reply(), reply(major=8), "FUSE 8, the mount FUSE 7"),
        (reply(max_write=2 * wire.MAX_WRITE), reply(), "2097152 bytes, its own 1048576"),
    ],
)
def test_who_would_negotiate_others_does_not(was, now, words):
    assert words in negotiation.difference(was, now)
