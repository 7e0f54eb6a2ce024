# cython: annotation_typing=False
"""Request: the one currency of the house, from the channel to the backend and back."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

from healfs.core.kind import Kind as Kind
from healfs.core.overlap import Range


class Phase(enum.IntEnum):
    """Where a request is. A request is answered exactly once (promise 1)."""

    NEW = 0
    WAITING = 1  # behind an older overlapping write
    PARKED = 2  # accepted, to be sent when the backend is there
    IN_FLIGHT = 3  # handed to the backend
    DONE = 4  # answered and out of the backend's hands


NEW = Phase.NEW  # looked up once

# FUSE sets bit 63 of the unique id of a request that comes again; the rest is as it was.
TAG_MASK = (1 << 63) - 1

# What becomes of a request: (request, errno or 0, the bytes read or None). The bytes are only
# valid until the callback returns: whoever wants them later copies them.
Done = Callable[["Request", int, "memoryview | bytes | bytearray | None"], None]


class Request(Range):
    """One request: offset and length in bytes, any alignment.

    `data` is the payload of a WRITE and must stay as it is until the engine lets it go.
    `fua` asks that the write be on stable storage before it is answered; `may_unmap` allows a
    WRITE_ZEROES to deallocate. The fields below the line belong to the engine.
    """

    __slots__ = (
        "answered",
        "arrived",
        "attempts",
        "blockers",
        "caller",
        "completed",
        "data",
        "errno",
        "first_error",
        "fua",
        "indexed",
        "internal",
        "kind",
        "length",
        "may_unmap",
        "offset",
        "on_answer",
        "order",
        "origin",
        "owner",
        "phase",
        "process",
        "record",
        "retry_at",
        "sent",
        "tag",
        "waiters",
    )

    def __init__(
        self,
        kind: Kind,
        offset: int,
        length: int,
        on_answer: Done,
        *,
        data: memoryview | bytes | bytearray | None = None,
        fua: bool = False,
        may_unmap: bool = False,
        tag: int = 0,
        owner: Any = None,
    ) -> None:
        self._fill(kind, offset, length, on_answer, data, fua, may_unmap, tag, owner)

    def _fill(
        self,
        kind: Kind,
        offset: int,
        length: int,
        on_answer: Done,
        data: memoryview | bytes | bytearray | None,
        fua: bool,
        may_unmap: bool,
        tag: int,
        owner: Any,
    ) -> None:
        self.kind = kind
        self.offset = offset
        self.length = length
        self.on_answer = on_answer
        self.data = data
        self.fua = fua
        self.may_unmap = may_unmap
        self.tag = tag  # the frontend's name for it (FUSE: the unique id)
        self.owner: Any = owner  # the frontend's own (the payload's slot, the caller)
        self.caller = 0  # thread id of who asked
        self.process: int | None = None  # its process, as far as it was looked up
        # --- the engine's ---
        self.phase: Phase = NEW
        self.answered = False
        self.order = 0
        self.arrived = 0.0
        self.sent = 0.0
        self.first_error = 0.0
        self.errno = 0
        self.attempts = 0
        self.retry_at = 0.0
        self.blockers = 0
        self.waiters: list[Request] | None = None
        self.indexed = False
        self.record = -1  # in the write log's table
        self.completed = 0  # a write: its number among the completions; a flush: its mark
        self.internal = False  # the engine's own: a flush, a piece of a replay
        self.origin: Request | None = None  # the entry that a piece of a replay is of
        self.start = offset  # the range that counts for the order: whole minimum blocks
        self.end = offset + length

    def __repr__(self) -> str:
        fua = " FUA" if self.fua else ""
        return f"<{self.kind.name} {self.offset}+{self.length}{fua} {self.phase.name.lower()}>"


def transfer(
    kind: Kind,
    offset: int,
    length: int,
    on_answer: Done,
    data: memoryview | bytearray | None,
    fua: bool,
    tag: int,
    owner: Any,
) -> Request:
    """A READ or a WRITE: Request(...) for a compiler, which boxes the arguments of a class."""
    request: Request = Request.__new__(Request)
    request._fill(kind, offset, length, on_answer, data, fua, False, tag, owner)
    return request


def oldest_first(again: list[Request]) -> list[Request]:
    """What the kernel sends again comes in no useful order; its ids have the first one."""
    return sorted(again, key=_first_tag)


def _first_tag(request: Request) -> int:
    return request.tag & TAG_MASK
