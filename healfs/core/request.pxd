# What a compiler may know of request.py: see [tool.setuptools] in pyproject.toml.

cimport cython

from healfs.core.overlap cimport Range


cdef class Request(Range):
    cdef public object kind
    cdef public long long offset
    cdef public long long length
    cdef public object on_answer
    cdef public object data
    cdef public bint fua
    cdef public bint may_unmap
    cdef public unsigned long long tag
    cdef public object owner
    cdef public long long caller
    cdef public object process
    cdef public object phase
    cdef public bint answered
    cdef public long long order
    cdef public double arrived
    cdef public double sent
    cdef public double first_error
    cdef public long long errno "error"  # errno is a macro of C
    cdef public long long attempts
    cdef public double retry_at
    cdef public long long blockers
    cdef public list waiters
    cdef public bint indexed
    cdef public long long record
    cdef public long long completed
    cdef public bint internal
    cdef public Request origin

    cdef object _fill(self, object kind, long long offset, long long length, object on_answer,
                      object data, bint fua, bint may_unmap, unsigned long long tag, object owner)


@cython.locals(request=Request)
cpdef Request transfer(object kind, long long offset, long long length, object on_answer,
                       object data, bint fua, unsigned long long tag, object owner)
