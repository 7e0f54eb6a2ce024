# cython: annotation_typing=False
"""The NBD client protocol without I/O (nbd/doc/proto.md), its transmission phase.

`Transmission` frames commands and parses replies in place. Whatever a server sends that the
protocol does not allow raises ProtocolError, after which the connection is of no more use.
"""

from __future__ import annotations

import errno as e
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from struct import Struct
from typing import Any

from healfs.backends.nbd_frames import Reply, request
from healfs.backends.nbd_protocol import Buffer, ProtocolError

SIMPLE_REPLY = 0x67446698
STRUCTURED_REPLY = 0x668E33EF

CMD_READ = 0
CMD_WRITE = 1
CMD_DISC = 2
CMD_FLUSH = 3
CMD_TRIM = 4
CMD_WRITE_ZEROES = 6
CMD_BLOCK_STATUS = 7
CMD_FLAG_FUA = 1 << 0
CMD_FLAG_NO_HOLE = 1 << 1
CMD_FLAG_REQ_ONE = 1 << 3

CHUNK_DONE = 1
CHUNK_NONE = 0
CHUNK_OFFSET_DATA = 1
CHUNK_OFFSET_HOLE = 2
CHUNK_BLOCK_STATUS = 5
CHUNK_ERROR = (1 << 15) + 1
CHUNK_ERROR_OFFSET = (1 << 15) + 2
CHUNK_IS_ERROR = 1 << 15

STATE_HOLE = 1
STATE_ZERO = 2

BLOCK_STATUS_MAX = 64 << 10  # bytes of one chunk; we ask with REQ_ONE, which needs 12
PIECES_MAX = 4096  # of one read, apart from each other, each a search and a move; errors, too
ERROR_CHUNK_MAX = 6 + 0xFFFF + 8  # what its fields can say; the text is skipped, however long

_U32 = Struct(">I")
_U64 = Struct(">Q")
_EXTENT = Struct(">II")

# The protocol's error values are Linux's. EINVAL is what the specification makes of any other
# value, but EINVAL is the guest's fault here and is never tried again; so a value that is not
# in the list (old servers send any errno) is EIO, and the policy decides.
ERRORS = frozenset(
    (e.EPERM, e.EIO, e.ENOMEM, e.EINVAL, e.ENOSPC, e.EOVERFLOW, e.EOPNOTSUPP, e.ESHUTDOWN)
)
# Nor is it the guest's fault where every server can do what was asked: a server that came back
# with another size says so, and qemu-nbd of any error it has no word for.
_NO_REFUSAL = frozenset((e.EINVAL, e.EOVERFLOW, e.EOPNOTSUPP))
_ALWAYS_POSSIBLE = frozenset((CMD_READ, CMD_WRITE, CMD_FLUSH))

# (context, errno or 0, the bytes of a READ, or the extents of a BLOCK_STATUS, or None); the
# bytes are valid until the call returns.
Complete = Callable[[Any, int, Buffer | None], None]


class Command:
    """One command on the wire. `start` and `end` are its place in the stream of sent bytes."""

    __slots__ = (
        "assembly",
        "complete",
        "context",
        "end",
        "flags",
        "length",
        "offset",
        "start",
        "type",
    )

    def __init__(
        self, type: int, flags: int, offset: int, length: int, context: Any, complete: Complete
    ) -> None:
        self._fill(type, flags, offset, length, context, complete)

    def _fill(
        self, type: int, flags: int, offset: int, length: int, context: Any, complete: Complete
    ) -> None:
        self.type = type
        self.flags = flags
        self.offset = offset
        self.length = length
        self.context = context
        self.complete = complete
        self.assembly: Assembly | None = None
        self.start = 0
        self.end = 0


def transfer(type: int, offset: int, length: int, context: Any, complete: Complete) -> Command:
    """A READ or a WRITE: Command(...) for a compiler, which boxes the arguments of a class."""
    command: Command = Command.__new__(Command)
    command._fill(type, 0, offset, length, context, complete)
    return command


@dataclass(slots=True)
class Assembly:
    """A structured reply of which not all chunks have come."""

    errno: int = 0
    errors: int = 0
    data: bytearray | None = None
    starts: list[int] = field(default_factory=list)  # covered ranges, in order, not touching
    ends: list[int] = field(default_factory=list)

    def cover(self, start: int, end: int) -> None:
        """Note that a chunk brought [start, end). Raises ProtocolError where one did before."""
        i = bisect_right(self.starts, start)
        if (i and self.ends[i - 1] > start) or (i < len(self.starts) and self.starts[i] < end):
            raise ProtocolError("two chunks for the same bytes")
        joins_next = i < len(self.starts) and self.starts[i] == end
        if i and self.ends[i - 1] == start:
            self.ends[i - 1] = self.ends.pop(i) if joins_next else end
            if joins_next:
                del self.starts[i]
        elif joins_next:
            self.starts[i] = start
        elif len(self.starts) == PIECES_MAX:
            raise ProtocolError("a read in too many pieces")
        else:
            self.starts.insert(i, start)
            self.ends.insert(i, end)


