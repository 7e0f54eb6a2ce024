# cython: annotation_typing=False
"""messages.py for a C compiler: the same class, without objects between it and the kernel."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport ENODEV, ENOENT
from libc.errno cimport errno as c_errno
from libc.stdint cimport int32_t, uint32_t, uint64_t


import os

from healfs.fuse import wire

cdef extern from "sys/uio.h":
    struct iovec:
        void *iov_base
        size_t iov_len

    ssize_t readv(int fd, const iovec *parts, int count)
    ssize_t writev(int fd, const iovec *parts, int count)

cdef extern from "linux/fuse.h":
    struct fuse_in_header:
        uint32_t opcode
        uint64_t unique
        uint32_t pid

    struct fuse_write_in:  # a fuse_read_in has these in the same places
        uint64_t offset
        uint32_t size
        uint32_t flags

    struct fuse_out_header:
        uint32_t len
        int32_t error
        uint64_t unique

    struct fuse_write_out:
        uint32_t size
        uint32_t padding


cdef struct WriteReply:
    fuse_out_header header
    fuse_write_out body


cdef class Messages:
    def __init__(self, fuse):
        self._fuse = fuse
        self.header = bytearray(wire.FIXED_SIZE)
        self._fixed = self.header  # it is never resized
        self._memory = None

    cpdef long long read(self, object memory, long long at, long long room) except? -1000000:
        cdef iovec parts[2]
        cdef Py_buffer buffer
        cdef ssize_t length
        if memory is not self._memory:  # nearly always the same as the last time
            PyObject_GetBuffer(memory, &buffer, PyBUF_WRITABLE)
            self._address, self._size = <char *>buffer.buf, buffer.len
            PyBuffer_Release(&buffer)
            self._memory = memory  # so what is behind the address stays
        if at < 0 or room < 0 or at + room > self._size:
            raise ValueError("outside the memory")
        parts[0].iov_base, parts[0].iov_len = self._fixed, 80
        parts[1].iov_base, parts[1].iov_len = self._address + at, room
        length = readv(self._fuse, parts, 2)
        if length < 0:
            return -c_errno
        cdef fuse_in_header *header = <fuse_in_header *>self._fixed
        cdef fuse_write_in *write_in = <fuse_write_in *>(self._fixed + 40)
        self.opcode = header.opcode
        self.unique = header.unique
        self.pid = header.pid
        self.offset = write_in.offset
        self.size = write_in.size
        self.flags = write_in.flags
        return length

    cpdef object reply(self, unsigned long long unique, long long errno):
        cdef fuse_out_header header
        header.len, header.error, header.unique = sizeof(header), -errno, unique
        self._write(&header, sizeof(header), NULL, 0)

    cpdef object reply_read(self, unsigned long long unique, object data):
        cdef fuse_out_header header
        cdef Py_buffer buffer
        PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE)
        try:
            header.len, header.error, header.unique = sizeof(header) + buffer.len, 0, unique
            self._write(&header, sizeof(header), buffer.buf, buffer.len)
        finally:
            PyBuffer_Release(&buffer)

    cpdef object reply_write(self, unsigned long long unique, long long size):
        cdef WriteReply reply
        reply.header.len, reply.header.error, reply.header.unique = sizeof(reply), 0, unique
        reply.body.size, reply.body.padding = size, 0
        self._write(&reply, sizeof(reply), NULL, 0)

    cdef int _write(self, void *head, size_t length, void *data, size_t size) except -1:
        cdef iovec parts[2]
        cdef int error
        parts[0].iov_base, parts[0].iov_len = head, length
        parts[1].iov_base, parts[1].iov_len = data, size
        if writev(self._fuse, parts, 2 if size else 1) < 0:
            error = c_errno
            if error != ENOENT and error != ENODEV:
                raise OSError(error, os.strerror(error))
        return 0
