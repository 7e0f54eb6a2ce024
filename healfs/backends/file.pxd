cimport cython

from healfs.backends.buffers cimport Buffer, Pool
from healfs.backends.uring cimport Operation
from healfs.core.request cimport Request


cdef class _Transfer(Operation):
    cdef public Request request
    cdef public object done
    cdef public Buffer buffer
    cdef public tuple modes


@cython.locals(transfer=_Transfer)
cdef _Transfer _transfer(long long opcode, long long fd, Request request, object done)


cdef class _Session:
    cdef public bint blocked
    cdef public long long fd
    cdef public long long flush_fd
    cdef public list fds
    cdef bint _device
    cdef bint _read_only
    cdef long long _alignment
    cdef public Pool _pool
    cdef object _deferred
    cdef list _answers
    cdef bint _alive
    cdef bint _busy
    cdef bint _reported_short
    cdef object _error
    cdef object _scope
    cdef object _served
    cdef public object queue
    cdef public long long ready_fd

    cpdef object submit(self, Request request, object done)
    @cython.locals(buffer=Buffer, transfer=_Transfer)
    cdef object _read(self, Request request, object done)
    @cython.locals(buffer=Buffer, transfer=_Transfer, address="unsigned long long")
    cdef object _write(self, Request request, object done)
    @cython.locals(request=Request, buffer=Buffer, result="long long", error="long long")
    cpdef object complete(self, _Transfer transfer)
    cdef object _push(self, _Transfer transfer)
    cdef long long _reap(self) except -1
    @cython.locals(count="long long", ended="long long")
    cpdef bint commit(self) except -1
    cpdef bint poll(self) except -1
    cdef object _start(self)
