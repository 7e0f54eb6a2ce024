cimport cython

from healfs.backends.nbd_transmission cimport Transmission
from healfs.backends.syscalls cimport receive
from healfs.core.request cimport Request


cdef class Link:
    cdef public bint blocked
    cdef public object broken
    cdef public long long end
    cdef public object ended
    cdef public object export
    cdef public long long pos
    cdef public Transmission protocol
    cdef public object readable
    cdef public long long ready_fd
    cdef public long long received
    cdef public double heard
    cdef public bint watched
    cdef public object busy
    cdef public object sock
    cdef public object tls
    cdef public object view
    cdef public object writable_wanted
    cdef public list answers
    cdef long long _piece
    cdef long long _room
    cdef object _seldom

    cpdef object submit(self, Request request, object done)
    cpdef object commit(self)
    @cython.locals(before="long long")
    cpdef bint poll(self) except -1
    @cython.locals(protocol=Transmission, end="long long", wanted="long long", count="long long")
    cdef bint _receive(self) except -1
    @cython.locals(protocol=Transmission, out=list)
    cpdef object send(self)
