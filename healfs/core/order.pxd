from healfs.core.overlap cimport Overlap
from healfs.core.request cimport Request


cdef class Order:
    cdef Overlap _writes

    cpdef object enter(self, Request request)
    cpdef list leave(self, Request request)
