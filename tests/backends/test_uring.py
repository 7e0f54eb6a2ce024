# ruff: noqa: ASYNC240 - the storage that the tests touch themselves is local
"""The ring by itself: its writer, the thread that writes where io_uring would have to wait."""

from __future__ import annotations

import errno
import mmap
import os
import select
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from healfs import compiled
from healfs.backends.buffers import Buffer
from healfs.backends.uring import FEW, IORING_OP_FSYNC, IORING_OP_WRITE, RWF_DSYNC, Operation, Ring
from tests.backends.conftest import DEADLINE, HeldStore, eventually

PAGE = mmap.PAGESIZE
ENTRIES = 16

# (offset, result) in the order of completion
Completions = list[tuple[int, int]]


@contextmanager
def rings(path: Path) -> Iterator[tuple[Ring, int, Completions]]:
    """A ring with a writer, the file, and what completed."""
    completed: Completions = []
    fd = os.open(path, os.O_RDWR)
    ring = Ring(ENTRIES, lambda o: completed.append((o.offset, o.result)), patience=0, writer=True)
    try:
        yield ring, fd, completed
    finally:
        assert not ring.pending()
        ring.close()
        os.close(fd)


def write(fd: int, number: int, flags: int = 0) -> Operation:
    """A page full of `number` at that page."""
    buffer = Buffer(12)
    buffer.view[:] = bytes([number]) * PAGE
    return Operation(
        IORING_OP_WRITE, fd, number * PAGE, PAGE, flags, buffer.address, (buffer, buffer.view)
    )


async def reap(ring: Ring, *, go_on: bool = True) -> None:
    with trio.fail_after(DEADLINE):
        while ring.pending():
            await ring.wait()
            ring.reap()
            if go_on:
                ring.submit()


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


async def test_more_writes_than_the_writer_has_room_for_end_in_order(image: Path) -> None:
    count = 5 * ENTRIES
    before = threads()
    with rings(image) as (ring, fd, completed):
        for number in range(count):
            ring.push(write(fd, number))
        assert ring.unsubmitted()
        ring.submit()
        await reap(ring)
    assert completed == [(number * PAGE, PAGE) for number in range(count)]
    content = image.read_bytes()
    for number in range(count):
        assert content[number * PAGE : (number + 1) * PAGE] == bytes([number]) * PAGE
    await eventually(lambda: threads() <= before)  # io_uring's own end a moment later


async def test_an_error_and_what_the_writer_does_not_do(image: Path) -> None:
    with rings(image) as (ring, fd, completed):
        reader = os.open(image, os.O_RDONLY)
        ring.push(write(reader, 1))
        ring.push(write(fd, 2, RWF_DSYNC))  # waits for the disk, and nobody waits behind it
        ring.push(write(fd, 4, 1 << 20))  # the flags count: there is no such one
        ring.push(Operation(IORING_OP_FSYNC, fd))
        ring.push(write(fd, 3))
        ring.submit()
        await reap(ring)
        os.close(reader)
    results = dict(completed)
    assert results.pop(4 * PAGE) in (-errno.EOPNOTSUPP, -errno.EINVAL)
    assert results == {0: 0, PAGE: -errno.EBADF, 2 * PAGE: PAGE, 3 * PAGE: PAGE}


@pytest.mark.skipif(bool(compiled.why_plain), reason=f"no writer: {compiled.why_plain}")
@pytest.mark.parametrize("count", [ENTRIES // 2, 3 * ENTRIES])
async def test_what_waits_behind_a_held_write_never_lands_when_cancelled(
    held_store: HeldStore, count: int
) -> None:
    """Not even what the thread was not told of; what it has begun ends as it ends."""
    with rings(held_store.path) as (ring, fd, completed):
        for number in range(count):
            ring.push(write(fd, number))
        ring.submit()
        await eventually(lambda: held_store.held() > 0)
        ring.push(write(fd, count))
        ring.cancel()
        held_store.release()
        await reap(ring, go_on=False)
    assert completed[0] == (0, PAGE)
    ended = [result for _, result in completed[1:]]
    assert set(ended) == {-errno.ECANCELED} and len(ended) == min(count, ENTRIES - 1)


@pytest.mark.parametrize("before", [0, FEW])
async def test_no_write_waits_behind_a_flush(
    held_store: HeldStore, image: Path, before: int
) -> None:
    """Nor behind one that waits for the few writes before it."""
    with rings(held_store.path) as (ring, fd, completed):
        other = os.open(image, os.O_RDWR)
        for number in range(before):
            ring.push(write(fd, number))
        ring.push(Operation(IORING_OP_FSYNC, fd))
        ring.submit()
        await eventually(lambda: held_store.held() > 0)
        for number in 1, 2:
            ring.push(write(other, number))
            ring.submit()
            with trio.fail_after(DEADLINE):
                while len(completed) < number:
                    await ring.wait()
                    ring.reap()
        held_store.release()
        await reap(ring)
        ring.push(write(other, 3))
        ring.submit()
        await reap(ring)
        os.close(other)
    held = {(number * PAGE, PAGE) for number in range(before)} | {(0, 0)}
    assert completed[:2] == [(PAGE, PAGE), (2 * PAGE, PAGE)]
    assert set(completed[2:-1]) == held and completed[-1] == (3 * PAGE, PAGE)


async def test_nothing_is_to_be_read_when_all_was_reaped(image: Path) -> None:
    """However soon: the thread has counted a write a moment before it tells. Else the event loop
    would spin on an idle disk."""
    with rings(image) as (ring, fd, _):
        operation = write(fd, 1)
        for _ in range(20_000):
            ring.push(operation)
            ring.submit()
            while ring.pending():
                ring.reap()
            os.sched_yield()
            with trio.fail_after(DEADLINE):
                while select.select([ring.fd], [], [], 0)[0]:
                    ring.reap()
                    await trio.lowlevel.checkpoint()


async def test_what_ends_while_the_ring_is_attended_is_told_of_afterwards(image: Path) -> None:
    with rings(image) as (ring, fd, completed):
        for number in range(2000):
            ring.attend(True)
            ring.push(write(fd, number % 8))
            ring.submit()
            if number % 4:
                while not ring.reap():
                    pass  # the writer's thread needs no lock of ours
            ring.attend(False)
            await reap(ring)
        assert len(completed) == 2000
        assert not select.select([ring.fd], [], [], 0)[0]