class Transmission:
    """The transmission phase.

    `queue` appends a command to `out`, a list of buffers for sendmsg; `taken` says how much of
    it the socket took. `receive` parses replies in place and calls the commands' `complete`.
    The largest READ to queue is the caller's choice: a chunk must fit the caller's buffer.
    """

    def __init__(self, structured: bool, context: int | None = None) -> None:
        self.out: list[Buffer] = []
        self.pending: dict[int, Command] = {}
        self.queued = 0  # bytes of the stream that were ever in `out`
        self.sent = 0  # bytes of it that the socket took
        self.handed = 0  # bytes behind these of which it may have taken any part
        self.missing = 0  # after `receive`: bytes to the end of the reply that is not whole, or 0
        self.closed = False  # set by whoever closes, also from inside `complete`
        self._structured = structured
        self._context = context
        self._cookie = 0
        self._reply = Reply()

    def queue(self, command: Command, payload: Buffer | None = None) -> None:
        """Frame a command; the payload is not copied and must not change until it is answered."""
        self._cookie = cookie = self._cookie + 1
        self.pending[cookie] = command
        self.out.append(
            request(command.flags, command.type, cookie, command.offset, command.length)
        )
        command.start = self.queued
        if payload is not None:
            self.out.append(payload)
            self.queued += 28 + command.length
        else:
            self.queued += 28
        command.end = self.queued

    def taken(self, count: int) -> None:
        """The socket took `count` bytes of `out`."""
        self.sent += count
        self.handed = 0
        out = self.out
        if self.sent == self.queued:
            out.clear()
            return
        whole = 0
        while count >= len(out[whole]):
            count -= len(out[whole])
            whole += 1
        del out[:whole]
        if count:
            out[0] = memoryview(out[0])[count:]

    def receive(self, view: memoryview, pos: int, end: int) -> int:
        """Parse whole replies in view[pos:end]; return where the first that is not whole starts.

        The data given to `complete` are slices of `view`. Raises ProtocolError.
        """
        pending, reply = self.pending, self._reply
        self.missing = 0
        while end - pos >= 16 and not self.closed:
            reply.read(view, pos, end)
            magic, word, cookie = reply.magic, reply.error, reply.cookie
            command = pending.get(cookie)
            if command is None:
                raise ProtocolError(f"a reply to nothing asked (magic {magic:#x})")
            if command.end > self.sent + self.handed:
                # Answered, the payload is not ours any more, and its rest is still to be sent.
                raise ProtocolError("a reply to what was not sent yet")
            if magic == SIMPLE_REPLY:
                after = self._simple(command, cookie, word, view, pos, end)
                if after == pos:
                    break
            elif magic == STRUCTURED_REPLY and self._structured:
                if end - pos < 20:
                    break
                length = reply.length
                after = pos + 20 + length
                # The reply that nearly all reads get: all the bytes in one chunk.
                if (
                    word == 0x10001
                    and command.assembly is None
                    and command.type == CMD_READ
                    and length == command.length + 8
                ):
                    if after > end:
                        self.missing = after - end
                        break
                    if reply.offset != command.offset:
                        raise ProtocolError("data of a place that was not asked for")
                    del pending[cookie]
                    command.complete(command.context, 0, view[pos + 28 : after])
                elif not self._chunk(
                    command, cookie, word, view[pos + 20 : min(after, end)], length
                ):
                    self.missing = after - end
                    break
            else:
                raise ProtocolError(f"reply magic {magic:#x}")
            pos = after
        return pos

    def _simple(
        self, command: Command, cookie: int, error: int, view: memoryview, pos: int, end: int
    ) -> int:
        """A simple reply; returns where the next starts, or `pos` if it is not whole."""
        data: memoryview | None = None
        after = pos + 16
        if command.assembly is not None:
            raise ProtocolError("a simple reply among structured chunks")
        if (command.type == CMD_READ or command.type == CMD_BLOCK_STATUS) and not error:
            if self._structured:
                raise ProtocolError("a simple reply where a structured one was agreed on")
            after += command.length
            if after > end:
                self.missing = after - end
                return pos
            data = view[pos + 16 : after]
        del self.pending[cookie]
        command.complete(command.context, _errno(command, error) if error else 0, data)
        return after

    def _chunk(
        self, command: Command, cookie: int, word: int, payload: memoryview, length: int
    ) -> bool:
        """A chunk of a structured reply; False if it is not whole. `word`: its flags and type."""
        kind = word & 0xFFFF
        done = bool(word >> 16 & CHUNK_DONE)
        _check_length(command, kind, length)
        if len(payload) < length:
            return False
        reply = command.assembly
        if reply is None:
            reply = command.assembly = Assembly()
        if kind == CHUNK_NONE:
            if not done:
                raise ProtocolError("an empty chunk that is not the last")
        elif kind & CHUNK_IS_ERROR:
            reply.errors += 1
            if reply.errors > PIECES_MAX:
                raise ProtocolError("errors without end")
            reply.errno = reply.errno or _error_chunk(command, payload)
        elif kind == CHUNK_BLOCK_STATUS:
            self._block_status(command, reply, payload)
        else:
            _content(command, reply, kind, payload)
        if done:
            _check_whole(command, reply)
            del self.pending[cookie]
            command.complete(command.context, reply.errno, None if reply.errno else reply.data)
        return True

    def _block_status(self, command: Command, reply: Assembly, payload: memoryview) -> None:
        if _U32.unpack_from(payload)[0] != self._context or reply.data is not None:
            raise ProtocolError("block status of a context that was not asked for, or twice")
        total = 0
        for length, _ in _EXTENT.iter_unpack(payload[4:]):
            if not length or total >= command.length:
                raise ProtocolError("block status: an empty extent, or one too many")
            total += length
        if command.flags & CMD_FLAG_REQ_ONE and (len(payload) != 12 or total > command.length):
            raise ProtocolError("block status: more than the one extent asked for")
        reply.data = bytearray(payload[4:])


