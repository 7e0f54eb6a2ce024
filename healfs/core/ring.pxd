cimport cython

cdef long long _PAGE


cdef class Slot:
    cdef public object data
    cdef public long long place
    cdef public long long end
    cdef public bint free
    cdef public bint pinned
    cdef public object request

    cpdef object fill(self, object data, long long place, long long end)


cdef class PayloadRing:
    cdef public long long size
    cdef public long long message
    cdef public object memory
    cdef public long long at
    cdef long long _head
    cdef long long _tail
    cdef object _slots
    cdef object _scratch
    cdef public long long overflow
    cdef object _pages
    cdef long long _ready
    cdef bint _is_shut

    @cython.locals(place="long long", rest="long long")
    cdef long long _room(self, long long length) except -2
    cdef object _make_ready(self, long long end)
    cpdef object target(self)
    cpdef Slot keep(self, long long length)
    @cython.locals(slot=Slot)
    cdef Slot _take(self, long long place, long long length)
    cpdef object release(self, Slot slot)
    @cython.locals(slot=Slot)
    cpdef object advance(self)
