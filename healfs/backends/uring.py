# cython: annotation_typing=False
"""io_uring, as much as the file backend needs (io_uring_setup(2), io_uring_enter(2)).

The rings are mmap and struct. `push` fills submission queue entries, `submit` hands all of them
to the kernel with one system call, and the ring's descriptor is readable when there are
completions to `reap`. Nothing here waits for storage.

Memory ordering. The kernel reads our tail only inside io_uring_enter, on our own thread (there
is no SQPOLL), so no barrier is needed on that side. It may write completions from another CPU:
entries first, then the tail. x86 keeps loads in order; elsewhere `_acquire` between our load of
the tail and our loads of the entries does.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import select
import struct
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import trio

from healfs.backends.syscalls import Writer, enter, start_writer

# asm-generic/unistd.h: the numbers are the same on every architecture that Python runs on.
SYS_IO_URING_SETUP = 425
SYS_IO_URING_REGISTER = 427

# linux/io_uring.h
IORING_OP_FSYNC = 3
IORING_OP_ASYNC_CANCEL = 14
IORING_OP_FALLOCATE = 17
IORING_OP_READ = 22
IORING_OP_WRITE = 23
IORING_FSYNC_DATASYNC = 1 << 0
IORING_ASYNC_CANCEL_ANY = 1 << 2
IOSQE_ASYNC = 1 << 4
IORING_SETUP_COOP_TASKRUN = 1 << 8
IORING_FEAT_SINGLE_MMAP = 1 << 0
IORING_FEAT_NODROP = 1 << 1
IORING_OFF_SQ_RING = 0
IORING_OFF_SQES = 0x10000000
IORING_REGISTER_PROBE = 8
IORING_REGISTER_IOWQ_MAX_WORKERS = 19
IO_URING_OP_SUPPORTED = 1 << 0
NEEDED = (IORING_OP_FSYNC, IORING_OP_FALLOCATE, IORING_OP_READ, IORING_OP_WRITE)

# struct io_uring_sqe, in words of 8 bytes: {opcode (u8), flags (u8), ioprio (u16), fd (s32)}; off;
# addr; {len (u32), rw_flags | fsync_flags | cancel_flags (u32)}; user_data; three of zeroes
SQE_WORDS, SQE_USER_DATA = 8, 4
# struct io_uring_cqe: user_data (u64), res (s32), flags (u32)
CQE_SIZE = 16
# struct io_uring_params: sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle,
# features, wq_fd, resv[3]; then struct io_sqring_offsets and struct io_cqring_offsets
PARAMS_SIZE, PARAMS_FLAGS, PARAMS_FEATURES, PARAMS_SQ_OFF, PARAMS_CQ_OFF = 120, 8, 20, 40, 80
# io_sqring_offsets: head, tail, ring_mask, ring_entries, flags, dropped, array, ...
SQ_OFFSETS = struct.Struct("<7I")
# io_cqring_offsets: head, tail, ring_mask, ring_entries, overflow, cqes, ...
CQ_OFFSETS = struct.Struct("<6I")
# struct io_uring_probe: last_op, ops_len, resv, resv2[3]; then io_uring_probe_op: op, resv,
# flags, resv2
PROBE_HEADER, PROBE_OP, PROBE_OPS = 16, struct.Struct("<BBHI"), 256

RWF_DSYNC = 0x00000002  # linux/fs.h

# A buffered read whose page is not cached may make even a non-blocking submission wait for a
# tag of the block device's queue, which has at least 64. So no more than this many go to the
# kernel in one call, and once PATIENCE of them wait for storage, IOSQE_ASYNC keeps the rest
# off our thread. Other file systems wait in a submission as they like (FUSE for a free
# background slot: tried): patience 0 sends everything by IOSQE_ASYNC.
BATCH = 32
PATIENCE = 16
FEW = 4  # writes that a flush may wait behind in the writer's thread
_FEW = FEW

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_U32 = 0xFFFFFFFF
_FALLOCATE = IORING_OP_FALLOCATE
_ASYNC = IOSQE_ASYNC << 8
_WRITE = IORING_OP_WRITE
_FSYNC = IORING_OP_FSYNC
_CANCEL = IORING_OP_ASYNC_CANCEL | 0xFFFFFFFF << 32  # descriptor -1


class Operation:
    """One operation on a descriptor: what io_uring_prep_*(3) would say.

    READ, WRITE: `length` bytes at `offset`, to or from `address`; `flags` are RWF_*. FSYNC: of
    the data. FALLOCATE: `flags` is the mode. `view` is the memory behind `address` (the thread
    pool uses that); it is kept until the operation is complete. `result`, then: bytes
    transferred, or a negative errno.
    """

    __slots__ = ("address", "fd", "flags", "length", "offset", "opcode", "result", "view")

    def __init__(
        self,
        opcode: int,
        fd: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        address: int = 0,
        view: Any = None,
    ) -> None:
        self.opcode = opcode
        self.fd = fd
        self.offset = offset
        self.length = length
        self.flags = flags
        self.address = address
        self.view = view
        self.result = 0


# Called on the loop's thread with an operation that was pushed.
Complete = Callable[[Any], None]


class Queue(Protocol):
    """What Ring and ThreadPool have in common. All calls on the loop's thread, none blocks."""

    fd: int  # readable when there may be something to reap; -1: only `wait` can tell

    def push(self, operation: Operation) -> None:
        """Queue an operation for the next submit; any number."""

    def submit(self) -> None:
        """Start what was pushed. OSError: the queue is broken."""

    def reap(self) -> int:
        """Call complete for what has ended; return how many."""

    def attend(self, attended: bool) -> None:
        """True: `reap` is called again and again, so `fd` need not become readable for what ends;
        False: from now on it has to, for what was not reaped yet, too."""

    def unsubmitted(self) -> bool:
        """Whether submit has something to do."""

    def pending(self) -> int:
        """Operations that the kernel may still be working on."""

    def cancel(self) -> None:
        """Drop what has not started; ask what has started to end early."""

    async def wait(self) -> None:
        """Return when there may be something to reap."""

    def close(self) -> None:
        """Free the queue; only when nothing is pending."""


