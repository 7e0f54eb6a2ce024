"""The NBD backend against real servers; libnbd is the oracle of what is on the disk."""

# Small files on a local disk: the loop may wait for them.
# ruff: noqa: ASYNC240

from __future__ import annotations

import errno
import os
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import nbd
import pytest
import trio
import trio.testing

from healfs.backends.base import Extent, Geometry, SourceError
from healfs.backends.nbd import PIECE_MAX, NbdBackend
from healfs.core.errors import ErrorClass, classify
from healfs.core.request import Kind, Request
from tests.backends.nbd_servers import NbdServer, nbdkit, qemu_nbd

MIB = 1 << 20
DEADLINE = 30.0


class Disk:
    """A connected backend, driven by coroutines; serve() runs until the connection is lost."""

    def __init__(self, backend: NbdBackend, geometry: Geometry) -> None:
        self.backend = backend
        self.geometry = geometry
        self.lost: OSError | None = None
        self.ended = trio.Event()

    async def serve(self) -> None:
        self.lost = await self.backend.serve()
        self.ended.set()

    async def do(self, *requests: Request) -> list[tuple[int, bytes | None]]:
        """Submit at once, and wait for all answers."""
        answers: dict[Request, tuple[int, bytes | None]] = {}
        event = trio.Event()

        def done(request: Request, error: int, data: object) -> None:
            assert request not in answers, "answered twice"
            answers[request] = error, None if data is None else bytes(data)  # type: ignore[call-overload]
            if len(answers) == len(requests):
                event.set()

        for request in requests:
            self.backend.submit(request, done)
        self.backend.commit()
        await event.wait()
        return [answers[request] for request in requests]

    async def ok(self, *requests: Request) -> bytes:
        answers = await self.do(*requests)
        assert [error for error, _ in answers] == [0] * len(requests)
        return answers[-1][1] or b""


def req(kind: Kind, offset: int = 0, length: int = 0, **more: object) -> Request:
    return Request(kind, offset, length, lambda *_: None, **more)  # type: ignore[arg-type]


def read(offset: int, length: int) -> Request:
    return req(Kind.READ, offset, length)


def write(offset: int, data: bytes, fua: bool = False) -> Request:
    return req(Kind.WRITE, offset, len(data), data=data, fua=fua)


@asynccontextmanager
async def connected(source: str | NbdBackend) -> AsyncIterator[Disk]:
    """A connected disk, within a deadline."""
    backend = NbdBackend(source) if isinstance(source, str) else source
    with trio.fail_after(DEADLINE):
        disk = Disk(backend, await backend.connect())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.serve)
            try:
                yield disk
            finally:
                backend.close()


