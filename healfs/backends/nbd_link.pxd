from healfs.backends.nbd_transmission cimport Transmission


cdef class Link:
    cdef public bint blocked
    cdef public object broken
    cdef public long long end
    cdef public object ended
    cdef public object export
    cdef public object poll
    cdef public long long pos
    cdef public Transmission protocol
    cdef public object readable
    cdef public long long ready_fd
    cdef public object sock
    cdef public object tls
    cdef public object view
    cdef public object writable_wanted

    cpdef object send(self)
