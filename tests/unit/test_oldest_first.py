"""What a successor makes of the log, wherever the worker was killed (promises 3 and 4).

After every store in the log's table a successor is asked what it would write: the newest bytes of
each block must come out, whatever the backend has by then.
"""

import errno as e

import pytest

from healfs.core import writelog
from healfs.core.engine import Engine
from healfs.core.request import Kind
from healfs.core.writelog import WriteLog, memory_size, visible
from tests.unit.playbook import BLOCK
from tests.unit.test_engine_recovery import Disk

ENTRIES = 2048

pytestmark = pytest.mark.plain


def _nobody(request, errno, data):
    raise AssertionError("nobody asked")


class Watched(Disk):
    """Names are one letter, and what they write; a discard is a hint that nobody takes."""

    def __init__(self):
        self.stores = 0
        self.newest: dict[int, str] = {}  # by block
        self.backend: dict[int, str] = {}
        super().__init__()
        self.memory = memoryview(bytearray(memory_size(4 << 20, ENTRIES)))
        log = WriteLog(self.memory, ENTRIES, 1 << 20)
        self.engine = Engine(self, self.engine.policy, lambda: self.now, log)
        self.engine.start()
        self.back()

    def again(self, **geometry):
        """The connection is lost, and there again."""
        self.lose()
        self.back(**geometry)

    def drive(self, refused=(), rounds=8):
        """The backend refuses writes to these blocks."""

        def rule(request):
            blocks = _blocks(request)
            if request.kind is not Kind.WRITE:
                return 0
            if set(blocks) & set(refused):
                return e.ENOSPC
            self.backend |= dict.fromkeys(blocks, _name(request))
            if not request.internal:
                self.newest |= dict.fromkeys(blocks, _name(request))
            return 0

        super().drive(rule, rounds)

    def drive_for(self, seconds, refused=()):
        super().drive_for(seconds, refused)

    def look(self):
        self.stores += 1
        log = WriteLog(memoryview(bytearray(self.memory)), ENTRIES, 1 << 20)
        entries = log.recover(_nobody)[0]
        again = {r.order for r in entries if not r.completed and _name(r) not in self.answers}
        entries = [r for r in entries if r.completed or r.order in again]  # nobody waits for others
        found, unknown = dict(self.backend), set()
        for entry, start, end in visible(entries):
            blocks = range(start // BLOCK, end // BLOCK)
            if entry.order in again:
                unknown |= set(blocks)
            elif entry.kind is Kind.WRITE:
                found |= dict.fromkeys(blocks, _name(entry))
        wrong = {b: x for b, x in found.items() if self.newest.get(b) != x and b not in unknown}
        if wrong:  # a BaseException: the engine takes no notice
            pytest.fail(f"a successor writes {wrong}; newest: {self.newest}")


def _name(request):
    return "" if request.data is None else chr(request.data[0])


def _blocks(request):
    return range(request.offset // BLOCK, (request.offset + request.length) // BLOCK)


class Looked:
    """In place of a view of the log's table: a look after each store that may set a state."""

    def __init__(self, view, words, look):
        self.view, self.words, self.look = view, words, look

    def __getitem__(self, index):
        return self.view[index]

    def __setitem__(self, index, value):
        self.view[index] = value
        if not index % self.words:
            self.look()


@pytest.fixture
def disk():
    disk = Watched()
    log = disk.engine.log
    log._words = Looked(log._words, writelog.WORDS, disk.look)
    log._states = Looked(log._states, 1, disk.look)
    yield disk
    disk.drive_for(9)
    disk.flush("f")
    disk.drive()
    assert disk.succeeded("f") and disk.state == "ready" and disk.stores > 4
    assert not len(disk.engine.log) and not disk.engine.log.ring.used
    assert disk.backend == disk.newest


def test_a_refused_write_and_a_newer_one_over_a_part_of_it(disk):
    disk.written("s", 0, 2)
    disk.again()
    disk.drive([0])
    disk.written("w", 0)
    disk.drive_for(5)


def test_what_stayed_to_hide_a_refused_write_is_overwritten_and_all_land(disk):
    disk.written("s", 0, 4)
    disk.again()
    disk.drive([3])
    disk.written("w", 0, 2)
    disk.drive_for(3, [3])
    disk.written("n", 1)
    disk.again()
    disk.drive([1, 3])
    disk.drive_for(5)


def test_one_of_two_refused_writes_lands(disk):
    disk.written("s", 0, 2)
    disk.written("t", 4, 2)
    disk.again()
    disk.drive([0, 4])
    disk.written("w", 0)
    disk.drive_for(3, [4, 5])


def test_a_refused_write_that_hides_an_older_one_is_overwritten(disk):
    disk.written("a", 0, 8)
    disk.written("b", 4, 8)
    disk.written("c", 6, 2)
    disk.again()
    disk.drive([0, 8])  # of b, blocks 4 and 5 are stable
    disk.written("n", 8, 4)
    disk.lose()
    disk.back()
    disk.drive()


def test_the_last_refused_bytes_are_overwritten(disk):
    disk.written("s", 0, 4)
    disk.again()
    disk.drive([3])
    disk.written("w", 0, 2)
    disk.drive_for(3, [3])
    disk.written("n", 0, 3)
    disk.written("c", 1)
    disk.again()
    disk.drive([2, 3])  # of n, block 0 is stable
    disk.written("z", 2, 2)


def test_a_discard_hides_nothing(disk):
    disk.written("s", 0, 4)
    disk.again()
    disk.drive([0])
    disk.written("w", 0)
    disk.drive_for(3, [1])
    disk.request("d", Kind.DISCARD, 0, 4 * BLOCK)
    disk.drive_for(3, [1])
    disk.again()
    disk.drive()


def test_the_cache_is_gone_and_a_write_is_refused_still(disk):
    """A backend that comes back without a volatile cache: answered is stable, but not at once."""
    disk.written("s", 0, 2)
    disk.again(volatile_cache=False)
    disk.drive([0])
    disk.written("w", 0)
    disk.written("x", 8)
    disk.again(volatile_cache=False)
    disk.drive()


def test_a_pause_before_a_replay_has_begun_forgets_nothing(disk):
    """What completed since the last one is freed with it, or by the next flush."""
    disk.written("s", 0, 2)
    disk.again()
    disk.drive([0])
    disk.written("x", 8)
    disk.write("y", 9)  # and is not answered: the replay wants the disk for itself
    disk.run(1)
    assert disk.state == "replaying"
    disk.engine.pause()
    disk.drive()
    disk.engine.resume()
    disk.drive()
    disk.written("z", 8)