def _errno(command: Command, error: int) -> int:
    if error not in ERRORS or (error in _NO_REFUSAL and command.type in _ALWAYS_POSSIBLE):
        return e.EIO
    return error


def _check_length(command: Command, kind: int, length: int) -> None:
    """Judge a chunk before its payload is waited for, so that no server can fill our memory."""
    if kind == CHUNK_NONE:
        good = length == 0
    elif kind & CHUNK_IS_ERROR:
        good = length <= ERROR_CHUNK_MAX
    elif kind == CHUNK_OFFSET_DATA:
        good = command.type == CMD_READ and 8 < length <= command.length + 8
    elif kind == CHUNK_OFFSET_HOLE:
        good = command.type == CMD_READ and length == 12
    elif kind == CHUNK_BLOCK_STATUS:
        fits = 12 <= length <= BLOCK_STATUS_MAX and length % 8 == 4
        good = command.type == CMD_BLOCK_STATUS and fits
    else:
        good = False
    if not good:
        raise ProtocolError(f"chunk type {kind}, {length} bytes, to command {command.type}")


def _error_chunk(command: Command, payload: memoryview) -> int:
    """Of any type: all begin with the error. Whatever else is wrong in it, the request has failed,
    and where the next reply begins is certain; to end the connection would fail all the others."""
    return _errno(command, _U32.unpack_from(payload)[0] if len(payload) >= 4 else 0)


def _content(command: Command, reply: Assembly, kind: int, payload: memoryview) -> None:
    start = _U64.unpack_from(payload)[0] - command.offset
    hole = kind == CHUNK_OFFSET_HOLE
    length = _U32.unpack_from(payload, 8)[0] if hole else len(payload) - 8
    if not length or not 0 <= start <= command.length - length:
        raise ProtocolError("data of a place that was not asked for")
    reply.cover(start, start + length)
    if reply.data is None:
        reply.data = bytearray(command.length)  # zeroes, as a hole reads
    if not hole:
        reply.data[start : start + length] = payload[8:]


def _check_whole(command: Command, reply: Assembly) -> None:
    """A reply that claims success must bring all that was asked for."""
    if reply.errno:
        return
    if command.type == CMD_READ and (reply.starts != [0] or reply.ends != [command.length]):
        raise ProtocolError("a read that does not bring all its bytes")
    if command.type == CMD_BLOCK_STATUS and reply.data is None:
        raise ProtocolError("block status without extents")


def disconnect() -> bytes:
    """NBD_CMD_DISC: no reply comes."""
    return request(0, CMD_DISC, 0, 0, 0)
