# cython: annotation_typing=False
"""The channel: owns /dev/fuse. Data messages go to the engine, the rest to pyfuse3.

Nothing here is a coroutine per request: `pump` drains many messages per wake-up, answers are
written from the engine's callbacks. pyfuse3 sits at the other end of a SEQPACKET socketpair and
takes it for an already mounted session.
"""

from __future__ import annotations

import errno as e
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from healfs.core.request import Done, Kind, Phase, Request, oldest_first, transfer
from healfs.core.ring import PayloadRing
from healfs.fuse import negotiation, wire
from healfs.fuse.messages import Messages

log = logging.getLogger("healfs.channel")

READ, WRITE, FLUSH, WRITE_ZEROES = Kind.READ, Kind.WRITE, Kind.FLUSH, Kind.WRITE_ZEROES
IN_FLIGHT = Phase.IN_FLIGHT
FUSE_READ, FUSE_WRITE, FUSE_FSYNC = wire.READ, wire.WRITE, wire.FSYNC
FIXED_SIZE, O_DSYNC = wire.FIXED_SIZE, wire.O_DSYNC
EAGAIN, ENODEV = e.EAGAIN, e.ENODEV
BATCH = 64  # messages per wake-up, so that completions and control get their turn
_LARGE = 128 << 10  # bytes of a READ or WRITE that ends a batch
PASSED_ON = 2 << 20  # socket buffers towards pyfuse3, bytes


class Sink(Protocol):
    """Who takes the requests: the engine."""

    def submit(self, request: Request) -> None: ...
    def cancel(self, request: Request, errno: int = e.EINTR) -> None: ...
    def resent(self) -> None: ...


# (offset, whence) -> the offset of the next data or hole; None: cannot tell, all is data
Seek = Callable[[int, int], Awaitable[int | None]]


