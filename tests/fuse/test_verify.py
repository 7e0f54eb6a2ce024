"""No error and no wrong byte: fio through outages, and random operations against a model."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.backends.nbd_servers import NbdServer, nbdkit, qemu_nbd
from tests.conftest import Mounter
from tests.fuse.agent import KEEP_SIZE, PUNCH, ZERO_RANGE, Agent
from tests.fuse.control import Control, control
from tests.mounts import HealfsMount

MIB = 1 << 20
SERVERS = {"nbdkit": lambda path: nbdkit("file", str(path)), "qemu-nbd": qemu_nbd}


def _fio(file: Path, megabytes: int) -> subprocess.Popen[str]:
    """Write every block once at random, then read it back and compare checksums."""
    return subprocess.Popen(
        [
            *("setpriv", "--pdeathsig", "KILL", "timeout", "-s", "KILL", "1500"),
            *("fio", "--name=verify", f"--filename={file}", "--allow_file_create=0"),
            *("--ioengine=libaio", "--direct=1", "--invalidate=0", "--fallocate=none"),
            *("--rw=randwrite", "--bsrange=4k-64k", f"--size={megabytes}M", "--iodepth=32"),
            *(
                "--verify=crc32c",
                "--verify_state_save=0",
                "--verify_fatal=1",
                "--verify_backlog=512",
                "--fsync=256",
            ),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _done(status: dict[str, Any]) -> int:
    return int(status["totals"]["read"]["bytes"] + status["totals"]["write"]["bytes"])


def _until_done(disk: Control, mark: int) -> None:
    disk.until(lambda status: _done(status) >= mark, 400)


def _outage(disk: Control, server: NbdServer) -> None:
    """kill -9 in full flight; back when something waits (all 32, or the fsync between them)."""
    server.kill()
    disk.until(lambda status: status["requests"]["parked"] >= 1)
    server.start()


def through_outages(
    tmp_path: Path,
    healfs_mount: Mounter,
    serve: Callable[[Path], NbdServer],
    outages: int,
    megabytes: int,
) -> None:
    """fio finds what it wrote, on an image that `serve` serves and that dies so often."""
    path = tmp_path / "verified.img"
    with open(path, "xb") as file:
        file.truncate(megabytes * MIB)
    with serve(path) as server:
        mount = healfs_mount(server.uri(), "--slow-after", "1h")  # each outage is one of these
        with control(mount) as disk:
            load = _fio(mount.file, megabytes)
            try:
                for number in range(1, outages + 1):
                    # Spread over the whole run, of which half are writes and half are reads.
                    mark = 2 * megabytes * MIB * number // (outages + 1)
                    _until_done(disk, mark)
                    _outage(disk, server)
                said, _ = load.communicate(timeout=800)
                assert load.returncode == 0, said
            finally:
                load.kill()
                load.communicate()
            status = disk.status()
        assert status["outages"]["count"] == outages
        assert _done(status) >= 2 * megabytes * MIB
        assert not any(status["totals"][kind]["errors"] for kind in ("read", "write", "flush"))


@pytest.mark.parametrize("kind", SERVERS)
def test_fio_verifies_through_three_outages(
    tmp_path: Path, healfs_mount: Mounter, kind: str
) -> None:
    through_outages(tmp_path, healfs_mount, SERVERS[kind], 3, 128)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", SERVERS)
def test_fio_verifies_through_a_dozen_outages(
    tmp_path: Path, healfs_mount: Mounter, kind: str
) -> None:
    through_outages(tmp_path, healfs_mount, SERVERS[kind], 12, 768)


# --- random operations against a model ---------------------------------------------------------

DISK = 192 << 10
FLAGS = [0, os.O_DIRECT, os.O_DSYNC, os.O_SYNC, os.O_DIRECT | os.O_DSYNC]

_offset = st.one_of(
    st.integers(0, DISK - 1), st.integers(0, DISK // 4096 - 1).map(lambda block: block * 4096)
)
_length = st.one_of(st.integers(1, 70_000), st.sampled_from([1, 511, 512, 4096, 65536]))
_operation = st.one_of(
    st.tuples(st.just("pwrite"), _offset, _length, st.integers(1, 255)),
    st.tuples(st.just("pwrite"), _offset, _length, st.integers(1, 255)),
    st.tuples(st.just("pread"), _offset, _length),
    st.tuples(st.just("fallocate"), st.sampled_from([PUNCH, ZERO_RANGE]), _offset, _length),
    st.tuples(st.just("fallocate"), st.just(ZERO_RANGE | KEEP_SIZE), _offset, _length),
    st.tuples(st.just("fsync")),
    st.tuples(st.just("fdatasync")),
    st.tuples(st.just("reopen"), st.sampled_from(FLAGS)),
    st.tuples(st.just("outage")),
)


@contextmanager
def _backend(kind: str, path: Path) -> Iterator[tuple[str, NbdServer | None]]:
    if kind == "file":
        yield str(path), None
        return
    with SERVERS[kind](path) as server:
        yield server.uri(), server


class Model:
    """The disk, and what a plain file would hold after the same operations."""

    def __init__(self, agent: Agent, server: NbdServer | None) -> None:
        self.agent = agent
        self.server = server
        self.bytes = bytearray()

    def begin(self) -> None:
        self.agent.ok("reopen", os.O_RDWR)
        self.agent.ok("pwrite", 0, bytes(DISK))
        self.bytes = bytearray(DISK)

    def do(self, operation: tuple[Any, ...]) -> None:
        match operation:
            case "pwrite", offset, length, byte:
                data = bytes((byte + i // 512) % 256 for i in range(length))
                answer = self.agent.do("pwrite", offset, data)
                if offset + length > DISK:
                    # A disk does not grow; what a write past its end does is all or nothing.
                    assert answer.errno == errno.ENOSPC
                else:
                    assert answer.value == length
                    self.bytes[offset : offset + length] = data
            case "pread", offset, length:
                expected = self.bytes[offset : offset + length]
                assert self.agent.ok("pread", offset, length) == expected
            case "fallocate", mode, offset, length:
                answer = self.agent.do("fallocate", mode, offset, length)
                if offset + length > DISK and not mode & KEEP_SIZE:
                    assert answer.errno == errno.ENOSPC
                else:
                    assert answer.errno == 0
                    end = min(DISK, offset + length)
                    self.bytes[offset:end] = bytes(end - offset)
            case "reopen", flags:
                self.agent.ok("reopen", os.O_RDWR | flags)
            case ("outage",):
                if self.server is not None:
                    self.server.kill()
                    self.server.spawn()
            case (call,):
                self.agent.ok(call)

    def end(self, path: Path) -> None:
        self.agent.ok("fsync")
        assert self.agent.ok("pread", 0, DISK) == self.bytes
        # The server's own file: what was flushed is there, whoever reads it.
        assert path.read_bytes() == self.bytes


def _random_operations(kind: str, tmp_path: Path, healfs_mount: Mounter, examples: int) -> None:
    path = tmp_path / "model.img"
    with open(path, "xb") as file:
        file.truncate(DISK)
    with _backend(kind, path) as (source, server):
        mount: HealfsMount = healfs_mount(source)
        agent = Agent(mount.file)
        model = Model(agent, server)

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(_operation, min_size=5, max_size=25))
        def run(operations: list[tuple[Any, ...]]) -> None:
            model.begin()
            for operation in operations:
                model.do(operation)
            model.end(path)

        try:
            run()
            assert mount.status()["state"] == "ready"
        finally:
            agent.kill()
            agent.ended()


KINDS = ["file", *SERVERS]


@pytest.mark.parametrize("kind", KINDS)
def test_random_operations(kind: str, tmp_path: Path, healfs_mount: Mounter) -> None:
    _random_operations(kind, tmp_path, healfs_mount, 20)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_many_random_operations(kind: str, tmp_path: Path, healfs_mount: Mounter) -> None:
    _random_operations(kind, tmp_path, healfs_mount, 600)


# --- holes --------------------------------------------------------------------------------------


def _runs(seek: Any) -> list[tuple[int, int]]:
    """The data of a file as (begin, end), by SEEK_DATA and SEEK_HOLE."""
    found: list[tuple[int, int]] = []
    offset = 0
    while True:
        begin = seek(offset, os.SEEK_DATA)
        if begin is None:
            return found
        offset = seek(begin, os.SEEK_HOLE)
        found.append((begin, offset))


@pytest.mark.parametrize("kind", KINDS)
def test_holes_are_where_the_backend_has_them(
    kind: str, tmp_path: Path, healfs_mount: Mounter
) -> None:
    path = tmp_path / "holes.img"
    with open(path, "xb") as file:
        file.truncate(8 * MIB)
    with _backend(kind, path) as (source, _):
        mount = healfs_mount(source)
        agent = Agent(mount.file)
        try:
            for offset in (0, 2 * MIB, 8 * MIB - 65536):
                agent.ok("pwrite", offset, b"x" * 65536)
            agent.ok("pwrite", 4 * MIB, b"x" * MIB)
            agent.ok("fallocate", PUNCH, 4 * MIB + 65536, MIB - 65536)
            agent.ok("fsync")

            def seek(offset: int, whence: int) -> int | None:
                answer = agent.do("lseek", offset, whence)
                assert answer.errno in (0, errno.ENXIO)
                return None if answer.errno else answer.value

            with open(path, "rb") as backing:

                def plain(offset: int, whence: int) -> int | None:
                    try:
                        return os.lseek(backing.fileno(), offset, whence)
                    except OSError:
                        return None

                expected = _runs(plain)
            assert len(expected) > 1, "the file system of tmp_path has no holes"
            assert _runs(seek) == expected
            assert seek(8 * MIB, os.SEEK_DATA) is None
            assert seek(0, os.SEEK_END) == 8 * MIB
        finally:
            agent.kill()
            agent.ended()


def test_holes_in_an_outage_are_not_waited_for(tmp_path: Path, healfs_mount: Mounter) -> None:
    """That all is data, with a hole at the end, is always a legal answer."""
    path = tmp_path / "holes.img"
    with open(path, "xb") as file:
        file.truncate(MIB)
    with nbdkit("file", str(path)) as server:
        mount = healfs_mount(server.uri())
        agent = Agent(mount.file)
        try:
            server.kill()
            assert agent.ok("lseek", 4096, os.SEEK_DATA) == 4096
            assert agent.ok("lseek", 4096, os.SEEK_HOLE) == MIB
        finally:
            agent.kill()
            agent.ended()
