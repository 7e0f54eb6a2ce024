# cython: annotation_typing=False
"""The backend for a regular file or a block device.

Requests go through io_uring (uring.py), or a thread pool where that is forbidden. A regular
file is read and written through the page cache; a block device with O_DIRECT, so that no page
cache shows stale data, and O_EXCL, so that a mounted device is refused.

The fence: a closed session keeps its open file description, its locks and its buffers until
the kernel has ended every operation on it, and the next connect() waits for that. So no late
write of an abandoned attempt lands after newer data, and `settle` is 0.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import deque
from collections.abc import Callable
from functools import partial

import trio

from healfs.backends import looks, opening, probing
from healfs.backends.base import Backend, Extent, Geometry, Polled, SourceError
from healfs.backends.buffers import Buffer, Pool
from healfs.backends.looks import Looks
from healfs.backends.syscalls import address_of
from healfs.backends.threads import ThreadPool
from healfs.backends.uring import (
    IORING_FSYNC_DATASYNC,
    IORING_OP_FALLOCATE,
    IORING_OP_FSYNC,
    IORING_OP_READ,
    IORING_OP_WRITE,
    PATIENCE,
    RWF_DSYNC,
    Operation,
    Queue,
    Ring,
)
from healfs.core.errors import REFUSED
from healfs.core.request import Done, Kind, Request

ENTRIES = 128  # operations that the kernel has at a time; the rest waits here
BUFFER_LIMIT = 64 << 20  # bytes of read buffers
CONNECT_TIMEOUT = 10.0  # seconds
CLOSE_TIMEOUT = 2.0  # seconds
ROUNDS = 8  # of submit and reap before other tasks get their turn

FALLOC_FL_KEEP_SIZE = 0x01  # linux/falloc.h
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10
PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
ZERO = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE

# An enum's member is looked up through its metaclass, and these are wanted for each request.
READ, WRITE, FLUSH = Kind.READ, Kind.WRITE, Kind.FLUSH

# Every storage can do these, whatever it says: else the guest would be told that it was wrong.
_ALWAYS_POSSIBLE = frozenset((IORING_OP_READ, IORING_OP_WRITE, IORING_OP_FSYNC))

_log = logging.getLogger(__name__)


class _Transfer(Operation):
    """An operation on behalf of a request."""

    __slots__ = ("buffer", "done", "modes", "request")

    request: Request
    done: Done
    buffer: Buffer | None
    modes: tuple[int, ...]  # of FALLOCATE, still to be tried


def _transfer(opcode: int, fd: int, request: Request, done: Done) -> _Transfer:
    # A compiler boxes the arguments of a class.
    transfer: _Transfer = _Transfer.__new__(_Transfer)
    transfer.opcode = opcode
    transfer.fd = fd
    transfer.offset = request.offset
    transfer.length = request.length
    transfer.flags = 0
    transfer.address = 0
    transfer.view = None
    transfer.request = request
    transfer.done = done
    transfer.buffer = None
    transfer.modes = ()
    return transfer


class _Session:
    """One opened file and what was submitted on it."""

    def __init__(self, opened: opening.Opened, make: Callable[[_Session], Queue]) -> None:
        self.fd = opened.fd
        self.flush_fd = opened.flush_fd
        self.fds = opened.fds
        self._device = opened.direct
        self._read_only = opened.geometry.read_only
        self._alignment = opened.geometry.minimum_block if opened.direct else 1
        self._pool = Pool(BUFFER_LIMIT)
        self._deferred: deque[tuple[Request, Done]] = deque()  # for want of a buffer
        self._answers: list[tuple[Request, Done, int]] = []  # that need no storage
        self._alive = True
        self._busy = False
        self._reported_short = False
        self._error: OSError | None = None
        self._scope: trio.CancelScope | None = None
        self._served = trio.Event()
        self.queue = make(self)
        self.ready_fd = self.queue.fd
        self.blocked = False  # see base.Polled

    def submit(self, request: Request, done: Done) -> None:
        if not self._alive:
            return
        kind = request.kind
        if kind is READ:
            self._read(request, done)
        elif kind is WRITE:
            self._write(request, done)
        elif kind is FLUSH:
            self._flush(self.flush_fd, request, done)
        elif not request.length:
            self._answers.append((request, done, 0))
        else:
            transfer = _transfer(IORING_OP_FALLOCATE, self.fd, request, done)
            if kind == Kind.DISCARD:
                transfer.modes = (PUNCH,)
            else:
                transfer.modes = (PUNCH, ZERO) if request.may_unmap else (ZERO, PUNCH)
            self._allocate(transfer)

    def _read(self, request: Request, done: Done) -> None:
        if not request.length:
            self._answers.append((request, done, 0))
            return
        buffer = self._pool.take(request.length)
        if buffer is None:
            self._deferred.append((request, done))
            return
        transfer = _transfer(IORING_OP_READ, self.fd, request, done)
        transfer.buffer = buffer
        transfer.address = buffer.address
        transfer.view = buffer.first(request.length)
        self._push(transfer)

    def _write(self, request: Request, done: Done) -> None:
        if not request.length or request.data is None:
            self._answers.append((request, done, errno.EINVAL if request.length else 0))
            return
        view = request.data
        address = address_of(view)
        transfer = _transfer(IORING_OP_WRITE, self.fd, request, done)
        if not address or address % self._alignment:
            buffer = self._pool.take(request.length)
            if buffer is None:
                self._deferred.append((request, done))
                return
            buffer.view[: request.length] = view
            transfer.buffer = buffer
            address, view = buffer.address, buffer.view[: request.length]
        transfer.address = address
        transfer.view = view
        if request.fua:
            transfer.flags = RWF_DSYNC
        self._push(transfer)

    def _flush(self, fd: int, request: Request, done: Done) -> None:
        transfer = _transfer(IORING_OP_FSYNC, fd, request, done)
        transfer.offset = transfer.length = 0
        transfer.flags = IORING_FSYNC_DATASYNC
        self._push(transfer)

    def _allocate(self, transfer: _Transfer) -> None:
        transfer.flags, *rest = transfer.modes
        transfer.modes = tuple(rest)
        self._push(transfer)

    def _push(self, transfer: _Transfer) -> None:
        try:
            self.queue.push(transfer)  # it submits, when many are pushed
        except OSError as error:
            self._broken(error)

    def _broken(self, error: OSError) -> None:
        self._error = error
        self.retire()

    def complete(self, transfer: _Transfer) -> None:
        if not self._alive:
            return  # the engine has the request parked
        request = transfer.request
        buffer = transfer.buffer
        result = transfer.result
        error = 0
        if self._device and result < transfer.length and self._is_cut(transfer):
            error = errno.ENODEV
        elif result < 0:
            error = -result
            if error == errno.EOPNOTSUPP and transfer.modes:
                self._allocate(transfer)
                return
            if error in REFUSED and transfer.opcode in _ALWAYS_POSSIBLE:
                # A read-only file system (squashfs, iso9660) has no fsync; nor was there a write.
                nothing = self._read_only and transfer.opcode == IORING_OP_FSYNC
                error = 0 if nothing else errno.EIO
        elif transfer.opcode == IORING_OP_FALLOCATE:
            if request.fua:
                self._flush(self.fd, request, transfer.done)
                return
        elif result < transfer.length:
            if self._go_on(transfer, result):
                return
            error = errno.EIO
            self._report_short(transfer)
        if request.kind is READ and buffer is not None and not error:
            transfer.done(request, 0, buffer.first(request.length))
        else:
            transfer.done(request, error, None)
        if buffer is not None:
            self._pool.give(buffer)
            for _ in range(len(self._deferred)):
                if not self._deferred:
                    break  # io_uring takes no more: the connection was given up
                self.submit(*self._deferred.popleft())

    def _is_cut(self, transfer: _Transfer) -> bool:
        """Of a device, and one that is gone has no size. Behind the end Linux answers a write with
        ENOSPC, zeroes and discards with EINVAL, and of those that reach over it does a part."""
        if transfer.result not in (-errno.ENOSPC, -errno.EINVAL) and (
            transfer.opcode != IORING_OP_FALLOCATE or transfer.result < 0
        ):
            return False
        return opening.device_size(self.fd) < transfer.offset + transfer.length

    def _report_short(self, transfer: _Transfer) -> None:
        if not self._reported_short:
            self._reported_short = True
            _log.warning("the file ends at %d, inside the disk: somebody cut it", transfer.offset)

    def _go_on(self, transfer: _Transfer, result: int) -> bool:
        if not result:
            return False
        transfer.offset += result
        transfer.address += result
        transfer.length -= result
        transfer.view = memoryview(transfer.view)[result:]
        self._push(transfer)
        return True

    def commit(self) -> bool:
        """Whether anything had ended."""
        if self._busy:
            return False  # a done() led here: the outer call goes on
        self._busy = True
        ended = 0
        try:
            for _ in range(ROUNDS):
                answers, self._answers = self._answers, []
                for request, done, error in answers:
                    if self._alive:
                        done(request, error, b"" if request.kind is READ else None)
                self._start()
                count = self._reap()
                ended += count
                if not self._alive or not (count or self._answers):
                    break
            self._start()  # what is left to reap keeps the descriptor readable
        finally:
            self._busy = False
        return ended > 0

    def _reap(self) -> int:
        try:
            return self.queue.reap()
        except OSError as error:
            self._broken(error)
            return 0

    def poll(self) -> bool:
        return self.commit()

    def attend(self, attended: bool) -> None:
        self.queue.attend(attended)

    def _start(self) -> None:
        if self._alive and self.queue.unsubmitted():
            try:
                self.queue.submit()
            except OSError as error:
                self._broken(error)

    async def serve(self) -> OSError:
        if self._alive:
            with trio.CancelScope() as self._scope:
                try:
                    while self._alive:
                        await self.queue.wait()
                        self.commit()
                finally:
                    self._scope = None
                    self._served.set()
        return self._error or OSError(errno.ECONNABORTED, "the file was closed")

    def retire(self) -> None:
        if not self._alive:
            return
        self._alive = False
        self._deferred.clear()
        self._answers.clear()
        try:
            self.queue.cancel()
        except OSError:
            pass  # cancelling only saves time
        if self._scope is None:
            self._served.set()
        else:
            self._scope.cancel()

    async def drained(self) -> None:
        """Return when the kernel has ended everything; then free the queue."""
        await self._served.wait()  # two tasks cannot wait for one descriptor
        while self.queue.pending():
            self.queue.reap()
            if self.queue.pending():
                await self.queue.wait()
        self.queue.close()


class FileBackend(Backend):
    """A regular file or block device at `path`.

    `create`: make a sparse file of that many bytes; it must not exist. `use_uring`: None tries
    io_uring and falls back to threads, False forces threads, True raises SourceError without.
    `wait_for_lock`: somebody else's lock means away (the successor of a worker that died waits
    for the kernel to end its last operations), else it is a SourceError.
    """

    settle = 0.0
    ambiguous = frozenset({errno.EIO, errno.EROFS})

    def __init__(
        self,
        path: str,
        *,
        read_only: bool = False,
        create: int | None = None,
        use_uring: bool | None = None,
        wait_for_lock: bool = False,
    ) -> None:
        self.source = path
        self._path = os.path.abspath(path)
        self._read_only = read_only
        self._create = None if create is None else opening.Creation(create)
        self._use_uring = use_uring
        self._wait_for_lock = wait_for_lock
        self._connected_before = self._locked = False
        self._size = 0  # when it was opened last
        self._session: _Session | None = None
        self._retired: list[_Session] = []
        self._old: list[int] = []  # descriptors for the next attempt's thread to close
        # One: the next attempt waits until the thread of an abandoned one has ended.
        self._limiter = trio.CapacityLimiter(1)
        self._looks = Looks(self._old.append)

    def resumed(self) -> None:
        self._connected_before = True
        self._create = None

    async def connect(self) -> Geometry:
        self.close()
        try:
            with trio.fail_after(CONNECT_TIMEOUT):
                await self._drain()
                opened = await self._open()
        except trio.TooSlowError:
            raise OSError(errno.ETIMEDOUT, f"{self.source}: the storage does not answer") from None
        except SourceError as error:
            if self._connected_before:  # it was right once, so waiting may mend it
                raise OSError(error.errno, error.message) from None
            raise
        try:
            self._session, notes = self._start_session(opened)
        except BaseException:
            self._old += opened.fds
            raise
        self._connected_before = True
        self._size = opened.geometry.size
        self.submit = self._session.submit  # type: ignore[method-assign] # a call less for each
        return opened.described(notes)

    def _start_session(self, opened: opening.Opened) -> tuple[_Session, tuple[str, ...]]:
        # O_DIRECT submissions to a block device never wait: no bound on them.
        patience = ENTRIES if opened.direct else PATIENCE if opened.nonblocking else 0
        if self._use_uring is not False:
            writer = opened.waits_to_write

            def ring(session: _Session) -> Queue:
                return Ring(ENTRIES, session.complete, patience=patience, writer=writer)

            try:
                return _Session(opened, ring), ()
            except OSError as error:
                why = error.strerror
            if self._use_uring:
                raise SourceError(f"io_uring is not available ({why})", errno.ENOSYS)
        else:
            why = "by option"
        note = f"io_uring is not available ({why}): threads are used"
        return _Session(opened, lambda s: ThreadPool(s.complete)), (note,)

    async def _drain(self) -> None:
        while self._retired:
            await self._retired[0].drained()
            self._old += self._retired.pop(0).fds

    async def _open(self) -> opening.Opened:
        attempt = opening.Attempt(
            self._path,
            read_only=self._read_only,
            create=self._create,
            wait_for_lock=self._wait_for_lock or self._connected_before,
            locked=self._locked,
            old=self._take_old(),
        )
        try:
            opened = await trio.to_thread.run_sync(
                attempt.run, abandon_on_cancel=True, limiter=self._limiter
            )
        except BaseException:
            self._old += attempt.abandon()
            raise
        self._create = None
        self._locked = opened.locked
        return opened

    def _take_old(self) -> list[int]:
        taken = self._old[:]
        self._old.clear()
        return taken

    async def serve(self) -> OSError:
        if self._session is None:
            return OSError(errno.ENOTCONN, "not connected")
        return await self._session.serve()

    def submit(self, request: Request, done: Done) -> None:
        if self._session is not None:
            self._session.submit(request, done)

    def commit(self) -> None:
        if self._session is not None:
            self._session.commit()

    @property
    def polled(self) -> Polled | None:
        session = self._session
        return session if session is not None and session.ready_fd >= 0 else None

    def close(self) -> None:
        if self._session is not None:
            session, self._session = self._session, None
            del self.submit
            session.retire()
            self._retired.append(session)

    async def probe(self) -> str:
        if self._session is None:
            return "not connected"
        look = partial(probing.probe, self._path, size=self._size, read_only=self._read_only)
        try:
            with trio.move_on_after(CONNECT_TIMEOUT):
                return await self._looks.look(self._session.flush_fd, look)
        except OSError as error:  # for want of a descriptor: nobody knows, so it is waited for
            return f"it cannot be looked at: {error.strerror}"
        return "the storage does not answer"

    async def extents(self, offset: int, length: int) -> list[Extent] | None:
        if self._session is None:
            return None
        try:
            look = partial(looks.extents, offset=offset, length=length)
            return await self._looks.look(self._session.flush_fd, look)
        except OSError:
            return None

    async def aclose(self) -> None:
        self.close()
        with trio.move_on_after(CLOSE_TIMEOUT):
            await self._drain()
            await trio.to_thread.run_sync(
                opening.close_all, self._take_old(), abandon_on_cancel=True, limiter=self._limiter
            )
