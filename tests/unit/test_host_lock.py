"""The lock of a source in a directory that all may write to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from healfs.daemon import host_lock


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host_lock, "_PLACES", (str(tmp_path / "none"), str(tmp_path)))
    return tmp_path


def test_readers_share_it_and_the_last_one_takes_it_away(place: Path) -> None:
    readers = [host_lock.acquire("disk", shared=True) for _ in range(2)]
    with pytest.raises(BlockingIOError):
        host_lock.acquire("disk", shared=False)
    for fd in readers:
        assert list(place.iterdir())
        host_lock.release("disk", fd)
    assert not list(place.iterdir())
    host_lock.release("disk", host_lock.acquire("disk", shared=False))


def test_a_fifo_in_its_place_stops_nobody(place: Path) -> None:
    """An open(2) that waits for its writer would be a keeper that hangs."""
    os.mkfifo(place / "disk")
    host_lock.release("disk", host_lock.acquire("disk", shared=False))
