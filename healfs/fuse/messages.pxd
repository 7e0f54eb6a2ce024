cdef class Messages:
    cdef long long _fuse
    cdef public object header
    cdef unsigned char *_fixed
    cdef object _memory
    cdef char *_address
    cdef long long _size
    cdef public long long opcode
    cdef public unsigned long long unique
    cdef public long long pid
    cdef public unsigned long long offset
    cdef public long long size
    cdef public long long flags

    cpdef long long read(self, object memory, long long at, long long room) except? -1000000
    cpdef object reply(self, unsigned long long unique, long long errno)
    cpdef object reply_read(self, unsigned long long unique, object data)
    cpdef object reply_write(self, unsigned long long unique, long long size)
    cdef int _write(self, void *head, size_t length, void *data, size_t size) except -1
