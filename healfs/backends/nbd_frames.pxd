cpdef bytes request(
    long long flags, long long type, unsigned long long cookie, unsigned long long offset,
    long long length,
)


cdef class Reply:
    cdef public long long magic
    cdef public long long error
    cdef public unsigned long long cookie
    cdef public long long length
    cdef public unsigned long long offset
    cdef object _view
    cdef unsigned char *_address
    cdef long long _size

    cpdef object read(self, object view, long long pos, long long end)
