cimport cython


cdef class Totals:
    cdef public list requests
    cdef public list bytes
    cdef public list errors
    cdef public long long retries
    cdef public long long reconnects
    cdef public long long ignored_bytes
    cdef public long long failed_by_operator

    @cython.locals(index="long long")
    cpdef object count(self, object kind, long long length, long long errno)
