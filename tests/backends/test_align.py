"""The align adapter: what the inner backend gets is aligned, and nothing around is changed."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from healfs.backends.align import AlignedBackend
from healfs.backends.base import Geometry
from healfs.backends.file import FileBackend
from healfs.core.request import Done, Kind, Request
from tests.backends.conftest import connected, make_request

BLOCK = 4096


class Blocks(FileBackend):
    """A file in blocks of 4 KiB that records what it gets, and fails where it is told to."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.seen: list[Request] = []
        self.failing: dict[Kind, int] = {}

    async def connect(self) -> Geometry:
        geometry = await super().connect()
        self._pass_on, self.submit = self.submit, self._look  # type: ignore[method-assign]
        return replace(geometry, minimum_block=BLOCK)

    def _look(self, request: Request, done: Done) -> None:
        assert request.offset % BLOCK == request.length % BLOCK == 0, request
        self.seen.append(request)
        if request.kind in self.failing:
            done(request, self.failing[request.kind], None)
        else:
            self._pass_on(request, done)


@pytest.fixture
def inner(image: Path) -> Blocks:
    image.write_bytes(b"\7" * (16 * BLOCK))
    return Blocks(str(image))


def shapes(inner: Blocks) -> list[tuple[str, int, int]]:
    return [(r.kind.name, r.offset // BLOCK, r.length // BLOCK) for r in inner.seen]


async def test_what_is_aligned_goes_through_as_it_is(inner: Blocks) -> None:
    async with connected(AlignedBackend(inner)) as client:
        requests = [
            make_request(Kind.READ, BLOCK, BLOCK),
            make_request(Kind.WRITE, 0, data=bytearray(2 * BLOCK), fua=True),
            make_request(Kind.FLUSH),
            make_request(Kind.WRITE_ZEROES, 0, BLOCK),
        ]
        for request in requests:
            assert (await client.do(request))[0] == 0
    assert all(got is sent for got, sent in zip(inner.seen, requests, strict=True))


@pytest.mark.parametrize(
    ("offset", "length", "reads"),
    [
        (1, 1, [0]),
        (BLOCK - 1, 2, [0, 1]),
        (100, BLOCK, [0, 1]),
        (0, 5, [0]),
        (5, 3 * BLOCK - 5, [0]),
    ],
)
async def test_a_write_reads_its_edges_and_writes_once(
    inner: Blocks, image: Path, offset: int, length: int, reads: list[int]
) -> None:
    expected = bytearray(b"\7" * (16 * BLOCK))
    expected[offset : offset + length] = b"\1" * length
    async with connected(AlignedBackend(inner)) as client:
        await client.write(offset, b"\1" * length, fua=True)
    *before, write = inner.seen
    assert [(r.kind, r.offset // BLOCK) for r in before] == [(Kind.READ, n) for n in reads]
    assert write.kind == Kind.WRITE and write.fua
    assert image.read_bytes() == expected  # noqa: ASYNC240


async def test_a_discard_leaves_its_edges_alone(inner: Blocks) -> None:
    async with connected(AlignedBackend(inner)) as client:
        assert await client.do(make_request(Kind.DISCARD, 1, 3 * BLOCK)) == (0, None)
        assert await client.do(make_request(Kind.DISCARD, 1, BLOCK)) == (0, None)
    assert shapes(inner) == [("DISCARD", 1, 2)]


async def test_zeroes_keep_their_flags_in_the_middle(inner: Blocks) -> None:
    async with connected(AlignedBackend(inner)) as client:
        request = make_request(Kind.WRITE_ZEROES, 1, 3 * BLOCK, fua=True, may_unmap=True)
        assert await client.do(request) == (0, None)
    (middle,) = [r for r in inner.seen if r.kind == Kind.WRITE_ZEROES]
    assert (middle.offset, middle.length) == (BLOCK, 2 * BLOCK)
    assert middle.fua and middle.may_unmap
    assert all(r.fua for r in inner.seen if r.kind == Kind.WRITE)


@pytest.mark.parametrize("kind", [Kind.READ, Kind.WRITE])
async def test_an_error_of_a_part_is_the_error_of_the_whole(inner: Blocks, kind: Kind) -> None:
    inner.failing[kind] = errno.EREMOTEIO
    async with connected(AlignedBackend(inner)) as client:
        write = make_request(Kind.WRITE, 1, data=b"x" * BLOCK)
        assert await client.do(write) == (errno.EREMOTEIO, None)
        zeroes = make_request(Kind.WRITE_ZEROES, 1, 3 * BLOCK)
        assert await client.do(zeroes) == (errno.EREMOTEIO, None)


async def test_a_disk_of_no_whole_blocks_is_cut_and_says_so(image: Path) -> None:
    image.write_bytes(bytes(BLOCK + 10))  # noqa: ASYNC240
    async with connected(AlignedBackend(Blocks(str(image)))) as client:
        assert client.geometry.size == BLOCK
        assert any("left out" in note for note in client.geometry.notes)
        assert client.geometry.minimum_block == BLOCK
