cimport cython

cdef long long _PAGE


cdef class Slot:
    cdef public object data
    cdef public long long place
    cdef public long long end
    cdef public bint free
    cdef public bint pinned
    cdef public object request


cdef class PayloadRing:
    cdef public long long size
    cdef public long long message
    cdef object _memory
    cdef long long _head
    cdef long long _tail
    cdef object _slots
    cdef object _scratch
    cdef public long long overflow
    cdef object _pages
    cdef long long _ready
    cdef public object window

    @cython.locals(place="long long", rest="long long")
    cdef object _room(self, long long length)
    cdef object _make_ready(self, long long end)
    cpdef object target(self)
    cpdef Slot keep(self, long long length)
    @cython.locals(place="long long", slot=Slot)
    cdef Slot _take(self, object window, long long length)
    cpdef object release(self, Slot slot)
    @cython.locals(slot=Slot)
    cpdef object advance(self)
