"""The FUSE messages that healfs reads itself (include/uapi/linux/fuse.h), as structs.

Offsets named *_AT count from the start of the message, header included.
"""

from __future__ import annotations

import os
import struct

# fuse_in_header: len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
IN_HEADER = struct.Struct("<IIQQIIIHH")
# fuse_out_header: len, error (negative errno), unique
OUT_HEADER = struct.Struct("<IiQ")
# fuse_read_in and fuse_write_in: fh, offset, size, read_flags/write_flags, lock_owner, flags, pad
RW_IN = struct.Struct("<QQIIQII")
# fuse_out_header and fuse_write_out (size, padding) in one
WRITE_REPLY = struct.Struct("<IiQII")
# fuse_fallocate_in: fh, offset, length, mode, padding
FALLOCATE_IN = struct.Struct("<QQQII")
# fuse_lseek_in: fh, offset, whence, padding
LSEEK_IN = struct.Struct("<QQII")
# fuse_out_header and fuse_lseek_out (offset)
LSEEK_REPLY = struct.Struct("<IiQQ")
# fuse_interrupt_in: unique of the request that is interrupted
INTERRUPT_IN = struct.Struct("<Q")

OPEN = 14
READ = 15
WRITE = 16
FSYNC = 20
INIT = 26
INTERRUPT = 36
DESTROY = 38
FALLOCATE = 43
LSEEK = 46

HEADER_SIZE = IN_HEADER.size  # 40
FIXED_SIZE = HEADER_SIZE + RW_IN.size  # 80: where a WRITE's payload begins
MAX_WRITE = 1 << 20

# fuse_init_in: major, minor, max_readahead, flags, flags2, ...
INIT_IN_FLAGS_AT = 52
INIT_IN_FLAGS2_AT = 56
# fuse_init_out: major, minor, max_readahead, flags, max_background (u16),
# congestion_threshold (u16), max_write, time_gran, max_pages (u16), map_alignment (u16), flags2
INIT_OUT_FLAGS_AT = 28
INIT_OUT_BACKGROUND_AT = 32
INIT_OUT_MAX_WRITE_AT = 36
INIT_OUT_FLAGS2_AT = 48
INIT_OUT_SIZE = 80
# fuse_open_out: fh, open_flags, backing_id
OPEN_OUT_FLAGS_AT = 24

SPLICE_FLAGS = 1 << 7 | 1 << 8 | 1 << 9  # FUSE_SPLICE_WRITE, _MOVE, _READ
INIT_EXT = 1 << 30
HAS_RESEND_FLAGS2 = 1 << (39 - 32)
FOPEN_DIRECT_IO = 1 << 0
FOPEN_PARALLEL_DIRECT_WRITES = 1 << 6
MAX_BACKGROUND = 65535

NOTIFY_RESEND = 7  # Linux 6.9 and later

FALLOC_KEEP_SIZE = 0x01
FALLOC_PUNCH_HOLE = 0x02
FALLOC_ZERO_RANGE = 0x10
SEEK_DATA = os.SEEK_DATA
SEEK_HOLE = os.SEEK_HOLE
O_DSYNC = os.O_DSYNC  # O_SYNC contains this bit


def offers_resend(init: bytes) -> bool:
    """Does the kernel that sent this INIT request know FUSE_NOTIFY_RESEND?"""
    (flags2,) = struct.unpack_from("<I", init, INIT_IN_FLAGS2_AT)
    return bool(flags2 & HAS_RESEND_FLAGS2)


def without_splice(init: bytearray) -> None:
    """Clear the splice flags in an INIT request: a socketpair cannot splice."""
    (flags,) = struct.unpack_from("<I", init, INIT_IN_FLAGS_AT)
    struct.pack_into("<I", init, INIT_IN_FLAGS_AT, flags & ~SPLICE_FLAGS)


def for_healfs(reply: bytearray) -> int:
    """Set in an INIT reply what libfuse does not; returns max_write in bytes.

    max_background: the default of 12 leaves the 13th asynchronous request waiting in the kernel.
    """
    (flags,) = struct.unpack_from("<I", reply, INIT_OUT_FLAGS_AT)
    (flags2,) = struct.unpack_from("<I", reply, INIT_OUT_FLAGS2_AT)
    struct.pack_into("<I", reply, INIT_OUT_FLAGS_AT, flags | INIT_EXT)
    struct.pack_into("<HH", reply, INIT_OUT_BACKGROUND_AT, MAX_BACKGROUND, MAX_BACKGROUND)
    struct.pack_into("<I", reply, INIT_OUT_FLAGS2_AT, flags2 | HAS_RESEND_FLAGS2)
    (max_write,) = struct.unpack_from("<I", reply, INIT_OUT_MAX_WRITE_AT)
    return int(max_write)


def parallel_direct(reply: bytearray) -> None:
    """Set in an OPEN reply: no page cache above healfs, and writes side by side."""
    (flags,) = struct.unpack_from("<I", reply, OPEN_OUT_FLAGS_AT)
    flags |= FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES
    struct.pack_into("<I", reply, OPEN_OUT_FLAGS_AT, flags)
