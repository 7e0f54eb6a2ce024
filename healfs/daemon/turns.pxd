cimport cython

cdef double _SPIN
cdef long long _MISSES


cdef class Turns:
    cdef object _channel
    cdef object _backend
    cdef object _commit
    cdef object _epoll
    cdef object _watched
    cdef long long _fd
    cdef bint _blocked
    cdef object _attended
    cdef long long _misses

    cpdef bint run(self) except -1
    @cython.locals(now=double, until=double, last=double, received="long long", answered="long long",
                   waited=bint)
    cdef bint _run(self) except -1
    cdef object _poll(self)
    cdef object _attend(self, object polled)
    cdef bint _sleep(self) except -1
