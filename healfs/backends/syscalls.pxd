cdef extern from *:
    struct healfs_writer


cpdef unsigned long long address_of(object data) except? 0
cpdef long long enter(long long fd, long long submissions)
cpdef long long receive(
    long long fd, object memory, long long at, long long room
) except? -1000000


cdef class Writer:
    cdef public long long fd
    cdef healfs_writer *_writer

    cpdef object push(
        self, long long fd, unsigned long long address, long long length, long long offset
    )
    cpdef object submit(self)
    cpdef long long ready(self)
    cpdef object attend(self, bint attended)
    cpdef long long take(self)
    cpdef object cancel(self)
    cpdef object close(self)
