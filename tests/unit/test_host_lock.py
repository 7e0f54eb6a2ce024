"""The lock of a source in a directory that all may write to."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from healfs.daemon import host_lock

AS_ANOTHER = """
import os, sys
from healfs.daemon import host_lock
host_lock._PLACES = (sys.argv[1],)
os.setuid(65534)
host_lock.acquire(sys.argv[2], shared=True)
print(flush=True)
sys.stdin.read()
"""


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


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
@pytest.mark.parametrize("kind", ["file", "nbd"])
def test_another_user_keeps_root_from_no_file(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A file has locks of its own, for who may open it; an export has no other."""
    with tempfile.TemporaryDirectory() as directory:  # pytest's is root's alone
        monkeypatch.setattr(host_lock, "_PLACES", (directory,))
        os.chmod(directory, 0o1777)
        _lock_beside_another(Path(directory), kind)


def _lock_beside_another(place: Path, kind: str) -> None:
    name = host_lock.name_of(kind, "/disk")
    command = [sys.executable, "-c", AS_ANOTHER, str(place), name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as another:
        try:
            assert another.stdout is not None and another.stdout.readline() == b"\n"
            if kind == "nbd":
                with pytest.raises(BlockingIOError):
                    host_lock.acquire(name, shared=False)
            else:
                fd = host_lock.acquire(name, shared=False)
                assert os.fstat(fd).st_uid == 0
                host_lock.release(name, fd)
                assert not list(place.iterdir())
        finally:
            another.kill()


def test_each_user_may_lock_what_another_has_left(place: Path) -> None:
    """After a kill, say: the name stays."""
    before = os.umask(0o077)
    try:
        fd = host_lock.acquire("disk", shared=False)
    finally:
        os.umask(before)
    assert os.fstat(fd).st_mode & 0o777 == 0o644
    host_lock.release("disk", fd)


def test_where_there_is_no_place_it_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_lock, "_PLACES", (str(tmp_path / "none"), str(tmp_path / "nowhere")))
    with pytest.raises(FileNotFoundError):
        host_lock.acquire("disk", shared=False)
