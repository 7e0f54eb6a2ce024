"""The pages of the write log's memfd: there before they are read to, and given back."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from healfs.config import MountConfig
from healfs.core.ring import STEP
from healfs.core.writelog import LayoutError
from healfs.daemon.log_memory import LogMemory

SIZE = 8 << 20
CONFIG = MountConfig("disk", "/nowhere", log_size=SIZE, log_entries=2048)


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("log")
    yield fd
    os.close(fd)


def held(fd: int) -> int:
    """Bytes of memory."""
    return os.fstat(fd).st_blocks * 512


@pytest.mark.parametrize("locked", [False, True])
def test_what_is_given_back_is_free_and_comes_again(memfd: int, locked: bool) -> None:
    memory = LogMemory(CONFIG, memfd)
    if locked:
        assert memory.lock() == ""
    assert held(memfd) == 0
    log = memory.write_log()
    small = held(memfd)
    assert STEP <= small < STEP + (1 << 20)
    slots = []
    for _ in range(6):
        log.ring.target()[:] = b"x" * log.ring.message
        slots.append(log.ring.keep(1 << 20))
    assert held(memfd) > 6 << 20
    log.ring.shrink()
    assert held(memfd) > 6 << 20  # all of it is in use
    for slot in slots:
        log.ring.release(slot)
    log.ring.shrink()
    assert held(memfd) == small
    assert bytes(log.ring.target()[:1]) == b"x"
    assert not any(memory.view[-STEP:])
    log.ring.target()[:] = b"y" * log.ring.message
    log.ring.keep(log.ring.message)
    assert held(memfd) >= small + (1 << 20)


def test_a_log_of_another_size_is_refused(memfd: int) -> None:
    os.ftruncate(memfd, 4096)
    with pytest.raises(LayoutError, match="there are 4096"):
        LogMemory(CONFIG, memfd)
