cdef class Turns:
    cdef object _channel
    cdef object _backend
    cdef object _commit
    cdef object _epoll
    cdef object _polled
    cdef long long _fd
    cdef bint _blocked

    cpdef bint run(self) except -1
    cdef object _poll(self)
    cdef object _wait(self)