def pattern(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def oracle(server: NbdServer, offset: int, length: int, export: str = "") -> bytes:
    """What libnbd reads there."""
    handle = nbd.NBD()
    handle.connect_uri(server.uri(export))
    try:
        return bytes(handle.pread(length, offset))
    finally:
        handle.shutdown()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(16 * MIB)
    return path


@pytest.fixture(params=["nbdkit", "nbdkit-tcp", "nbdkit-simple", "nbdkit-old", "qemu", "qemu-tcp"])
def server(request: pytest.FixtureRequest, image: Path) -> Iterator[NbdServer]:
    """Servers with and without structured replies and NBD_OPT_GO, Unix and TCP."""
    make: dict[str, Callable[[], NbdServer]] = {
        "nbdkit": lambda: nbdkit("file", str(image)),
        "nbdkit-tcp": lambda: nbdkit("file", str(image), tcp=True),
        "nbdkit-simple": lambda: nbdkit("--no-sr", "file", str(image)),
        "nbdkit-old": lambda: nbdkit("--mask-handshake=0", "file", str(image)),
        "qemu": lambda: qemu_nbd(image, "--discard=unmap"),
        "qemu-tcp": lambda: qemu_nbd(image, tcp=True),
    }
    with make[request.param]() as running:
        yield running


async def test_what_is_written_is_there(server: NbdServer) -> None:
    big = pattern(2 * PIECE_MAX + 12288)
    async with connected(server.uri()) as disk:
        assert disk.geometry.size == 16 * MIB
        assert disk.geometry.can_flush and disk.geometry.volatile_cache
        await disk.ok(*(write(i * 8192, pattern(4096, i)) for i in range(100)))
        await disk.ok(write(8 * MIB, big), write(MIB, b"fua" * 1024, fua=True))
        await disk.ok(req(Kind.FLUSH))
        assert await disk.ok(read(8 * MIB, len(big))) == big
        answers = await disk.do(*(read(i * 8192, 8192) for i in range(100)))
        assert answers == [(0, pattern(4096, i) + bytes(4096)) for i in range(100)]
    assert oracle(server, 8 * MIB, len(big)) == big
    assert oracle(server, MIB, 3072) == b"fua" * 1024
    assert oracle(server, 99 * 8192, 4096) == pattern(4096, 99)


@pytest.mark.parametrize("may_unmap", [False, True])
async def test_write_zeroes_leaves_zeroes(server: NbdServer, image: Path, may_unmap: bool) -> None:
    async with connected(server.uri()) as disk:
        await disk.ok(write(0, pattern(MIB)))
        zeroes = req(Kind.WRITE_ZEROES, 65536, 131072, may_unmap=may_unmap, fua=True)
        if not disk.geometry.can_write_zeroes:
            assert await disk.do(zeroes) == [(errno.EOPNOTSUPP, None)]
            return
        await disk.ok(zeroes)
    expected = pattern(MIB)[:65536] + bytes(131072) + pattern(MIB)[196608:]
    assert oracle(server, 0, MIB) == expected


async def test_write_zeroes_without_unmap_keeps_the_blocks(image: Path) -> None:
    image.write_bytes(pattern(16 * MIB))
    with nbdkit("file", str(image)) as server:
        async with connected(server.uri()) as disk:
            await disk.ok(req(Kind.WRITE_ZEROES, 0, 8 * MIB), req(Kind.FLUSH))
            assert image.stat().st_blocks * 512 >= 16 * MIB
            await disk.ok(req(Kind.WRITE_ZEROES, 0, 8 * MIB, may_unmap=True), req(Kind.FLUSH))
            assert image.stat().st_blocks * 512 <= 9 * MIB


@pytest.mark.parametrize("discard", ["unmap", "ignore"])
async def test_discard_is_trim(image: Path, discard: str) -> None:
    image.write_bytes(pattern(16 * MIB))
    with qemu_nbd(image, f"--discard={discard}") as server:
        async with connected(server.uri()) as disk:
            assert disk.geometry.can_discard
            await disk.ok(req(Kind.DISCARD, 0, 8 * MIB), req(Kind.FLUSH))
    assert (image.stat().st_blocks * 512 < 16 * MIB) is (discard == "unmap")


async def test_long_requests_are_split_to_the_servers_maximum(image: Path) -> None:
    policy = ["--filter=blocksize-policy", "blocksize-minimum=4096", "blocksize-preferred=4096"]
    policy += ["blocksize-maximum=65536", "blocksize-error-policy=error"]
    with nbdkit(*policy, "file", str(image)) as server:
        async with connected(server.uri()) as disk:
            assert disk.geometry.minimum_block == 4096
            assert disk.geometry.maximum_payload == 65536
            data = pattern(MIB)
            await disk.ok(write(0, data))
            assert await disk.ok(read(0, MIB)) == data
            await disk.ok(req(Kind.WRITE_ZEROES, 4096, MIB - 4096), req(Kind.DISCARD, MIB, MIB))
    assert image.read_bytes()[:MIB] == data[:4096] + bytes(MIB - 4096)


async def test_a_long_request_fails_once_and_whole(image: Path) -> None:
    with nbdkit(
        "--filter=error", "error-pwrite=EIO", "error-pwrite-rate=100%", "file", str(image)
    ) as server:
        async with connected(server.uri()) as disk:
            answers = await disk.do(write(0, bytes(16 * MIB)), read(0, 16 * MIB))
            assert [error for error, _ in answers] == [errno.EIO, 0]


async def test_size_is_rounded_down_to_the_minimum_block(tmp_path: Path) -> None:
    policy = ["--filter=blocksize-policy", "blocksize-minimum=4096", "blocksize-preferred=4096"]
    with nbdkit(*policy, "memory", "1048577") as server:
        async with connected(server.uri()) as disk:
            assert disk.geometry.size == MIB


async def test_fua_without_nbds_fua_is_write_and_flush(image: Path, tmp_path: Path) -> None:
    log = tmp_path / "calls"
    filters = ["--filter=log", "--filter=fua", "fuamode=none", f"logfile={log}"]
    with nbdkit(*filters, "file", str(image)) as server:
        async with connected(server.uri()) as disk:
            assert not disk.geometry.can_fua
            await disk.ok(write(0, pattern(4096), fua=True))
    calls = [line.split()[3] for line in log.read_text().splitlines() if " connection=" in line]
    assert calls.index("Write") < calls.index("Flush")


async def test_fua_is_the_flag_where_the_server_has_it(image: Path, tmp_path: Path) -> None:
    log = tmp_path / "calls"
    filters = ["--filter=log", "--filter=fua", "fuamode=force", f"logfile={log}"]
    with nbdkit(*filters, "file", str(image)) as server:
        async with connected(server.uri()) as disk:
            await disk.ok(write(0, pattern(4096), fua=True), write(4096, pattern(4096)))
    writes = [line for line in log.read_text().splitlines() if " Write " in line]
    assert "fua=1" in writes[0] and "fua=0" in writes[1] and "Flush" not in log.read_text()


async def test_a_server_without_flush_is_named(image: Path) -> None:
    with nbdkit("sh", str(_sh_plugin(image.parent, "exit 3"))) as server:
        async with connected(server.uri()) as disk:
            assert not disk.geometry.can_flush and not disk.geometry.volatile_cache
            assert disk.geometry.notes
            assert await disk.do(req(Kind.FLUSH), req(Kind.DISCARD, 0, 512)) == [
                (0, None),
                (errno.EOPNOTSUPP, None),
            ]


def _sh_plugin(directory: Path, size: str) -> Path:
    """A read-only export of nbdkit's sh plugin; `size` is what get_size does."""
    script = directory / "plugin.sh"
    size = size if size != "exit 3" else "echo 1048576"
    script.write_text(
        "#!/bin/sh\ncase $1 in\n"
        f"get_size) {size} ;;\n"
        "pread) head -c $3 /dev/zero ;;\n"
        "*) exit 2 ;;\nesac\n"
    )
    script.chmod(0o755)
    return script


@pytest.mark.parametrize("sr", [(), ("--no-sr",)])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("EPERM", errno.EPERM),
        ("EIO", errno.EIO),
        ("ENOMEM", errno.ENOMEM),
        ("EINVAL", errno.EINVAL),
        ("ENOSPC", errno.ENOSPC),
        ("ESHUTDOWN", errno.ESHUTDOWN),
    ],
)
async def test_server_errors_come_through(sr: tuple[str, ...], name: str, expected: int) -> None:
    with nbdkit(
        *sr, "--filter=error", f"error={name}", "error-rate=100%", "memory", "1M"
    ) as server:
        async with connected(server.uri()) as disk:
            answers = await disk.do(
                read(0, 4096), write(0, bytes(4096)), req(Kind.WRITE_ZEROES, 0, 4096)
            )
            assert answers == [(expected, None)] * 3
            assert disk.lost is None, "an error is an answer, not a loss"