def _call(number: int, *arguments: Any) -> int:
    result = int(_syscall(number, *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


_ordered_loads = platform.machine() in ("x86_64", "i686", "i386", "AMD64")
_barrier = threading.Lock()


def _acquire() -> None:
    # A release followed by an acquire (two rounds of a lock give that) orders the loads before
    # it against those after it.
    if not _ordered_loads:
        for _ in range(2):
            with _barrier:
                pass


def _set_up(entries: int) -> tuple[int, Any]:
    """The ring's descriptor and its parameters."""
    params = ctypes.create_string_buffer(PARAMS_SIZE)
    # A completion need not interrupt us: we make system calls all the time (Linux 5.19). Not
    # DEFER_TASKRUN: with that, epoll is not told of completions (tried on 6.18).
    struct.pack_into("<I", params, PARAMS_FLAGS, IORING_SETUP_COOP_TASKRUN)
    try:
        return _call(SYS_IO_URING_SETUP, entries, params), params
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
    params = ctypes.create_string_buffer(PARAMS_SIZE)
    return _call(SYS_IO_URING_SETUP, entries, params), params


class Ring:
    """An io_uring. OSError from the constructor: not here (ENOSYS, EPERM, ENOMEM, ...).

    `writer`: writes go to a thread of its own (see syscalls.Writer), if there is one.
    """

    def __init__(
        self, entries: int, complete: Complete, *, patience: int = PATIENCE, writer: bool = False
    ) -> None:
        self._complete = complete
        self._patience = patience
        self._ring, params = _set_up(entries)
        try:
            self._check(params.raw)
            self._map(params.raw)
        except BaseException:
            os.close(self._ring)
            raise
        self.fd = self._ring
        self._writer: Writer | None = None
        self._both: select.epoll | None = None
        if writer:
            self._start_writer()
        self._to_write: deque[Operation] = deque()  # it has no room for these
        self._handed = True  # it knows of all that it has
        self._syncing = False  # an FSYNC is what it has last
        # By user_data, which is a place in this list; 0 is a cancel's.
        self._pending: list[Operation | None] = [None] * (self._entries + 1)
        # What the writer has, in a ring as its own is.
        self._written: list[Operation | None] = [None] * self._entries
        self._to_take = self._writes = 0  # positions in it only grow
        self._free = list(range(self._entries, 0, -1))
        self._waiting: deque[Operation] = deque()
        self._tail = 0
        self._submitted = 0
        self._slow = patience <= 0

    def _start_writer(self) -> None:
        try:
            both = select.epoll()
            both.register(self._ring, select.EPOLLIN)
            self._writer = start_writer(self._entries)
        except OSError:
            return  # no more descriptors or threads: io_uring writes
        if self._writer is not None:
            both.register(self._writer.fd, select.EPOLLIN)
            self._both = both
            self.fd = both.fileno()

    def _check(self, params: bytes) -> None:
        (features,) = struct.unpack_from("<I", params, PARAMS_FEATURES)
        wanted = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP
        if features & wanted != wanted:
            raise OSError(errno.ENOSYS, "this kernel's io_uring is too old")
        probe = ctypes.create_string_buffer(PROBE_HEADER + PROBE_OPS * PROBE_OP.size)
        _call(SYS_IO_URING_REGISTER, self._ring, IORING_REGISTER_PROBE, probe, PROBE_OPS)
        for opcode in NEEDED:
            flags = PROBE_OP.unpack_from(probe, PROBE_HEADER + opcode * PROBE_OP.size)[2]
            if not flags & IO_URING_OP_SUPPORTED:
                raise OSError(errno.ENOSYS, f"this kernel's io_uring has no operation {opcode}")

    def _map(self, params: bytes) -> None:
        cq_entries: int
        self._entries: int
        self._entries, cq_entries = struct.unpack_from("<II", params, 0)
        sq = SQ_OFFSETS.unpack_from(params, PARAMS_SQ_OFF)
        cq = CQ_OFFSETS.unpack_from(params, PARAMS_CQ_OFF)
        sq_array, cqes = sq[6], cq[5]
        length = max(sq_array + 4 * self._entries, cqes + CQE_SIZE * cq_entries)
        self._rings = mmap.mmap(self._ring, length, offset=IORING_OFF_SQ_RING)
        self._entries_map = mmap.mmap(
            self._ring, 8 * SQE_WORDS * self._entries, offset=IORING_OFF_SQES
        )
        self._sqes = memoryview(self._entries_map).cast("Q")
        rings = memoryview(self._rings)[: length // 8 * 8]
        self._u32, self._s32, self._u64 = rings.cast("I"), rings.cast("i"), rings.cast("Q")
        self._sq_tail, self._cq_head, self._cq_tail = sq[1] // 4, cq[0] // 4, cq[1] // 4
        self._sq_mask, self._cq_mask, self._cqes = self._entries - 1, cq_entries - 1, cqes
        for index in range(self._entries):
            self._u32[sq_array // 4 + index] = index
        # The default is four bounded workers a CPU: a few slow operations would hold up the rest.
        workers = (ctypes.c_uint32 * 2)(self._entries, 0)
        _syscall(
            SYS_IO_URING_REGISTER, self._ring, IORING_REGISTER_IOWQ_MAX_WORKERS, workers, 2
        )  # an optimisation: an old kernel goes without

    def push(self, operation: Operation) -> None:
        if self._writer is not None and not self._syncing:
            if operation.opcode == _WRITE and not operation.flags:
                if self._to_write or self._writes - self._to_take == self._entries:
                    self._to_write.append(operation)
                else:
                    self._write(operation)
                return
            if operation.opcode == _FSYNC and self._writes - self._to_take <= _FEW:
                # Who flushes after each write finds the thread awake. What comes meanwhile goes
                # to io_uring, and waits for no disk.
                self._syncing = True
                self._write(operation)
                return
        # No more than `entries` in the kernel: the completion queue is twice that, so it never
        # overflows.
        if not self._free:
            self._waiting.append(operation)
            return
        if (self._tail - self._submitted) & _U32 >= BATCH:
            self.submit()
        self._pack(operation)

    def _write(self, o: Operation) -> None:
        writer = self._writer
        assert writer is not None
        writer.push(o.fd, o.address, o.length, o.offset)
        self._written[self._writes & self._sq_mask] = o
        self._writes += 1
        self._handed = False

    def _pack(self, o: Operation) -> None:
        user_data = self._free.pop()
        self._pending[user_data] = o
        opcode, address, length, flags = o.opcode, o.address, o.length, o.flags
        if opcode == _FALLOCATE:  # has its length in addr and its mode in len
            address, length, flags = length, flags, 0
        if self._slow:
            opcode |= _ASYNC
        sqes = self._sqes
        at = (self._tail & self._sq_mask) * SQE_WORDS
        sqes[at] = opcode | o.fd << 32
        sqes[at + 1] = o.offset
        sqes[at + 2] = address
        sqes[at + 3] = length | flags << 32
        sqes[at + 4] = user_data
        self._tail = (self._tail + 1) & _U32

    def submit(self) -> None:
        if not self._handed:
            self._handed = True
            assert self._writer is not None
            self._writer.submit()
        todo = (self._tail - self._submitted) & _U32
        if not todo:
            return
        self._u32[self._sq_tail] = self._tail
        while todo:
            # Fewer than asked for: an entry was refused, and its completion says why.
            taken = enter(self._ring, todo)
            if taken == -errno.EINTR:
                continue
            if taken <= 0:
                code = -taken or errno.EAGAIN
                raise OSError(code, f"io_uring takes no more operations: {os.strerror(code)}")
            self._submitted = (self._submitted + taken) & _U32
            todo -= taken
        ready = (self._u32[self._cq_tail] - self._u32[self._cq_head]) & _U32
        self._slow = self._entries - len(self._free) - ready >= self._patience

    def reap(self) -> int:
        u32, u64, s32 = self._u32, self._u64, self._s32
        ended: list[Operation] = []
        if self._writer is not None:
            # With nothing to take, too: it may tell of what was taken before it did.
            self._reap_written(ended)
        head, end = u32[self._cq_head], u32[self._cq_tail]
        if head == end:
            return self._completed(ended)
        _acquire()
        pending, free, cqes, mask = self._pending, self._free, self._cqes, self._cq_mask
        while head != end:
            at = cqes + (head & mask) * CQE_SIZE
            user_data = u64[at // 8]
            head = (head + 1) & _U32
            if user_data:
                operation = pending[user_data]
                assert operation is not None
                operation.result = s32[at // 4 + 2]
                ended.append(operation)
                pending[user_data] = None
                free.append(user_data)
        u32[self._cq_head] = head
        waiting = self._waiting
        while waiting and free:
            self.push(waiting.popleft())
        return self._completed(ended)

    def _reap_written(self, ended: list[Operation]) -> None:
        writer, written = self._writer, self._written
        assert writer is not None
        for _ in range(writer.ready()):
            place = self._to_take & self._sq_mask
            operation = written[place]
            assert operation is not None
            operation.result = writer.take()
            ended.append(operation)
            written[place] = None
            self._to_take += 1
            if operation.opcode == _FSYNC:
                self._syncing = False
        while self._to_write and self._writes - self._to_take < self._entries:
            self._write(self._to_write.popleft())

    def _completed(self, ended: list[Operation]) -> int:
        complete = self._complete
        for operation in ended:
            complete(operation)
        return len(ended)

    def attend(self, attended: bool) -> None:
        if self._writer is not None:
            self._writer.attend(attended)

    def unsubmitted(self) -> bool:
        return self._tail != self._submitted or not self._handed

    def pending(self) -> int:
        return self._entries - len(self._free) + self._writes - self._to_take

    def cancel(self) -> None:
        self._waiting.clear()
        self._to_write.clear()
        if self._writer is not None:
            self._writer.cancel()
            self._writer.submit()  # what it was not told of ends, too
        while self._tail != self._submitted:  # the kernel has not seen these yet
            self._tail = (self._tail - 1) & _U32
            at = (self._tail & self._sq_mask) * SQE_WORDS
            user_data = self._sqes[at + SQE_USER_DATA]
            self._pending[user_data] = None
            self._free.append(user_data)
        self._u32[self._sq_tail] = self._tail
        if len(self._free) == self._entries:
            return
        at = (self._tail & self._sq_mask) * SQE_WORDS
        self._sqes[at] = _CANCEL
        self._sqes[at + 1] = self._sqes[at + 2] = self._sqes[at + SQE_USER_DATA] = 0
        self._sqes[at + 3] = IORING_ASYNC_CANCEL_ANY << 32
        self._tail = (self._tail + 1) & _U32
        self.submit()

    async def wait(self) -> None:
        await trio.lowlevel.wait_readable(self.fd)

    def close(self) -> None:
        if self.fd >= 0:
            if self._writer is not None and self._both is not None:
                self._writer.close()
                self._both.close()
            # A map cannot be closed while there is a view of it.
            self._u32 = self._s32 = self._u64 = self._sqes = None  # type: ignore[assignment]
            self._rings.close()
            self._entries_map.close()
            os.close(self._ring)
            self.fd = -1
