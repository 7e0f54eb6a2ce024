"""One contract for all backends (healfs/backends/base.py)."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from healfs.backends import opening
from healfs.backends.align import AlignedBackend
from healfs.backends.base import Backend, Geometry
from healfs.backends.fault import FaultBackend
from healfs.backends.file import FileBackend
from healfs.backends.nbd import NbdBackend
from healfs.core.request import Done, Kind, Request
from tests.backends.certificates import Authority
from tests.backends.conftest import DEADLINE, Client, connected, make_request
from tests.backends.nbd_servers import nbdkit, qemu_nbd

SIZE = 1 << 20  # of conftest's image
SPAN = 32 << 10  # where the random operations happen


class Blocks4096(FileBackend):
    """A file that refuses what is not aligned to 4096, as a 4 KiB-sector disk does."""

    async def connect(self) -> Geometry:
        return replace(await super().connect(), minimum_block=4096)

    def submit(self, request: Request, done: Done) -> None:
        if (request.offset | request.length) % 4096:
            done(request, errno.EINVAL, None)
        else:
            super().submit(request, done)


KINDS = [
    "uring",
    "writer",
    "threads",
    "block",
    "block-threads",
    "fault",
    "aligned",
    "nbdkit",
    "qemu-nbd",
    "qemu-nbd-tls",
]


@pytest.fixture(scope="module")
def certificates(authority: Authority) -> Path:
    return authority.directory("contract", "server")


@pytest.fixture(params=KINDS)
async def backend(
    request: pytest.FixtureRequest, image: Path, tmp_path: Path
) -> AsyncIterator[Backend]:
    """Any backend of 1 MiB of zeroes that takes requests of any alignment."""
    kind = request.param
    with ExitStack() as stack:
        made: Backend
        if kind in ("nbdkit", "qemu-nbd"):
            server = nbdkit("file", str(image)) if kind == "nbdkit" else qemu_nbd(image)
            made = AlignedBackend(NbdBackend(stack.enter_context(server).uri()))
        elif kind == "qemu-nbd-tls":
            own: Path = request.getfixturevalue("certificates")
            credentials = f"tls-creds-x509,id=tls0,dir={own},endpoint=server,verify-peer=no"
            options = ("--object", credentials, "--tls-creds", "tls0")
            secure = stack.enter_context(qemu_nbd(image, *options, tcp=True, tls=own))
            made = AlignedBackend(NbdBackend(secure.uri()))
        elif kind.startswith("block"):
            device = request.getfixturevalue("loop_device")
            made = AlignedBackend(FileBackend(device, use_uring=kind == "block"))
        elif kind == "aligned":
            made = AlignedBackend(Blocks4096(str(image)))
        elif kind == "fault":
            rules = tmp_path / "rules.toml"
            rules.write_text("")
            made = FaultBackend(FileBackend(str(image)), str(rules))
        else:
            # Of ext4, writes go to a thread of their own; whatever the file system is here.
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            magic = opening.EXT4 if kind == "writer" else opening.XFS
            patch.setattr(opening, "_file_system", lambda fd: magic)
            made = FileBackend(str(image), use_uring=kind != "threads")
        yield made
        with trio.fail_after(DEADLINE):
            await made.aclose()


async def test_geometry_is_the_same_after_a_reconnect(backend: Backend) -> None:
    first = await backend.connect()
    backend.close()
    second = await backend.connect()
    assert first.size == SIZE
    assert (first.size, first.identity) == (second.size, second.identity)


async def test_what_was_written_is_read(backend: Backend) -> None:
    async with connected(backend) as client:
        await client.write(4096, b"a" * 4096)
        await client.write(5000, bytearray(b"b" * 10), fua=True)
        await client.write(0, memoryview(bytearray(b"c" * 7)))
        assert await client.do(make_request(Kind.FLUSH)) == (0, None)
        data = await client.read(0, 8192 + 1)
    expected = bytearray(8193)
    expected[4096:8192] = b"a" * 4096
    expected[5000:5010] = b"b" * 10
    expected[:7] = b"c" * 7
    assert data == expected


async def test_a_read_of_the_whole_disk(backend: Backend) -> None:
    content = random.Random(1).randbytes(SIZE)
    async with connected(backend) as client:
        await client.write(0, content)
        assert await client.read(0, SIZE) == content
        assert await client.read(1, SIZE - 1) == content[1:]


async def test_many_at_once_are_each_answered_once(backend: Backend) -> None:
    block, count = 1024, 700  # more than the ring has entries
    async with connected(backend) as client:
        writes = [
            # Apart by the largest block: the engine never lets two share one.
            make_request(Kind.WRITE, n * 4096, data=bytes([n % 251]) * block)
            for n in range(SIZE // 4096)
        ]
        client.send(*writes)
        await client.until(lambda: len(client.answers) >= len(writes))
        reads = [make_request(Kind.READ, n % 256 * 4096, block) for n in range(count)]
        client.send(*reads)
        await client.until(lambda: len(client.answers) >= len(writes) + count)
        answers = client.answers
        await client.read(0, 1)  # whatever came twice would have come by now
    assert len(answers) == len(writes) + count + 1
    assert {id(r) for r, _, _ in answers} >= {id(r) for r in writes + reads}
    assert not any(error for _, error, _ in answers)
    for request, _, data in answers[len(writes) : -1]:
        assert data == bytes([request.offset // 4096 % 251]) * block


async def test_done_may_submit_and_commit(backend: Backend) -> None:
    async with connected(backend):
        left = 200
        finished = trio.Event()

        def again(request: Request, error: int, data: object) -> None:
            nonlocal left
            assert error == 0
            left -= 1
            if left:
                backend.submit(make_request(Kind.READ, left * 512, 512), again)
                backend.commit()
            else:
                finished.set()

        backend.submit(make_request(Kind.READ, 0, 512), again)
        backend.commit()
        with trio.fail_after(DEADLINE):
            await finished.wait()


# Not nbdkit: 1.32.5 may die of such a client (an assertion in raw_send_socket).
@pytest.mark.parametrize("backend", [kind for kind in KINDS if kind != "nbdkit"], indirect=True)
async def test_no_answer_after_close(backend: Backend) -> None:
    async with connected(backend) as client:
        for n in range(300):
            kind = Kind.WRITE if n % 2 else Kind.READ
            data = b"x" * 4096 if n % 2 else None
            backend.submit(make_request(kind, n % 256 * 4096, 4096, data=data), client._done)
        backend.commit()
        backend.close()
        before = len(client.answers)
        await client.until(lambda: client.lost is not None)
        async with connected(backend) as second:
            await second.read(0, 4096)
    assert len(client.answers) == before


async def test_close_ends_serve_and_is_idempotent(backend: Backend) -> None:
    async with connected(backend) as client:
        await client.read(0, 1)
        backend.close()
        backend.close()
        await client.until(lambda: client.lost is not None)
    assert isinstance(client.lost, OSError)


async def test_zeroes_and_discard_touch_their_range_only(backend: Backend) -> None:
    ones = b"\1" * (64 << 10)
    async with connected(backend) as client:
        for may_unmap in (True, False):
            await client.write(0, ones)
            zeroes = make_request(Kind.WRITE_ZEROES, 5001, 20001, may_unmap=may_unmap)
            error, _ = await client.do(zeroes)
            assert error == 0 or (
                error == errno.EOPNOTSUPP and not client.geometry.can_write_zeroes
            )
            if not error:
                expected = bytearray(ones)
                expected[5001 : 5001 + 20001] = bytes(20001)
                assert await client.read(0, len(ones)) == expected
        await client.write(0, ones)
        error, _ = await client.do(make_request(Kind.DISCARD, 8191, 8194))
        assert error in (0, errno.EOPNOTSUPP)
        data = await client.read(0, len(ones))
    assert data[:8191] == ones[:8191]
    assert data[8191 + 8194 :] == ones[8191 + 8194 :]


async def test_a_discard_smaller_than_any_block_is_answered(backend: Backend) -> None:
    async with connected(backend) as client:
        await client.write(4096, b"keep")
        error, _ = await client.do(make_request(Kind.DISCARD, 4100, 1))
        assert error in (0, errno.EOPNOTSUPP)
        assert await client.read(4096, 4) == b"keep"


async def test_holes_are_zeroes(backend: Backend) -> None:
    async with connected(backend) as client:
        await client.write(512 << 10, b"\1" * 4096)
        await client.do(make_request(Kind.FLUSH))
        content = await client.read(0, SIZE)
        with trio.fail_after(DEADLINE):
            runs = await backend.extents(100, SIZE - 300)
    if runs is None:
        return
    at = 100
    for run in runs:
        assert run.offset == at and run.length > 0
        if run.hole:
            assert not any(content[at : at + run.length])
        at += run.length
    assert 100 < at <= SIZE - 200


places = st.integers(0, SPAN - 1)
operations = st.lists(
    st.tuples(
        st.sampled_from([*Kind]),
        places,
        st.integers(1, 9000),
        st.booleans(),
        st.integers(1, 255),
    ),
    max_size=30,
)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=operations)
async def test_random_operations_against_a_model(
    backend: Backend, steps: list[tuple[Kind, int, int, bool, int]]
) -> None:
    model = bytearray(os.urandom(SPAN))
    async with connected(backend) as client:
        await client.write(0, bytes(model))
        for kind, offset, length, flag, byte in steps:
            length = min(length, SPAN - offset)
            await _step(client, model, kind, offset, length, flag, byte)
        assert await client.read(0, SPAN) == model


async def _step(
    client: Client, model: bytearray, kind: Kind, offset: int, length: int, flag: bool, byte: int
) -> None:
    end = offset + length
    if kind == Kind.READ:
        assert await client.read(offset, length) == model[offset:end]
    elif kind == Kind.WRITE:
        await client.write(offset, bytearray([byte]) * length, fua=flag)
        model[offset:end] = bytes([byte]) * length
    elif kind == Kind.FLUSH:
        assert (await client.do(make_request(Kind.FLUSH)))[0] == 0
    elif kind == Kind.WRITE_ZEROES:
        request = make_request(kind, offset, length, fua=flag, may_unmap=not flag)
        error, _ = await client.do(request)
        if error:
            assert error == errno.EOPNOTSUPP and not client.geometry.can_write_zeroes
            # The edges may have been zeroed before the backend said no.
            model[offset:end] = await client.read(offset, length)
        else:
            model[offset:end] = bytes(length)
    else:
        error, _ = await client.do(make_request(kind, offset, length))
        assert error in (0, errno.EOPNOTSUPP)
        # A discarded range holds anything; what is around it stays.
        model[offset:end] = await client.read(offset, length)
