cimport cython


cdef class Range:
    cdef public long long start
    cdef public long long end


cdef long long _FINEST


cdef class Overlap:
    cdef dict _grids
    cdef long long _count

    @cython.locals(grid=dict, shift="long long", first="long long", last="long long", start="long long",
                   end="long long")
    cpdef object add(self, Range item)
    @cython.locals(grid=dict, grids=dict, cell="long long", start="long long")
    cpdef bint add_alone(self, Range item) except -1
    @cython.locals(grid=dict, shift="long long", first="long long", last="long long", start="long long",
                   end="long long")
    cpdef object remove(self, Range item)
    @cython.locals(grid=dict, first="long long", last="long long", x=Range)
    cpdef list find(self, long long start, long long end)
