"""Requests of any alignment on a backend that takes whole blocks only.

READ: the covering blocks are read and cut. WRITE: the blocks at the edges are read, changed and
written whole. WRITE_ZEROES: the edges are written, the middle goes as it is. DISCARD: the edges
are left alone. The engine never has two write-like requests in flight that share a block.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace

from healfs.backends.base import Backend, Extent, Geometry, Polled
from healfs.core.request import Done, Kind, Request

SECTOR = 512  # what every guest counts a disk in

Data = memoryview | bytes | bytearray | None


def _unanswered(request: Request, error: int, data: Data) -> None:
    """A part of a request is nobody's to answer: its `done` comes by submit."""


class AlignedBackend(Backend):
    """Wraps `inner`; what it knows of geometry, settle time and extents is the inner one's."""

    def __init__(self, inner: Backend) -> None:
        self._inner = inner
        self.source = inner.source
        self.settle = inner.settle
        self.ambiguous = inner.ambiguous
        self._block = 1
        self._mask = 0
        self._answers: list[tuple[Request, Done]] = []  # DISCARDs of less than a block

    def resumed(self) -> None:
        self._inner.resumed()

    async def connect(self) -> Geometry:
        """As the inner one's; minimum_block stays, for the engine's ordering."""
        self._answers.clear()
        geometry = await self._inner.connect()
        if (rest := geometry.size % SECTOR) and geometry.minimum_block < SECTOR:
            text = f"its size is no multiple of {SECTOR}: a guest may not see the last {rest} bytes"
            geometry = replace(geometry, notes=(*geometry.notes, text))
        self._block = geometry.minimum_block
        self._mask = self._block - 1
        if self._block == 1:
            # Nothing to do here: a call saved for each request.
            self.submit = self._inner.submit  # type: ignore[method-assign]
            self.commit = self._inner.commit  # type: ignore[method-assign]
            return geometry
        self.__dict__.pop("submit", None)
        self.__dict__.pop("commit", None)
        notes = geometry.notes
        size = geometry.size - geometry.size % self._block
        if size != geometry.size:
            notes += (f"the last {geometry.size - size} bytes are no whole block: left out",)
        payload = max(geometry.maximum_payload - 2 * self._block, self._block)
        return replace(geometry, size=size, maximum_payload=payload, notes=notes)

    async def serve(self) -> OSError:
        return await self._inner.serve()

    def submit(self, request: Request, done: Done) -> None:
        if not (request.offset | request.length) & self._mask:
            self._inner.submit(request, done)
        elif request.kind == Kind.READ:
            self._read(request, done)
        elif request.kind == Kind.WRITE:
            self._write(request, done)
        else:
            self._without_edges(request, done)

    def commit(self) -> None:
        answers, self._answers = self._answers, []
        for request, done in answers:
            done(request, 0, None)
        self._inner.commit()

    @property
    def polled(self) -> Polled | None:
        return self._inner.polled

    @property
    def heard(self) -> float:
        return self._inner.heard

    def close(self) -> None:
        self._answers.clear()
        self._inner.close()

    async def probe(self) -> str:
        return await self._inner.probe()

    def taken(self, request: Request) -> bool:
        if (request.offset | request.length) & self._mask:
            return True  # nobody has looked at its parts
        return self._inner.taken(request)

    async def aclose(self) -> None:
        self._answers.clear()
        await self._inner.aclose()

    async def wait_changed(self) -> None:
        await self._inner.wait_changed()

    async def extents(self, offset: int, length: int) -> list[Extent] | None:
        start, end = self._cover(offset, length)
        found = await self._inner.extents(start, end - start)
        if found is None:
            return None
        runs = []
        for run in found:
            first = max(run.offset, offset)
            last = min(run.offset + run.length, offset + length)
            if first < last:
                runs.append(Extent(first, last - first, run.hole))
        return runs

    def _cover(self, offset: int, length: int) -> tuple[int, int]:
        return offset - offset % self._block, -(-(offset + length) // self._block) * self._block

    def _read(self, request: Request, done: Done) -> None:
        start, end = self._cover(request.offset, request.length)
        skip = request.offset - start

        def cut(part: Request, error: int, data: Data) -> None:
            if error or data is None:
                done(request, error or errno.EIO, None)
            else:
                done(request, 0, memoryview(data)[skip : skip + request.length])

        self._inner.submit(Request(Kind.READ, start, end - start, _unanswered), cut)

    def _write(self, request: Request, done: Done) -> None:
        start, end = self._cover(request.offset, request.length)
        if request.data is None:
            self._inner.submit(request, done)  # it says what is wrong
            return
        payload = request.data
        blocks = bytearray(end - start)
        edges = set()
        if request.offset != start:
            edges.add(start)
        if request.offset + request.length != end:
            edges.add(end - self._block)

        def write(error: int) -> None:
            if error:
                done(request, error, None)
                return
            skip = request.offset - start
            blocks[skip : skip + request.length] = payload
            whole = Request(
                Kind.WRITE, start, end - start, _unanswered, data=blocks, fua=request.fua
            )
            self._inner.submit(whole, lambda _part, error, _data: done(request, error, None))
            self._inner.commit()

        joined = _join(len(edges), write)

        def keep(part: Request, error: int, data: Data) -> None:
            if not error and data is not None:
                at = part.offset - start
                blocks[at : at + self._block] = data
            joined(error)

        for edge in sorted(edges):
            self._inner.submit(Request(Kind.READ, edge, self._block, _unanswered), keep)

    def _without_edges(self, request: Request, done: Done) -> None:
        offset, end = request.offset, request.offset + request.length
        first = -(-offset // self._block) * self._block
        last = end - end % self._block
        parts: list[Request] = []
        if first < last:
            parts.append(self._part(request, request.kind, first, last))
        if request.kind == Kind.WRITE_ZEROES:
            if first > last:  # inside one block
                parts.append(self._part(request, Kind.WRITE, offset, end))
            else:
                if offset < first:
                    parts.append(self._part(request, Kind.WRITE, offset, first))
                if last < end:
                    parts.append(self._part(request, Kind.WRITE, last, end))
        if not parts:
            self._answers.append((request, done))
            return
        joined = _join(len(parts), lambda error: done(request, error, None))
        for part in parts:
            self.submit(part, lambda _part, error, _data: joined(error))

    @staticmethod
    def _part(whole: Request, kind: Kind, start: int, end: int) -> Request:
        return Request(
            kind,
            start,
            end - start,
            _unanswered,
            data=bytes(end - start) if kind == Kind.WRITE else None,
            fua=whole.fua,
            may_unmap=whole.may_unmap,
        )


def _join(count: int, done: Callable[[int], None]) -> Callable[[int], None]:
    """A function to be called `count` times; at the last, done gets the first error or 0."""
    left, first_error = count, 0

    def one(error: int) -> None:
        nonlocal left, first_error
        left -= 1
        first_error = first_error or error
        if not left:
            done(first_error)

    return one
