cimport cython

from healfs.backends.nbd_frames cimport Reply, request


cdef class Command:
    cdef public long long type
    cdef public long long flags
    cdef public long long offset
    cdef public long long length
    cdef public object context
    cdef public object complete
    cdef public object assembly
    cdef public long long start
    cdef public long long end

    cdef object _fill(self, long long type, long long flags, long long offset, long long length,
                      object context, object complete)


@cython.locals(command=Command)
cpdef Command transfer(long long type, long long offset, long long length, object context,
                       object complete)


cdef class Transmission:
    cdef public list out
    cdef public dict pending
    cdef public long long queued
    cdef public long long sent
    cdef public long long handed
    cdef public long long missing
    cdef public bint closed
    cdef bint _structured
    cdef object _context
    cdef unsigned long long _cookie
    cdef Reply _reply

    @cython.locals(cookie="unsigned long long")
    cpdef object queue(self, Command command, object payload=*)
    @cython.locals(out=list)
    cpdef object taken(self, long long count)
    @cython.locals(pending=dict, command=Command, reply=Reply, magic="long long", word="long long",
                   cookie="unsigned long long", length="long long", after="long long")
    cpdef long long receive(self, object view, long long pos, long long end) except -1
    cdef long long _simple(self, Command command, unsigned long long cookie, long long error, object view, long long pos, long long end) except -1
