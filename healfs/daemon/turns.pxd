cimport cython

cdef double _SPIN
cdef long long _MISSES


cdef class Turns:
    cdef object _channel
    cdef object _backend
    cdef object _commit
    cdef object _epoll
    cdef object _polled
    cdef long long _fd
    cdef bint _blocked
    cdef long long _misses

    cpdef bint run(self) except -1
    cdef object _poll(self)
    @cython.locals(now=double, began=double)
    cdef object _wait(self)