async def test_a_sparse_read_is_put_together(image: Path) -> None:
    with image.open("r+b") as file:
        for i in range(0, 16, 2):
            os.pwrite(file.fileno(), pattern(65536, i), i * 65536)
    with qemu_nbd(image) as server:
        async with connected(server.uri()) as disk:
            assert await disk.ok(read(0, MIB)) == image.read_bytes()[:MIB]


async def _runs(disk: Disk, end: int) -> list[Extent]:
    """All runs, asked for one after the other, as SEEK_DATA and SEEK_HOLE do."""
    runs: list[Extent] = []
    offset = 0
    while offset < end:
        found = await disk.backend.extents(offset, end - offset)
        assert found and found[0].offset == offset
        runs.append(found[0])
        offset += found[0].length
    return runs


@pytest.mark.parametrize("which", ["qemu", "nbdkit"])
async def test_extents_are_datas_and_holes(image: Path, which: str) -> None:
    with image.open("r+b") as file:
        os.pwrite(file.fileno(), pattern(MIB), 2 * MIB)
        os.pwrite(file.fileno(), pattern(MIB), 15 * MIB)
    server = qemu_nbd(image) if which == "qemu" else nbdkit("file", str(image))
    with server:
        async with connected(server.uri()) as disk:
            runs = await _runs(disk, 16 * MIB)
            inside = await disk.backend.extents(2 * MIB + 100, 7)
    assert [(run.offset // MIB, run.length // MIB, run.hole) for run in runs] == [
        (0, 2, True),
        (2, 1, False),
        (3, 12, True),
        (15, 1, False),
    ]
    assert inside == [Extent(2 * MIB + 100, 7, False)]


@pytest.mark.parametrize("options", [("--no-sr",), ("--mask-handshake=0",)])
async def test_no_extents_where_the_server_cannot_tell(options: tuple[str, ...]) -> None:
    with nbdkit(*options, "memory", "1M") as server:
        async with connected(server.uri()) as disk:
            assert await disk.backend.extents(0, MIB) is None


async def test_noextents_is_all_data() -> None:
    with nbdkit("--filter=noextents", "memory", "1M") as server:
        async with connected(server.uri()) as disk:
            assert await disk.backend.extents(0, MIB) == [Extent(0, MIB, False)]


@pytest.mark.parametrize("tcp", [False, True])
async def test_kill_in_flight_is_lost_and_reconnect_goes_on(image: Path, tcp: bool) -> None:
    delay = ["--filter=delay", "delay-read=60"]
    with nbdkit(*delay, "file", str(image), tcp=tcp) as server:
        backend = NbdBackend(server.uri())
        answered: list[Request] = []
        requests = [read(i * 4096, 4096) for i in range(16)]
        async with connected(backend) as disk:
            await disk.ok(write(0, pattern(4096)))
            for request in requests:
                backend.submit(request, lambda request, *_: answered.append(request))
            backend.commit()
            server.kill()
            await disk.ended.wait()
            assert disk.lost is not None
            assert classify(disk.lost.errno or 0) is ErrorClass.LOST
            assert backend.sent_any() == set(requests)
            with pytest.raises(OSError) as away:
                await backend.connect()
            assert not isinstance(away.value, SourceError)
        server.start()
        async with connected(backend) as disk:
            await disk.ok(write(4096, pattern(4096, 2)))
        assert answered == []
    assert image.read_bytes()[:8192] == pattern(4096) + pattern(4096, 2)


async def test_what_the_socket_did_not_take_is_known() -> None:
    """SIGSTOP fills the socket; the rest goes when the server goes on, or never went."""
    with nbdkit("memory", "256M") as server:
        backend = NbdBackend(server.uri())
        async with connected(backend) as disk:
            await disk.ok(write(0, pattern(4096)))
            server.pause()
            writes = [write(i * MIB, pattern(MIB, i)) for i in range(64)]
            for request in writes:
                backend.submit(request, lambda *_: None)
            backend.commit()
            backend.close()
            sent = backend.sent_any()
            assert writes[0] in sent and writes[-1] not in sent
            assert sent == set(writes[: len(sent)])
            server.resume()
        async with connected(backend) as disk:
            assert backend.sent_any() == set()
            server.pause()
            await trio.lowlevel.checkpoint()
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(disk.ok, *writes)
                    await trio.testing.wait_all_tasks_blocked()
                    assert len(backend._link.protocol.out) > 1  # type: ignore[union-attr]
                    server.resume()
            assert not scope.cancelled_caught
            assert await disk.ok(read(63 * MIB, MIB)) == pattern(MIB, 63)
