# ruff: noqa: ASYNC220, ASYNC221, ASYNC240 - the storage that the tests touch themselves is local
"""What the file backend promises beyond the contract: errors, locks, the fence, no blocking."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from healfs.backends import file as file_module
from healfs.backends import looks, opening, threads
from healfs.backends.base import SourceError
from healfs.backends.buffers import Pool
from healfs.backends.file import FileBackend
from healfs.core.errors import ErrorClass, classify
from healfs.core.request import Kind, Request
from tests.backends.conftest import (
    DEADLINE,
    Client,
    HeldStore,
    connected,
    eventually,
    make_request,
)
from tests.backends.nbd_servers import qemu_nbd

both_queues = pytest.mark.parametrize("use_uring", [True, False], ids=["uring", "threads"])


async def refused(backend: FileBackend) -> str:
    """The one line of a SourceError."""
    with trio.fail_after(DEADLINE):
        with pytest.raises(SourceError) as caught:
            await backend.connect()
    await backend.aclose()
    text = str(caught.value)
    assert "\n" not in text
    return text


async def test_create_makes_a_sparse_file_once(tmp_path: Path) -> None:
    path = tmp_path / "new.img"
    backend = FileBackend(str(path), create=1 << 30)
    assert (await backend.connect()).size == 1 << 30
    assert path.stat().st_blocks * 512 < 1 << 20
    backend.close()
    assert (await backend.connect()).size == 1 << 30  # not made again
    await backend.aclose()
    assert "exists; leave out --create" in await refused(FileBackend(str(path), create=1 << 20))
    assert path.stat().st_size == 1 << 30


async def test_create_of_more_than_the_file_system_takes_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new.img"
    assert "cannot make" in await refused(FileBackend(str(path), create=1 << 62))
    assert not path.exists()


async def test_wrong_sources_are_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    assert f"no such file: {missing}; --create SIZE" in await refused(FileBackend(missing))
    assert "is a directory" in await refused(FileBackend(str(tmp_path)))
    inside = str(tmp_path / "missing" / "disk.img")
    assert "no such directory" in await refused(FileBackend(inside, create=4096))
    empty = tmp_path / "empty"
    empty.touch()
    assert "0 bytes); truncate -s SIZE" in await refused(FileBackend(str(empty)))
    assert "neither a regular file" in await refused(FileBackend("/dev/null"))
    os.mkfifo(tmp_path / "fifo")
    assert "neither a regular file" in await refused(FileBackend(str(tmp_path / "fifo")))


async def test_a_path_that_was_there_once_is_away(image: Path) -> None:
    backend = FileBackend(str(image))
    await backend.connect()
    backend.close()
    image.rename(image.with_name("elsewhere"))
    for _ in ("it is gone", "what was below its mount point is there"):
        with pytest.raises(OSError) as caught:
            await backend.connect()
        assert not isinstance(caught.value, SourceError)
        # Nobody is told to make another in its place.
        assert "--create" not in str(caught.value) and "truncate" not in str(caught.value)
        image.touch()
    image.with_name("elsewhere").rename(image)
    await backend.connect()
    await backend.aclose()


async def test_identity_is_the_file_not_the_path(image: Path) -> None:
    backend = FileBackend(str(image))
    first = (await backend.connect()).identity
    backend.close()
    other = image.with_name("other")
    other.write_bytes(bytes(1 << 20))
    other.rename(image)
    assert (await backend.connect()).identity != first
    await backend.aclose()


async def test_on_fuse_a_handle_is_no_identity_and_a_flush_has_no_description_of_its_own(
    held_store: HeldStore,
) -> None:
    """Its server gives out another handle after its next mount. This one has no statfs, either."""
    backend = FileBackend(str(held_store.path))
    geometry = await backend.connect()
    assert backend._session is not None
    assert backend._session.flush_fd == backend._session.fd
    await backend.aclose()
    assert geometry.identity == {"inode": str(os.stat(held_store.path).st_ino)}


async def test_a_read_beyond_a_shortened_file_is_an_error(image: Path) -> None:
    async with connected(FileBackend(str(image))) as client:
        os.truncate(image, 5000)
        assert await client.do(make_request(Kind.READ, 4096, 4096)) == (errno.EIO, None)
        assert len(await client.read(0, 4096)) == 4096


async def test_forced_threads_are_noted(image: Path) -> None:
    backend = FileBackend(str(image), use_uring=False)
    assert any("threads are used" in note for note in (await backend.connect()).notes)
    await backend.aclose()


async def test_without_io_uring_threads_take_its_place(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No such system call: what a container's seccomp profile makes of io_uring_setup.
    monkeypatch.setattr("healfs.backends.uring.SYS_IO_URING_SETUP", 1 << 20)
    assert "io_uring is not available" in await refused(FileBackend(str(image), use_uring=True))
    async with connected(FileBackend(str(image))) as client:
        assert any("threads are used" in note for note in client.geometry.notes)
        await client.write(0, b"x")
        assert await client.read(0, 1) == b"x"


@pytest.mark.parametrize("call", ["push", "reap"])
async def test_a_queue_that_takes_no_more_is_a_connection_that_is_lost(
    image: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Not a disk that is faulted: it is an error of the kernel's, for want of memory, not ours."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EAGAIN, "no more")

    monkeypatch.setattr(file_module.ThreadPool, call, refuse)
    backend = FileBackend(str(image), use_uring=False)
    await backend.connect()
    answered: list[int] = []
    backend.submit(
        Request(Kind.READ, 0, 4096, lambda *_: None), lambda _, code, data: answered.append(code)
    )
    backend.commit()
    with trio.fail_after(DEADLINE):
        error = await backend.serve()
    monkeypatch.undo()
    await backend.aclose()
    assert error.errno == errno.EAGAIN and not answered


async def test_o_direct_takes_payloads_from_any_address(loop_device: str) -> None:
    payload = bytearray(os.urandom(8192))
    async with connected(FileBackend(loop_device)) as client:
        for skip in (0, 1, 80, 511):
            await client.write(512, memoryview(payload)[skip : skip + 4096])
            assert await client.read(512, 4096) == payload[skip : skip + 4096]


async def test_a_block_device_is_exclusive_and_described(loop_device: str) -> None:
    async with connected(FileBackend(loop_device)) as client:
        assert (client.geometry.size, client.geometry.minimum_block) == (1 << 20, 512)
        with pytest.raises(OSError) as caught:
            os.open(loop_device, os.O_RDONLY | os.O_EXCL)
        assert caught.value.errno == errno.EBUSY
        assert "in use" in await refused(FileBackend(loop_device))
        assert client.geometry.volatile_cache


async def test_a_device_without_a_volatile_cache_says_so(write_through: str) -> None:
    async with connected(FileBackend(write_through)) as client:
        assert client.geometry.can_flush and not client.geometry.volatile_cache


@both_queues
@pytest.mark.parametrize("left", [0, 8192], ids=["gone", "cut"])
@pytest.mark.parametrize("kind", [Kind.WRITE, Kind.WRITE_ZEROES, Kind.DISCARD, Kind.READ])
async def test_a_device_that_is_gone_or_cut_is_away(
    loop_device: str, image: Path, kind: Kind, left: int, use_uring: bool
) -> None:
    """One that is gone has no size: Linux calls a write ENOSPC then, and zeroes EINVAL."""
    async with connected(FileBackend(loop_device, use_uring=use_uring)) as client:
        os.truncate(image, left)
        subprocess.run(["losetup", "--set-capacity", loop_device], check=True, timeout=DEADLINE)
        data = bytes(16384) if kind is Kind.WRITE else None
        error, _ = await client.do(make_request(kind, 4096, 16384, data=data))
        if kind is Kind.READ:
            assert error == errno.EIO
            assert await client.backend.probe() == f"it was cut to {left} bytes"
        else:
            assert classify(error) is ErrorClass.LOST


async def test_what_a_device_has_no_room_for_is_no_outage(
    loop_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "perform", lambda operation: -errno.ENOSPC)
    async with connected(FileBackend(loop_device, use_uring=False)) as client:
        request = make_request(Kind.WRITE, 4096, data=bytes(4096))
        assert await client.do(request) == (errno.ENOSPC, None)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
async def test_no_storage_calls_a_read_a_write_or_a_flush_wrong(
    image: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A device with larger sectors than it had does so, and a file system of FUSE may."""
    monkeypatch.setattr(threads, "perform", lambda operation: -number)
    async with connected(FileBackend(str(image), use_uring=False)) as client:
        for request in (
            make_request(Kind.READ, 0, 512),
            make_request(Kind.WRITE, 0, data=bytes(512)),
            make_request(Kind.FLUSH),
        ):
            assert await client.do(request) == (errno.EIO, None)
        assert await client.do(make_request(Kind.DISCARD, 0, 512)) == (number, None)