class Channel:
    """`fuse` is the mounted descriptor, `theirs` the descriptor for pyfuse3.

    `commit` is called after each batch of requests; `turn` when there is something to read, and
    is False when the mount is gone; `seek` answers SEEK_DATA and SEEK_HOLE;
    `on_interrupt(request)` is asked to look after a request whose caller got a signal.
    """

    def __init__(
        self,
        fuse: int,
        size: int,
        sink: Sink,
        commit: Callable[[], None],
        seek: Seek,
        ring: PayloadRing,
        *,
        read_only: bool = False,
    ) -> None:
        os.set_blocking(fuse, False)
        self.fuse = fuse
        self.size = size
        self.sink = sink
        # Bound once.
        self._submit = sink.submit
        self._read_done: Done = self._answer_read
        self._write_done: Done = self._answer_write
        self.commit = commit
        self.seek = seek
        self.read_only = read_only
        self.ring = ring
        self.held: dict[int, Request] = {}  # by unique: not answered yet
        self.on_interrupt: Callable[[Request], None] = lambda request: None
        self.on_held: Callable[[Request], None] = lambda request: None
        self.on_init: Callable[[bytes, bytes], None] = lambda request, reply: None
        self.max_background = wire.MAX_BACKGROUND
        self._messages = Messages(fuse)
        self._header = self._messages.header
        self._ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in self._ours, self.theirs:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PASSED_ON)
            end.setblocking(False)
        self.turn: Callable[[], bool] = self._one_batch
        self.answered = 0  # requests, ever
        self.others = False  # something else than data came: it is the other tasks' turn
        self.received = 0  # messages, ever
        self._opens: set[int] = set()  # uniques of OPEN requests, whose replies get flags
        self._init = b""
        self._negotiated = b""  # the reply that it has had
        self._swallow: int | None = None  # unique of the INIT whose reply the kernel has had
        self.resuming: trio.Event | None = None  # set when all that came again was handed on
        self._greeted = trio.Event()  # pyfuse3 has answered it
        self._again: list[Request] | None = None  # being collected: see _take_over
        self._nursery: trio.Nursery | None = None

    @property
    def overflow_limit(self) -> int:
        """Bytes of payloads in ordinary memory, at the most."""
        return self.max_background * wire.MAX_WRITE

    # --- from the kernel --------------------------------------------------------------------

    async def pump(self) -> None:
        """Serve until the file system is unmounted (then return)."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._replies_of_pyfuse3)
            if self._swallow is not None:
                await self._take_over()
            while True:
                await trio.lowlevel.wait_readable(self.fuse)
                self.others = False
                if not self.turn():
                    break
                await trio.lowlevel.checkpoint_if_cancelled()
            nursery.cancel_scope.cancel()

    def resume(self, init: bytes, reply: bytes) -> None:
        """It is mounted already: `init` and `reply` are what an earlier worker saved."""
        self._negotiated = reply
        self._swallow = wire.IN_HEADER.unpack_from(init)[2]
        self.resuming = trio.Event()
        self._ours.send(init)

    async def _take_over(self) -> None:
        """Have every unanswered request sent again, and hand them on, the oldest first."""
        await self._greeted.wait()
        self._again = []
        self._send((wire.OUT_HEADER.pack(16, wire.NOTIFY_RESEND, 0),))
        while self._drain_one_batch():
            pass
        again, self._again = self._again, None
        for request in oldest_first(again):
            self._hold(request, request.caller)
        log.info("requests that came again: %d", len(again))
        self.sink.resent()
        self.commit()
        assert self.resuming is not None
        self.resuming.set()

    def _drain_one_batch(self) -> bool:
        """Whether there may be more. (Those that were withdrawn meanwhile make a batch short.)"""
        before = self.received
        return self.drain() and self.received > before

    def _one_batch(self) -> bool:
        alive = self.drain()
        self.commit()
        return alive

    def drain(self) -> bool:
        """Read up to a batch; False when the mount is gone."""
        messages, ring = self._messages, self.ring
        for _ in range(BATCH):
            if ring.at >= 0:
                length = messages.read(ring.memory, ring.at, ring.message)
            else:
                length = messages.read(ring.target(), 0, ring.message)
            if length < 0:
                if length == -EAGAIN:
                    return True
                if length == -ENODEV:
                    return False
                if length in (-e.ENOENT, -e.EINTR):  # the request was withdrawn meanwhile
                    continue
                raise OSError(-length, os.strerror(-length))
            self.received += 1
            opcode, unique, pid = messages.opcode, messages.unique, messages.pid
            if opcode == FUSE_READ:
                self._read(unique, pid, messages.offset, messages.size)
            elif opcode == FUSE_WRITE:
                self._write(unique, pid, length, messages.offset, messages.size, messages.flags)
            elif opcode == FUSE_FSYNC:
                self._hold(Request(FLUSH, 0, 0, self._answer_plain, tag=unique, owner=None), pid)
            else:
                self._seldom(opcode, unique, pid, length)
            large = messages.size >= _LARGE and opcode in (FUSE_READ, FUSE_WRITE)
            if large and self._again is None:
                # What is read or sent before the next comes is still in the processor's cache.
                return True
        return True

    def _hold(self, request: Request, pid: int) -> None:
        request.caller = pid  # what is in flight now may have to wait later
        if self._again is not None:
            self._again.append(request)
            return
        self.held[request.tag] = request
        self._submit(request)
        if not request.answered and request.phase is not IN_FLIGHT:  # it waits: who asked?
            self.on_held(request)

    def _read(self, unique: int, pid: int, offset: int, size: int) -> None:
        if offset + size > self.size:
            size = self.size - offset
            if size <= 0:  # end of file
                self._reply(unique, 0)
                return
        self._hold(transfer(READ, offset, size, self._read_done, None, False, unique, None), pid)

    def _write(
        self, unique: int, pid: int, length: int, offset: int, size: int, flags: int
    ) -> None:
        if length != FIXED_SIZE + size:
            self._reply(unique, e.EIO)
        elif self.read_only:
            self._reply(unique, e.EROFS)
        elif offset + size > self.size:
            self._reply(unique, e.ENOSPC)
        else:
            slot = self.ring.keep(size)
            fua = bool(flags & O_DSYNC)
            done = self._write_done
            request = transfer(WRITE, offset, size, done, slot.data, fua, unique, slot)
            slot.request = request
            self._hold(request, pid)

    def _seldom(self, opcode: int, unique: int, pid: int, length: int) -> None:
        header = self._header
        self.others = True
        if opcode == wire.FALLOCATE:
            _, offset, size, mode, _ = wire.FALLOCATE_IN.unpack_from(header, wire.HEADER_SIZE)
            self._fallocate(unique, pid, offset, size, mode)
        elif opcode == wire.LSEEK:
            _, offset, whence, _ = wire.LSEEK_IN.unpack_from(header, wire.HEADER_SIZE)
            assert self._nursery is not None
            self._nursery.start_soon(self._lseek, unique, offset, whence)
        elif opcode == wire.INTERRUPT:
            (interrupted,) = wire.INTERRUPT_IN.unpack_from(header, wire.HEADER_SIZE)
            request = self.held.get(interrupted)
            if request is not None:  # else it is pyfuse3's, whose answers never wait
                self.on_interrupt(request)
        else:
            self._pass_on(opcode, unique, length)

    def _fallocate(self, unique: int, pid: int, offset: int, size: int, mode: int) -> None:
        """PUNCH_HOLE and ZERO_RANGE are both WRITE_ZEROES: hypervisors rely on the zeroes."""
        punch = bool(mode & wire.FALLOC_PUNCH_HOLE)
        known = wire.FALLOC_KEEP_SIZE | wire.FALLOC_PUNCH_HOLE | wire.FALLOC_ZERO_RANGE
        if self.read_only:
            self._reply(unique, e.EROFS)
        elif mode & ~known or not (punch or mode & wire.FALLOC_ZERO_RANGE):
            self._reply(unique, e.EOPNOTSUPP)
        elif offset + size > self.size and not mode & wire.FALLOC_KEEP_SIZE:
            self._reply(unique, e.ENOSPC)
        elif offset >= self.size:
            self._reply(unique, 0)
        else:
            size = min(size, self.size - offset)
            request = Request(
                WRITE_ZEROES, offset, size, self._answer_plain, may_unmap=punch, tag=unique
            )
            self._hold(request, pid)

    async def _lseek(self, unique: int, offset: int, whence: int) -> None:
        if offset >= self.size:
            self._reply(unique, e.ENXIO)
            return
        try:
            found = await self.seek(offset, whence)
        except Exception:
            log.exception("internal error in seek: all is taken for data")
            found = None
        if found is None:  # cannot tell: all is data, with a hole at the end
            found = offset if whence == wire.SEEK_DATA else self.size
        if found < 0:
            self._reply(unique, e.ENXIO)
        else:
            self._send((wire.LSEEK_REPLY.pack(24, 0, unique, found),))

    # --- to the kernel ----------------------------------------------------------------------

    def _answer_read(
        self, request: Request, errno: int, data: memoryview | bytes | bytearray | None
    ) -> None:
        unique = request.tag
        del self.held[unique]
        self.answered += 1
        if errno:
            self._reply(unique, errno)
            return
        assert data is not None
        self._messages.reply_read(unique, data)

    def _answer_write(self, request: Request, errno: int, data: object) -> None:
        unique = request.tag
        del self.held[unique]
        self.answered += 1
        if errno:
            self._reply(unique, errno)
        else:
            self._messages.reply_write(unique, request.length)

    def _answer_plain(self, request: Request, errno: int, data: object) -> None:
        del self.held[request.tag]
        self.answered += 1
        self._reply(request.tag, errno)

    def _reply(self, unique: int, errno: int) -> None:
        self._messages.reply(unique, errno)

    def _send(self, parts: tuple[bytes | memoryview | bytearray, ...]) -> None:
        try:
            os.writev(self.fuse, parts)
        except OSError as exc:
            # ENOENT: nobody waits for it any more. ENODEV: unmounted.
            if exc.errno not in (e.ENOENT, e.ENODEV):
                raise

    # --- pyfuse3 ----------------------------------------------------------------------------

    def _pass_on(self, opcode: int, unique: int, length: int) -> None:
        message = self._header[:length]
        if length > wire.FIXED_SIZE:
            message += self.ring.target()[: length - wire.FIXED_SIZE]
        if opcode == wire.OPEN:
            self._opens.add(unique)
        elif opcode == wire.INIT and self._negotiated:
            # An earlier worker has died after it had told the keeper of it and before its reply.
            rest = self._negotiated[wire.OUT_HEADER.size :]
            self._send((wire.OUT_HEADER.pack(len(self._negotiated), 0, unique), rest))
            return
        elif opcode == wire.INIT:
            wire.without_splice(message)
            self._init = bytes(message)
        try:
            self._ours.send(message)
        except BlockingIOError:
            # Its socket is full: it has 2 MiB of messages before it. Nobody is refused a READ.
            self._opens.discard(unique)
            if opcode not in (2, 42):  # FORGET and BATCH_FORGET have no reply
                self._reply(unique, e.EBUSY)

    async def _replies_of_pyfuse3(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._ours)
            try:
                reply = bytearray(self._ours.recv(PASSED_ON))
            except BlockingIOError:
                continue
            if not reply:
                return
            _, error, unique = wire.OUT_HEADER.unpack_from(reply)
            if unique == self._swallow:
                self._swallow = None
                wire.for_healfs(reply)
                if why := negotiation.difference(self._negotiated, bytes(reply)):
                    log.warning("this worker goes on although %s", why)
                self._greeted.set()
                continue
            if unique in self._opens:
                self._opens.discard(unique)
                if not error:
                    wire.parallel_direct(reply)
            elif self._init and len(reply) == wire.INIT_OUT_SIZE and not error:
                max_write = wire.for_healfs(reply)
                if max_write > self.ring.message:
                    raise RuntimeError(f"the kernel negotiated max_write {max_write}")
                # Before the kernel has it: from then on a successor may be needed.
                self.on_init(self._init, bytes(reply))
                self._init = b""
            self._send((reply,))

    def close(self) -> None:
        """Let go of pyfuse3; the FUSE descriptor is the worker's."""
        self._ours.close()
        self.theirs.close()
