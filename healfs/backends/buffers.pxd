cimport cython

cdef long long _PAGE, _PAGE_SHIFT


cdef class Buffer:
    cdef public unsigned long long address
    cdef public long long order
    cdef public object view
    cdef long long _length

    cpdef object first(self, long long length)


cdef class Pool:
    cdef long long _limit
    cdef long long _allocated
    cdef list _free

    @cython.locals(free=list, others=list, order="long long")
    cpdef Buffer take(self, long long length)
    @cython.locals(free=list)
    cpdef object give(self, Buffer buffer)