async def test_a_read_only_file_system_without_fsync_has_nothing_to_flush(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As squashfs, iso9660 and erofs are: a flush that was tried again would wait for ever."""
    monkeypatch.setattr(threads, "perform", lambda operation: -errno.EINVAL)
    async with connected(FileBackend(str(image), use_uring=False, read_only=True)) as client:
        assert await client.do(make_request(Kind.FLUSH)) == (0, None)
        assert await client.do(make_request(Kind.READ, 0, 512)) == (errno.EIO, None)


async def test_a_full_file_system_is_enospc(tmp_path: Path) -> None:
    mountpoint = tmp_path / "small"
    mountpoint.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mountpoint)], timeout=20
    )
    if mounted.returncode:
        pytest.skip("cannot mount a tmpfs")
    try:
        backend = FileBackend(str(mountpoint / "disk.img"), create=1 << 20)
        async with connected(backend) as client:
            # Half of it fits: the short write is continued, and then says why it was short.
            request = make_request(Kind.WRITE, 0, data=bytes(512 << 10))
            assert (await client.do(request))[0] == errno.ENOSPC
            await client.do(make_request(Kind.DISCARD, 0, 512 << 10))
            await client.write(0, b"x" * 4096)
        await backend.aclose()
    finally:
        subprocess.run(["umount", "--lazy", str(mountpoint)], check=True, timeout=20)


# --- exclusive use


def qemu_io(image: Path, command: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["qemu-io", *options, "-f", "raw", "-c", command, str(image)],
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.mark.parametrize("read_only", [False, True])
async def test_an_image_that_qemu_writes_is_refused(image: Path, read_only: bool) -> None:
    with qemu_nbd(image):
        text = await refused(FileBackend(str(image), read_only=read_only))
    assert "in use by QEMU or another healfs" in text
    backend = FileBackend(str(image), read_only=read_only)
    await backend.connect()
    await backend.aclose()


async def test_an_image_that_qemu_reads_is_refused_to_a_writer(image: Path) -> None:
    with qemu_nbd(image, "--read-only"):
        assert "in use" in await refused(FileBackend(str(image)))
        reader = FileBackend(str(image), read_only=True)
        await reader.connect()
        await reader.aclose()


async def test_qemu_refuses_an_image_that_healfs_has(image: Path) -> None:
    backend = FileBackend(str(image))
    await backend.connect()
    for command, options in (("write 0 512", ()), ("read 0 512", ("-r",))):
        done = qemu_io(image, command, *options)
        assert done.returncode and "lock" in done.stderr
    backend.close()  # away, not gone: the lock stays
    assert "lock" in qemu_io(image, "write 0 512").stderr
    await backend.aclose()
    assert not qemu_io(image, "write 0 512").returncode


async def test_qemu_may_read_but_not_write_beside_a_reader(image: Path) -> None:
    backend = FileBackend(str(image), read_only=True)
    await backend.connect()
    assert "lock" in qemu_io(image, "write 0 512").stderr
    assert not qemu_io(image, "read 0 512", "-r").returncode
    await backend.aclose()


async def test_a_second_healfs_is_refused_and_a_successor_waits(image: Path) -> None:
    first = FileBackend(str(image))
    await first.connect()
    assert "in use" in await refused(FileBackend(str(image)))
    assert "in use" in await refused(FileBackend(str(image), read_only=True))
    successor = FileBackend(str(image), wait_for_lock=True)
    with pytest.raises(OSError) as caught:
        await successor.connect()
    assert not isinstance(caught.value, SourceError)
    await first.aclose()
    await successor.connect()
    await successor.aclose()


async def test_a_reconnect_keeps_the_lock_throughout(image: Path) -> None:
    backend = FileBackend(str(image))
    for _ in range(3):
        await backend.connect()
        assert "in use" in await refused(FileBackend(str(image)))
        backend.close()
    await backend.aclose()


# --- a store that does not answer


async def make_progress(ticks: int = 20) -> None:
    """The loop is alive: a task of it gets its turns."""
    with trio.fail_after(DEADLINE):
        for _ in range(ticks):
            await trio.sleep(0.005)


def flood(client: Client, count: int = 400) -> None:
    for n in range(count):
        if n % 4:
            client.send(make_request(Kind.READ, n * 4096, 4096))
        else:
            client.send(make_request(Kind.WRITE, n * 4096, data=bytearray(b"old!" * 1024)))
    client.send(make_request(Kind.FLUSH))


@both_queues
async def test_a_store_that_hangs_does_not_block_the_loop(
    held_store: HeldStore, use_uring: bool
) -> None:
    backend = FileBackend(str(held_store.path), use_uring=use_uring)
    async with connected(backend) as client:
        before = trio.current_time()
        flood(client)
        assert trio.current_time() - before < DEADLINE
        await make_progress()
        await eventually(lambda: held_store.held() > 8)
        assert not client.answers
        held_store.release()
        await client.until(lambda: len(client.answers) == 401)
        assert not any(error for _, error, _ in client.answers)
    await backend.aclose()


@both_queues
async def test_the_fence_holds_until_the_store_answered(
    held_store: HeldStore, use_uring: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_module, "CONNECT_TIMEOUT", 0.2)
    backend = FileBackend(str(held_store.path), use_uring=use_uring)
    old = make_request(Kind.WRITE, 0, data=bytearray(b"old!" * 1024))
    async with connected(backend) as client:
        client.send(old)
        await eventually(lambda: held_store.held() > 0)
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            await backend.connect()
        assert caught.value.errno == errno.ETIMEDOUT
    monkeypatch.setattr(file_module, "CONNECT_TIMEOUT", DEADLINE)
    assert "in use" in await refused(FileBackend(str(held_store.path)))
    held_store.release()
    async with connected(backend) as second:
        await second.write(0, bytearray(b"new!" * 1024))
        assert await second.read(0, 4096) == b"new!" * 1024
    assert not client.answers
    await backend.aclose()


@both_queues
async def test_an_aborted_store_answers_with_errors(held_store: HeldStore, use_uring: bool) -> None:
    async with connected(FileBackend(str(held_store.path), use_uring=use_uring)) as client:
        flood(client, 100)
        await eventually(lambda: held_store.held() > 0)
        held_store.abort()
        await client.until(lambda: len(client.answers) == 101)
        assert all(error for _, error, _ in client.answers)


HANGING = """
import sys, trio
from healfs.backends.file import FileBackend
from healfs.core.request import Kind, Request

async def main(path, use_uring):
    backend = FileBackend(path, use_uring=use_uring == "True")
    await backend.connect()
    for n in range(40):
        backend.submit(Request(Kind.READ, n * 4096, 4096, print), print)
    backend.commit()
    print("sent", flush=True)
    await trio.to_thread.run_sync(sys.stdin.readline)
    await backend.aclose()

trio.run(main, *sys.argv[1:])
"""


def is_zombie(pid: int) -> bool:
    """Ended, but for threads that FUSE lets no signal free while its server has their request:
    not even kill -9 does more."""
    status = Path(f"/proc/{pid}/status").read_text()
    return "\nState:\tZ" in status


@both_queues
async def test_a_hung_store_does_not_keep_the_process(
    held_store: HeldStore, use_uring: bool
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING, str(held_store.path), str(use_uring)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None and process.stdin is not None
        assert await trio.to_thread.run_sync(process.stdout.readline) == b"sent\n"
        await eventually(lambda: held_store.held() > 8)
        process.stdin.write(b"\n")
        process.stdin.flush()
        await eventually(lambda: process.poll() is not None or is_zombie(process.pid))
    finally:
        process.kill()
        held_store.abort()
        process.communicate(timeout=DEADLINE)


def test_the_pool_is_bounded_and_used_again() -> None:
    pool = Pool(limit=8 * mmap.PAGESIZE)
    taken = [pool.take(mmap.PAGESIZE) for _ in range(8)]
    assert all(taken) and pool.take(1) is None
    assert all(buffer and buffer.address % mmap.PAGESIZE == 0 for buffer in taken)
    for buffer in taken:
        assert buffer is not None
        pool.give(buffer)
    assert pool.take(1) in taken
    # What lies free in other classes makes room; one of any size is always to be had.
    assert Pool(limit=1).take(1 << 20) is not None
    fresh = Pool(limit=8 * mmap.PAGESIZE)
    small = fresh.take(1)
    assert small is not None
    fresh.give(small)
    assert fresh.take(8 * mmap.PAGESIZE) is not None


async def test_reads_that_find_no_buffer_wait_for_one(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_module, "BUFFER_LIMIT", 128 << 10)
    image.write_bytes(b"\7" * (1 << 20))
    async with connected(FileBackend(str(image))) as client:
        client.send(*(make_request(Kind.READ, n << 16, 1 << 16) for n in range(16)))
        client.send(make_request(Kind.READ, 0, 1 << 20))
        await client.until(lambda: len(client.answers) == 17)
        assert all(not e and d == b"\7" * r.length for r, e, d in client.answers)


def test_created_images_are_the_owners_alone(tmp_path: Path) -> None:
    async def make() -> None:
        backend = FileBackend(str(tmp_path / "new.img"), create=4096)
        await backend.connect()
        await backend.aclose()

    trio.run(make)
    assert stat.S_IMODE((tmp_path / "new.img").stat().st_mode) == 0o600


async def test_a_descriptor_that_no_session_could_be_made_of_locks_nobody_out(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither io_uring nor threads, for want of descriptors: that passes."""
    backend = FileBackend(str(image))

    def no_queue(*arguments: object, **named: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as pressed:
        pressed.setattr(file_module, "Ring", no_queue)
        pressed.setattr(file_module, "ThreadPool", no_queue)
        with pytest.raises(OSError) as caught:
            await backend.connect()
        assert caught.value.errno == errno.EMFILE
    await backend.connect()
    await backend.aclose()


def attempt(path: Path, old: list[int], create: opening.Creation | None = None) -> opening.Attempt:
    return opening.Attempt(
        str(path), read_only=False, create=create, wait_for_lock=False, locked=False, old=old
    )


async def test_an_attempt_that_was_given_up_before_it_began_closes_nothing(image: Path) -> None:
    """The descriptors that it was to close are the next attempt's to close, once."""
    old = os.open(image, os.O_RDONLY)
    late = attempt(image, [old])
    assert late.abandon() == [old]
    with pytest.raises(OSError) as caught:
        late.run()
    assert caught.value.errno == errno.ETIMEDOUT
    os.close(old)  # EBADF, if it had


async def test_what_an_attempt_opened_for_nobody_is_left_to_a_thread(image: Path) -> None:
    """close(2) on NFS waits for the server; the loop may not."""
    late = attempt(image, [])
    opened = late.run()
    assert sorted(late.abandon()) == sorted(opened.fds)
    opening.close_all(opened.fds)


async def test_for_want_of_descriptors_no_lock_is_lost(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = FileBackend(str(image))
    await backend.connect()
    backend.close()
    real = os.open

    def none_left(path: str, *arguments: int, **named: int) -> int:
        if str(path).startswith(failing):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, *arguments, **named)

    # The file itself, and the description for flushes.
    for prefix in str(image), "/proc/self/fd/":
        failing = prefix
        with monkeypatch.context() as short:
            short.setattr(os, "open", none_left)
            counts = set()
            for _ in range(3):
                with pytest.raises(OSError) as caught:
                    await backend.connect()
                assert caught.value.errno == errno.EMFILE
                counts.add(len(os.listdir("/proc/self/fd")))
            assert len(counts) == 1
        assert "in use" in await refused(FileBackend(str(image)))
    await backend.connect()
    await backend.aclose()


async def test_a_look_that_finds_no_descriptor_is_waited_for(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(fd: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    backend = FileBackend(str(image))
    await backend.connect()
    with monkeypatch.context() as short:
        short.setattr(os, "dup", none_left)
        assert await backend.probe() == "it cannot be looked at: Too many open files"
        assert await backend.extents(0, 4096) is None
    assert await backend.probe() == ""
    await backend.aclose()


async def test_a_look_that_hangs_locks_nobody_out(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not ourselves, at the next connection."""
    backend = FileBackend(str(image))
    await backend.connect()
    begun, hold = threading.Event(), threading.Event()

    def hang(*_: object, **__: object) -> str:
        begun.set()
        hold.wait(DEADLINE)
        return ""

    monkeypatch.setattr(file_module.probing, "probe", hang)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(backend.probe)
        await trio.to_thread.run_sync(begun.wait, DEADLINE)
        backend.close()
        await backend.connect()
        hold.set()
    await backend.aclose()


async def test_a_lock_that_was_had_is_waited_for(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS, its lock manager being down: not a disk that goes on without."""

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    backend, never = FileBackend(str(image)), FileBackend(str(image))
    await backend.connect()
    backend.close()
    with monkeypatch.context() as context:
        context.setattr(file_module.opening.locks, "acquire", none)
        with pytest.raises(OSError, match="no lock is to be had") as caught:
            await backend.connect()
        assert caught.value.errno == errno.ENOLCK and not isinstance(caught.value, SourceError)
        assert "no locks on this file system" in (await never.connect()).notes[0]
        await never.aclose()
    assert not (await backend.connect()).notes
    await backend.aclose()


async def test_the_loop_closes_nothing_that_may_wait(image: Path) -> None:
    """A look that finds all threads in a storage that hangs: its descriptor is a thread's."""
    left: list[int] = []
    hold = threading.Event()
    all_in = threading.Barrier(looks.THREADS + 1)

    def hang(_: int) -> None:
        all_in.wait(DEADLINE)
        hold.wait(DEADLINE)

    some = looks.Looks(left.append)
    fd = os.open(image, os.O_RDONLY)
    async with trio.open_nursery() as nursery:
        for _ in range(looks.THREADS):
            nursery.start_soon(some.look, fd, hang)
        await trio.to_thread.run_sync(all_in.wait, DEADLINE)
        with trio.move_on_after(0.01):
            await some.look(fd, os.fstat)
        assert len(left) == 1
        opening.close_all([fd])
        os.close(left[0])  # EBADF, if it had
        hold.set()


async def test_what_an_attempt_made_is_the_next_ones_to_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--create on a storage that answers too late."""
    path = tmp_path / "new.img"
    backend = FileBackend(str(path), create=1 << 20)
    real, hold = os.ftruncate, threading.Event()

    def late(fd: int, size: int) -> None:
        hold.wait(DEADLINE)
        real(fd, size)

    with monkeypatch.context() as slow:
        slow.setattr(file_module, "CONNECT_TIMEOUT", 0.2)
        slow.setattr(os, "ftruncate", late)
        with pytest.raises(OSError) as caught:
            await backend.connect()
        assert caught.value.errno == errno.ETIMEDOUT and path.exists()
        hold.set()
    assert (await backend.connect()).size == 1 << 20
    await backend.aclose()
    # Not what somebody else has made meanwhile.
    creation = opening.Creation(1 << 20)
    creation.made = os.stat(path).st_dev, 1
    with pytest.raises(SourceError, match="exists; leave out --create"):
        attempt(path, [], creation).run()


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """ext4 on a loop device over a tmpfs that has no room until `filler` is removed."""
    below, above = tmp_path / "below", tmp_path / "above"
    below.mkdir()
    above.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", below]).returncode:
        pytest.skip("cannot mount a tmpfs")
    try:
        medium, filler = below / "medium", below / "filler"
        with open(medium, "xb") as file:
            file.truncate(64 << 20)
        words = ["mkfs.ext4", "-q", "-O", "^has_journal", "-E", "lazy_itable_init=0", medium]
        subprocess.run(words, check=True, timeout=60)
        if subprocess.run(["mount", "-o", "loop", medium, above]).returncode:
            pytest.skip("cannot mount a loop device")
        try:
            with open(above / "disk.img", "xb") as image:
                image.truncate(1 << 20)
                os.fsync(image.fileno())
            subprocess.run(["sync", "-f", above], check=True, timeout=60)
            with open(filler, "xb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            yield tmp_path
        finally:
            filler.unlink(missing_ok=True)
            subprocess.run(["umount", "--lazy", above], check=True, timeout=60)
    finally:
        subprocess.run(["umount", "--lazy", below], check=True, timeout=60)


@both_queues
async def test_a_flush_tells_of_a_write_that_was_lost_whoever_else_was_told(
    full_disk: Path, use_uring: bool
) -> None:
    """The kernel tells each description once; a write with FUA used it up, and the next FLUSH
    succeeded."""
    above, filler = full_disk / "above", full_disk / "below/filler"
    backend = FileBackend(str(above / "disk.img"), use_uring=use_uring)
    async with connected(backend) as client:
        await client.write(0, b"a" * 65536)
        subprocess.run(["sync", "-f", above], timeout=60)  # the pages are clean now, and lost
        filler.unlink()
        error, _ = await client.do(make_request(Kind.WRITE, 1 << 19, data=bytes(4096), fua=True))
        assert error == errno.ENOSPC
        assert (await client.do(make_request(Kind.FLUSH)))[0] == errno.ENOSPC
        assert (await client.do(make_request(Kind.FLUSH)))[0] == 0
    await backend.aclose()


async def test_threads_that_cannot_be_started_cost_no_request(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the limit of a container, say: those that run do all; without any it is an outage."""
    start, started = threading.Thread.start, 0

    def limited(thread: threading.Thread) -> None:
        nonlocal started
        if thread.name == "healfs-io":
            if started == allowed:
                raise RuntimeError("can't start new thread")
            started += 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    backend = FileBackend(str(image), use_uring=False)
    allowed = 1
    async with connected(backend) as client:
        answers: list[int] = []
        for number in range(8):
            request = make_request(Kind.READ, number * 512, 512)
            backend.submit(request, lambda request, error, data: answers.append(error))
        backend.commit()
        await eventually(lambda: len(answers) == 8)
        assert answers == [0] * 8 and started == 1
        assert (await client.do(make_request(Kind.READ, 0, 512)))[0] == 0
    allowed = started
    await backend.connect()
    backend.submit(make_request(Kind.READ, 0, 512), lambda *_: answers.append(-1))
    backend.commit()
    with trio.fail_after(DEADLINE):
        assert (await backend.serve()).errno == errno.EAGAIN
    assert len(answers) == 8
    allowed += 1
    async with connected(backend) as client:
        assert (await client.do(make_request(Kind.READ, 0, 512)))[0] == 0
