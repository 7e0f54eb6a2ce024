cimport cython

from healfs.core.overlap cimport Overlap, Range
from healfs.core.request cimport Request
from healfs.core.ring cimport PayloadRing, Slot

cdef long long FREE, SENT, COMPLETED, UNSETTLED, WORDS, FUA, MAY_UNMAP, FOREIGN, _RESERVED
cdef unsigned long long NOWHERE


cdef class Attempt(Range):
    cdef public long long order
    cdef public double until
    cdef public long long record
    cdef public bint foreign
    cdef public list waiters


cdef class WriteLog:
    cdef public long long limit
    cdef object _header
    cdef object _table
    cdef unsigned long long[::1] _words
    cdef unsigned int[:] _states
    cdef public PayloadRing ring
    cdef list _free
    cdef dict _entries
    cdef object _completed
    cdef Overlap _held_ranges
    cdef dict _held
    cdef long long _count
    cdef long long _sequence
    cdef public bint keep

    @cython.locals(slot=Slot)
    cpdef bint enter(self, Request request) except -1
    cdef bint _take_in(self, Request request, Slot slot) except -1
    cdef bint _make_room(self) except -1
    cdef bint _is_stuck(self, Request request) except -1
    @cython.locals(slot=Slot, words="unsigned long long[::1]", at="long long", flags="long long",
                   kind="long long")
    cdef object _write(self, long long index, long long state, Request request)
    cpdef object complete(self, Request request, object hold=*)
    cpdef object leave(self, Request request)
    @cython.locals(slot=Slot)
    cpdef object release(self, Request request)
    @cython.locals(request=Request, slot=Slot, index="long long", states="unsigned int[:]", free=list,
                   entries=dict)
    cpdef object trim(self, long long mark, object hold=*)
    cdef object _stable(self, Request request, object hold)
    cdef bint _hides_held(self, Request request) except -1
