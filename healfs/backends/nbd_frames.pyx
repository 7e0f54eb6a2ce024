# cython: annotation_typing=False
"""nbd_frames.py for a C compiler."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef extern from "endian.h":
    uint16_t htobe16(uint16_t)
    uint32_t htobe32(uint32_t)
    uint64_t htobe64(uint64_t)
    uint32_t be32toh(uint32_t)
    uint64_t be64toh(uint64_t)

cdef extern from *:
    """
    struct __attribute__((packed)) healfs_request {
        uint32_t magic;
        uint16_t flags, type;
        uint64_t cookie, offset;
        uint32_t length;
    };

    struct __attribute__((packed)) healfs_reply {
        uint32_t magic, error;
        uint64_t cookie;
        uint32_t length;
        uint64_t offset;
    };
    """
    struct healfs_request:
        uint32_t magic
        uint16_t flags
        uint16_t type
        uint64_t cookie
        uint64_t offset
        uint32_t length

    struct healfs_reply:
        uint32_t magic
        uint32_t error
        uint64_t cookie
        uint32_t length
        uint64_t offset

REQUEST = 0x25609513


cpdef bytes request(
    long long flags, long long type, unsigned long long cookie, unsigned long long offset,
    long long length,
):
    if (flags | type | length) < 0 or (flags | type) > 0xFFFF or length > 0xFFFFFFFF:
        raise OverflowError("no field of a request is as large")
    cdef healfs_request frame
    frame.magic = htobe32(0x25609513)
    frame.flags, frame.type = htobe16(flags), htobe16(type)
    frame.cookie, frame.offset = htobe64(cookie), htobe64(offset)
    frame.length = htobe32(length)
    return PyBytes_FromStringAndSize(<char *>&frame, sizeof(frame))


cdef class Reply:
    cpdef object read(self, object view, long long pos, long long end):
        cdef Py_buffer buffer
        cdef healfs_reply frame
        if view is not self._view:  # nearly always the same as the last time
            PyObject_GetBuffer(view, &buffer, PyBUF_SIMPLE)
            self._address, self._size = <unsigned char *>buffer.buf, buffer.len
            PyBuffer_Release(&buffer)
            self._view = view  # so what is behind the address stays
        if pos < 0 or end - pos < 16 or end > self._size:
            raise ValueError("no reply there")
        frame.length, frame.offset = 0, 0
        memcpy(&frame, self._address + pos, 28 if end - pos >= 28 else 20 if end - pos >= 20 else 16)
        self.magic, self.error = be32toh(frame.magic), be32toh(frame.error)
        self.cookie = be64toh(frame.cookie)
        self.length, self.offset = be32toh(frame.length), be64toh(frame.offset)
