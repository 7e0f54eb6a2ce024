"""/dev/fuse, a message at a time: reading with its fixed part parsed, and the common replies.

messages.pyx is the same for a C compiler, and takes the place of this where it was compiled.
"""

from __future__ import annotations

import errno as e
import os
import struct

from healfs.fuse import wire

# fuse_in_header and fuse_read_in or fuse_write_in, what every message needs of them: opcode,
# unique, pid; offset, size, flags
DATA_IN = struct.Struct("<4xIQ16xI4x8xQI12xI4x")
OUT_HEADER, WRITE_REPLY = wire.OUT_HEADER.pack, wire.WRITE_REPLY.pack
# ENOENT: nobody waits for it any more. ENODEV: unmounted.
NOBODY = (e.ENOENT, e.ENODEV)


class Messages:
    """`header` has the first 80 bytes of the message that was read last; what they say as a
    READ or WRITE is in opcode, unique, pid, offset, size (bytes) and flags."""

    def __init__(self, fuse: int) -> None:
        self._fuse = fuse
        self.header = bytearray(wire.FIXED_SIZE)
        self.opcode = 0
        self.unique = 0
        self.pid = 0
        self.offset = 0
        self.size = 0
        self.flags = 0

    def read(self, memory: memoryview, at: int, room: int) -> int:
        """Read one, what follows its first 80 bytes to `room` bytes of memory; its length, or
        -errno."""
        try:
            length = os.readv(self._fuse, (self.header, memory[at : at + room]))
        except OSError as exc:
            return -(exc.errno or e.EIO)
        (self.opcode, self.unique, self.pid, self.offset, self.size, self.flags) = DATA_IN.unpack(
            self.header
        )
        return length

    def reply(self, unique: int, errno: int) -> None:
        """Without a body. Raises OSError, as all replies, but not for want of who waits."""
        self._write((OUT_HEADER(16, -errno, unique),))

    def reply_read(self, unique: int, data: memoryview | bytes | bytearray) -> None:
        self._write((OUT_HEADER(16 + len(data), 0, unique), data))

    def reply_write(self, unique: int, size: int) -> None:
        self._write((WRITE_REPLY(24, 0, unique, size, 0),))

    def _write(self, parts: tuple[bytes | memoryview | bytearray, ...]) -> None:
        try:
            os.writev(self._fuse, parts)
        except OSError as exc:
            if exc.errno not in NOBODY:
                raise
