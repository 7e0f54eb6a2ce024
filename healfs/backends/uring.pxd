cimport cython

from healfs.backends.syscalls cimport Writer, enter

cdef long long _U32, _FALLOCATE, _ASYNC, _WRITE, _FSYNC, _FEW
cdef unsigned long long _CANCEL


cdef class Operation:
    cdef public unsigned long long address
    cdef public long long fd
    cdef public long long flags
    cdef public long long length
    cdef public long long offset
    cdef public long long opcode
    cdef public long long result
    cdef public object view


cdef class Ring:
    cdef object _complete
    cdef long long _patience
    cdef long long _ring
    cdef public long long fd
    cdef Writer _writer
    cdef object _both
    cdef list _written
    cdef long long _to_take
    cdef long long _writes
    cdef object _to_write
    cdef bint _handed
    cdef bint _syncing
    cdef list _pending
    cdef list _free
    cdef object _waiting
    cdef long long _tail
    cdef long long _submitted
    cdef bint _slow
    cdef long long _entries
    cdef object _rings
    cdef object _entries_map
    cdef unsigned long long[::1] _sqes
    cdef unsigned int[::1] _u32
    cdef int[::1] _s32
    cdef unsigned long long[::1] _u64
    cdef long long _sq_tail
    cdef long long _cq_head
    cdef long long _cq_tail
    cdef long long _sq_mask
    cdef long long _cq_mask
    cdef long long _cqes

    cpdef object push(self, Operation operation)
    @cython.locals(writer=Writer)
    cdef object _write(self, Operation o)
    @cython.locals(user_data="long long", opcode="unsigned long long", address="unsigned long long",
                   length="unsigned long long", flags="unsigned long long", at="long long",
                   sqes="unsigned long long[::1]")
    cdef object _pack(self, Operation o)
    @cython.locals(todo="long long", taken="long long", ready="long long")
    cpdef object submit(self)
    @cython.locals(u32="unsigned int[::1]", s32="int[::1]", u64="unsigned long long[::1]",
                   head="long long", end="long long", at="long long", mask="long long",
                   cqes="long long", user_data="long long", pending=list, free=list, ended=list,
                   operation=Operation)
    cpdef long long reap(self) except -1
    @cython.locals(writer=Writer, written=list, operation=Operation, place="long long")
    cdef object _reap_written(self, list ended)
    cdef long long _completed(self, list ended) except -1
    cpdef object attend(self, bint attended)
    cpdef bint unsubmitted(self)
    cpdef long long pending(self)
