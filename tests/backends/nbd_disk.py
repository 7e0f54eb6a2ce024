"""The NBD backend driven by coroutines, for its tests."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from healfs.backends.base import Geometry
from healfs.backends.nbd import NbdBackend
from healfs.core.request import Kind, Request

MIB = 1 << 20
DEADLINE = 120.0


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
