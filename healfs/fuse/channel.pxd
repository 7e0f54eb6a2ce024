cimport cython

from healfs.core.request cimport Request, transfer
from healfs.core.ring cimport PayloadRing, Slot
from healfs.fuse.messages cimport Messages

cdef long long FUSE_READ, FUSE_WRITE, FUSE_FSYNC, FIXED_SIZE, O_DSYNC, EAGAIN, ENODEV, BATCH, _LARGE


cdef class Channel:
    cdef public long long fuse
    cdef public long long size
    cdef public object sink
    cdef object _submit
    cdef object _read_done
    cdef object _write_done
    cdef public object commit
    cdef public object seek
    cdef public bint read_only
    cdef public PayloadRing ring
    cdef public dict held
    cdef public object on_interrupt
    cdef public object on_held
    cdef public object on_init
    cdef public long long max_background
    cdef Messages _messages
    cdef object _header
    cdef public object _ours
    cdef public object theirs
    cdef public object turn
    cdef public long long answered
    cdef public bint others
    cdef public long long received
    cdef set _opens
    cdef object _init
    cdef object _negotiated
    cdef object _swallow
    cdef public object resuming
    cdef object _greeted
    cdef object _again
    cdef object _nursery

    @cython.locals(messages=Messages, ring=PayloadRing, length="long long", opcode="long long",
                   unique="unsigned long long", pid="long long")
    cpdef bint drain(self) except -1
    cdef object _hold(self, Request request, long long pid)
    cdef object _read(self, unsigned long long unique, long long pid, long long offset, long long size)
    @cython.locals(slot=Slot, request=Request)
    cdef object _write(self, unsigned long long unique, long long pid, long long length, long long offset, long long size, long long flags)
    @cython.locals(unique="unsigned long long")
    cpdef object _answer_read(self, Request request, long long errno, object data)
    @cython.locals(unique="unsigned long long")
    cpdef object _answer_write(self, Request request, long long errno, object data)
    cdef object _reply(self, unsigned long long unique, long long errno)
    cdef object _send(self, tuple parts)
