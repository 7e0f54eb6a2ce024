"""The NBD backend against real servers; libnbd is the oracle of what is on the disk."""

# Small files on a local disk: the loop may wait for them.
# ruff: noqa: ASYNC240

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import nbd
import pytest

from healfs.backends import nbd_protocol as proto
from healfs.backends.base import Extent
from healfs.backends.nbd import PIECE_MAX, PIECES_IN_FLIGHT, NbdBackend
from healfs.core.request import Kind
from tests.backends.nbd_disk import MIB, Disk, connected, pattern, read, req, write
from tests.backends.nbd_servers import NbdServer, nbdkit, qemu_nbd


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


def _lengths(log: Path, call: str) -> list[int]:
    """The lengths of the calls that nbdkit's log filter saw."""
    lines = [line for line in log.read_text().splitlines() if f" {call} " in line]
    return [int(found[1], 16) for line in lines if (found := re.search(r"count=0x(\w+)", line))]


async def test_long_requests_are_split_to_the_servers_maximum(image: Path, tmp_path: Path) -> None:
    policy = ["blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=65536"]
    policy += ["blocksize-error-policy=error"]
    log = tmp_path / "calls"
    filters = ["--filter=log", "--filter=blocksize-policy"]
    with nbdkit(*filters, "file", str(image), *policy, f"logfile={log}") as server:
        async with connected(server.uri()) as disk:
            assert disk.geometry.minimum_block == 4096
            assert disk.geometry.maximum_payload == 65536
            data = pattern(MIB)
            await disk.ok(write(0, data))
            assert await disk.ok(read(0, MIB)) == data
            await disk.ok(req(Kind.WRITE_ZEROES, 4096, MIB - 4096), req(Kind.DISCARD, MIB, MIB))
    assert image.read_bytes()[:MIB] == data[:4096] + bytes(MIB - 4096)
    for call, total in {"Write": MIB, "Read": MIB, "Zero": MIB - 4096, "Trim": MIB}.items():
        lengths = _lengths(log, call)
        assert sum(lengths) == total and max(lengths) == 65536, call


async def test_a_long_request_fails_once_and_sends_no_more(image: Path, tmp_path: Path) -> None:
    log = tmp_path / "calls"
    error = ["error-pwrite=EIO", "error-pwrite-rate=100%"]
    filters = ["--filter=log", "--filter=error"]
    with nbdkit(*filters, "file", str(image), *error, f"logfile={log}") as server:
        async with connected(server.uri()) as disk:
            answers = await disk.do(write(0, bytes(16 * MIB)), read(0, 16 * MIB))
            assert [error for error, _ in answers] == [errno.EIO, 0]
    assert len(_lengths(log, "Write")) == PIECES_IN_FLIGHT


async def test_size_is_rounded_down_to_the_minimum_block(tmp_path: Path) -> None:
    policy = ["blocksize-minimum=4096", "blocksize-preferred=4096"]
    with nbdkit("--filter=blocksize-policy", "memory", "1048577", *policy) as server:
        async with connected(server.uri()) as disk:
            assert disk.geometry.size == MIB


async def test_fua_without_nbds_fua_is_write_and_flush(image: Path, tmp_path: Path) -> None:
    log = tmp_path / "calls"
    filters = ["--filter=log", "--filter=fua"]
    with nbdkit(*filters, "file", str(image), f"logfile={log}") as server:
        async with connected(server.uri()) as disk:
            assert not disk.geometry.can_fua
            await disk.ok(write(0, pattern(4096), fua=True))
    calls = [line.split()[3] for line in log.read_text().splitlines() if " connection=" in line]
    assert calls.index("Write") < calls.index("Flush")


async def test_fua_is_the_flag_where_the_server_has_it(image: Path, tmp_path: Path) -> None:
    log = tmp_path / "calls"
    filters = ["--filter=log", "--filter=fua"]
    with nbdkit(*filters, "file", str(image), "fuamode=native", f"logfile={log}") as server:
        async with connected(server.uri()) as disk:
            # One after the other: nbdkit's threads may log two in any order.
            await disk.ok(write(0, pattern(4096), fua=True))
            await disk.ok(write(4096, pattern(4096)))
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
    error = [f"error={name}", "error-rate=100%"]
    with nbdkit(*sr, "--filter=error", "memory", "1M", *error) as server:
        async with connected(server.uri()) as disk:
            answers = await disk.do(
                read(0, 4096), write(0, bytes(4096)), req(Kind.WRITE_ZEROES, 0, 4096)
            )
            possible = errno.EIO if expected == errno.EINVAL else expected
            assert answers == [(possible, None), (possible, None), (expected, None)]
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


async def test_a_long_name_is_known_by_its_hash() -> None:
    """What is kept beside the write log of a server's words has little room."""
    one, other = (proto.Export(size=1 << 20, name="e", description="д" * 2047 + c) for c in "ab")
    backend = NbdBackend("nbd://localhost/")
    first, second = (backend._geometry(export).identity for export in (one, other))
    assert first["description"] != second["description"]
    assert len(first["description"].encode()) < 256 and first["description"].startswith("ддд")
    assert first["export"] == "e"
