"""The probe that tells a storage that is away from a request that failed."""

from __future__ import annotations

import errno
import io
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from healfs.backends import probing
from healfs.backends.base import SourceError
from healfs.backends.file import FileBackend
from healfs.core.request import Kind
from tests.backends.conftest import connected, make_request
from tests.backends.ext4 import Ext4

SIZE = 1 << 20


@pytest.fixture
def opened() -> Iterator[Callable[..., int]]:
    fds: list[int] = []

    def open_it(path: str | Path, flags: int = os.O_RDONLY) -> int:
        fds.append(os.open(path, flags))
        return fds[-1]

    yield open_it
    for fd in fds:
        os.close(fd)


def _probe(path: str | Path, fd: int, *, size: int = SIZE, read_only: bool = False) -> str:
    return probing.probe(str(path), fd, size=size, read_only=read_only)


def test_a_file_that_is_there(image: Path, opened: Callable[..., int]) -> None:
    assert _probe(image, opened(image)) == ""
    os.truncate(image, 2 * SIZE)  # one that grew is the same
    assert _probe(image, opened(image)) == ""


def test_another_file_has_its_name(image: Path, opened: Callable[..., int]) -> None:
    fd = opened(image)
    image.rename(image.with_name("mine"))
    assert "No such file" in _probe(image, fd)
    image.write_bytes(bytes(SIZE))
    assert "another file" in _probe(image, fd)


@pytest.mark.parametrize("left", [0, SIZE // 2, SIZE - 1])
def test_a_file_that_was_cut(image: Path, opened: Callable[..., int], left: int) -> None:
    fd = opened(image)
    os.truncate(image, left)
    assert _probe(image, fd) == f"it was cut to {left} bytes"


def test_a_file_system_that_is_read_only_now(tmp_path: Path, opened: Callable[..., int]) -> None:
    where = tmp_path / "fs"
    where.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", where], timeout=20).returncode:
        pytest.skip("no tmpfs here")
    try:
        path = where / "disk.img"
        path.write_bytes(bytes(SIZE))
        fd = os.open(path, os.O_RDONLY)
        try:
            assert _probe(path, fd) == ""
            subprocess.run(["mount", "-o", "remount,ro", where], check=True, timeout=20)
            assert "read-only" in _probe(path, fd)
            assert _probe(path, fd, read_only=True) == ""  # as it is meant to be
        finally:
            os.close(fd)
    finally:
        subprocess.run(["umount", where], check=True, timeout=20)


async def test_an_ext4_that_had_an_error(ext4: Ext4) -> None:
    """It calls itself writable, lets itself be read, and takes no write."""
    backend = FileBackend(str(ext4.image))
    async with connected(backend) as client:
        await client.write(0, b"x" * 4096)
        assert await backend.probe() == ""
        ext4.fail()
        request = make_request(Kind.WRITE, 0, data=bytes(4096))
        assert (await client.do(request))[0] == errno.EROFS
        assert "unmount it, fsck" in await backend.probe()
    with pytest.raises(OSError, match="unmount it, fsck") as caught:
        await backend.connect()
    assert not isinstance(caught.value, SourceError)
    await trio.to_thread.run_sync(ext4.mend)
    async with connected(backend) as client:
        await client.write(0, b"y" * 4096)
        assert await backend.probe() == ""
    await backend.aclose()


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_fuse_file_system_without_times_is_no_outage(
    image: Path, opened: Callable[..., int], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """QEMU's FUSE export, and nbdfuse: a bad sector behind them would stall the disk for ever."""

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "utime", refuse)
    assert _probe(image, opened(image)) == ""


def test_that_it_cannot_be_opened_anew_says_what_is_wrong(
    image: Path, opened: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ESTALE, say; only EINVAL means that there is no O_DIRECT."""
    fd = opened(image)
    for code, away in (errno.ESTALE, os.strerror(errno.ESTALE)), (errno.EINVAL, ""):

        def refuse(*_: object, code: int = code) -> int:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as context:
            context.setattr(os, "open", refuse)
            assert _probe(image, fd) == away


def test_a_device_that_is_there(loop_device: str, opened: Callable[..., int]) -> None:
    fd = opened(loop_device)
    assert _probe(loop_device, fd) == ""
    assert _probe(loop_device, fd, size=2 * SIZE) == f"it was cut to {SIZE} bytes"


def test_another_device_has_its_name(
    loop_device: str, tmp_path: Path, opened: Callable[..., int]
) -> None:
    other = tmp_path / "other"
    os.mknod(other, stat.S_IFBLK | 0o600, os.makedev(7, 4095))
    assert "another device" in _probe(other, opened(loop_device))


def test_a_device_of_which_nothing_can_be_read(
    loop_device: str, image: Path, opened: Callable[..., int]
) -> None:
    fd = opened(loop_device)
    os.truncate(image, 4096)  # the loop device keeps its size, and has no more than that
    assert _probe(loop_device, fd) == ""
    os.truncate(image, 0)
    assert _probe(loop_device, fd) == "nothing can be read: Input/output error"


@pytest.mark.parametrize(
    ("place", "state", "away"),
    [
        ("device/state", "running", ""),
        ("device/state", "live", ""),
        ("device/state", "offline", "the device is offline"),
        ("../device/state", "transport-offline", "the device is transport-offline"),
        ("device/model", "offline", ""),
    ],
)
def test_what_the_kernel_says_of_a_device(
    loop_device: str,
    opened: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    state: str,
    away: str,
) -> None:
    """SCSI and NVMe disks have a state; a partition's is its disk's."""
    device = os.stat(loop_device).st_rdev
    asked = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/{place}"

    def sysfs(path: str, **_: str) -> io.StringIO:
        if path != asked:
            raise FileNotFoundError(path)
        return io.StringIO(f"{state}\n")

    monkeypatch.setattr(probing, "open", sysfs, raising=False)
    assert _probe(loop_device, opened(loop_device)) == away
