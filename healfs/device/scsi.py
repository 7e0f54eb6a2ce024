"""SCSI disks: the one table errno <-> sense, and which command is which request. No I/O.

Sections are of SPC-4 (sense data, statuses) and SBC-3 (the commands of disks). The errors are
those of QEMU's scsi-disk, so that a guest sees the same from either. `decode` says what a
command is: sense that refuses it at once (a guest's own error never reaches the policy), or
what the backend has to do.
"""

from __future__ import annotations

import enum
import errno as e
import struct
from dataclasses import dataclass
from typing import Literal, NamedTuple

from healfs.core.request import Kind

NAME = "scsi"


class Status(enum.IntEnum):
    """SAM-5, 5.3.1."""

    GOOD = 0x00
    CHECK_CONDITION = 0x02
    RESERVATION_CONFLICT = 0x18
    TASK_SET_FULL = 0x28


class Sense(NamedTuple):
    """Sense key, additional sense code and its qualifier (SPC-4, 4.5)."""

    key: int
    asc: int
    ascq: int
    text: str

    def __str__(self) -> str:
        return f"sense {self.key:X}/{self.asc:02x}/{self.ascq:02x} {self.text}"


# The backend's errors.
NO_MEDIUM = Sense(0x2, 0x3A, 0x00, "MEDIUM NOT PRESENT")
READ_ERROR = Sense(0x3, 0x11, 0x00, "UNRECOVERED READ ERROR")
TARGET_FAILURE = Sense(0x4, 0x44, 0x00, "INTERNAL TARGET FAILURE")
SPACE_ALLOC_FAILED = Sense(0x7, 0x27, 0x07, "SPACE ALLOCATION FAILED WRITE PROTECT")
IO_ERROR = Sense(0xB, 0x00, 0x06, "I/O PROCESS TERMINATED")
# The guest's own.
INVALID_PARAM_LEN = Sense(0x5, 0x1A, 0x00, "PARAMETER LIST LENGTH ERROR")
INVALID_OPCODE = Sense(0x5, 0x20, 0x00, "INVALID COMMAND OPERATION CODE")
LBA_OUT_OF_RANGE = Sense(0x5, 0x21, 0x00, "LOGICAL BLOCK ADDRESS OUT OF RANGE")
INVALID_FIELD = Sense(0x5, 0x24, 0x00, "INVALID FIELD IN CDB")
WRITE_PROTECTED = Sense(0x7, 0x27, 0x00, "WRITE PROTECTED")
# Unit attentions: news for the guest, no errors.
RESET = Sense(0x6, 0x29, 0x00, "POWER ON, RESET, OR BUS DEVICE RESET OCCURRED")
CAPACITY_CHANGED = Sense(0x6, 0x2A, 0x09, "CAPACITY DATA HAS CHANGED")

# The one table. The first errno of a sense is the one that the sense means.
_SENSE: dict[int, Sense] = {
    e.EREMOTEIO: TARGET_FAILURE,
    e.ENOMEM: TARGET_FAILURE,
    e.ENOSPC: SPACE_ALLOC_FAILED,
    e.ENOMEDIUM: NO_MEDIUM,
    e.ENODATA: READ_ERROR,
    e.EINVAL: INVALID_FIELD,
}
_STATUS: dict[int, Status] = {
    0: Status.GOOD,
    e.EBADE: Status.RESERVATION_CONFLICT,
    e.EDOM: Status.TASK_SET_FULL,
}
_ERRNO: dict[tuple[int, int, int], int] = {
    INVALID_OPCODE[:3]: e.EOPNOTSUPP,
    LBA_OUT_OF_RANGE[:3]: e.EINVAL,
    INVALID_PARAM_LEN[:3]: e.EINVAL,
    WRITE_PROTECTED[:3]: e.EROFS,
    **{sense[:3]: errno for errno, sense in reversed(_SENSE.items())},
}
# What is left is told by its key, as Linux' SCSI layer does: no sense and recovered error are
# success; medium error, hardware error; a unit attention asks for another try.
_ERRNO_OF_KEY = {0x0: 0, 0x1: 0, 0x3: e.ENODATA, 0x4: e.EREMOTEIO, 0x6: e.EAGAIN}


def outcome(errno: int) -> tuple[Status, Sense | None]:
    """Status and sense for a backend's errno (0 is success).

    Takes the errno as the backend gave it; what core.errors.for_guest makes EIO of would be
    IO_ERROR here too.
    """
    if errno in _STATUS:
        return _STATUS[errno], None
    return Status.CHECK_CONDITION, _SENSE.get(errno, IO_ERROR)


def errno_of(key: int, asc: int, ascq: int) -> int:
    """The errno that a sense means; 0 for one that is no error."""
    return _ERRNO.get((key, asc, ascq), _ERRNO_OF_KEY.get(key, e.EIO))


def describe(errno: int) -> str:
    """What this device answers for a backend's errno, as status and events name it."""
    status, sense = outcome(errno)
    return str(sense) if sense else f"status {status.name.replace('_', ' ')}"


def fixed_sense(sense: Sense, information: int | None = None) -> bytes:
    """Sense data in fixed format: 18 bytes (SPC-4, 4.5.3).

    `information` is the LBA of the error; one that does not fit in 4 bytes is left out.
    """
    valid = information is not None and information <= 0xFFFFFFFF
    return struct.pack(
        ">BxBIB4xBB4x",
        0x70 | (0x80 if valid else 0),
        sense.key,
        information if valid else 0,
        10,  # bytes that follow
        sense.asc,
        sense.ascq,
    )


def descriptor_sense(sense: Sense, information: int | None = None) -> bytes:
    """Sense data in descriptor format: 8 bytes, 20 with an LBA (SPC-4, 4.5.2)."""
    descriptor = b""
    if information is not None:
        descriptor = struct.pack(">BBBxQ", 0x00, 10, 0x80, information)
    head = struct.pack(">BBBB3xB", 0x72, sense.key, sense.asc, sense.ascq, len(descriptor))
    return head + descriptor


class Opcode(enum.IntEnum):
    """The commands of a disk (SBC-3, table 31; SPC-4)."""

    TEST_UNIT_READY = 0x00
    REQUEST_SENSE = 0x03
    READ_6 = 0x08
    WRITE_6 = 0x0A
    INQUIRY = 0x12
    MODE_SELECT_6 = 0x15
    MODE_SENSE_6 = 0x1A
    START_STOP_UNIT = 0x1B
    READ_CAPACITY_10 = 0x25
    READ_10 = 0x28
    WRITE_10 = 0x2A
    WRITE_AND_VERIFY_10 = 0x2E
    VERIFY_10 = 0x2F
    SYNCHRONIZE_CACHE_10 = 0x35
    WRITE_SAME_10 = 0x41
    UNMAP = 0x42
    MODE_SELECT_10 = 0x55
    MODE_SENSE_10 = 0x5A
    READ_16 = 0x88
    WRITE_16 = 0x8A
    WRITE_AND_VERIFY_16 = 0x8E
    VERIFY_16 = 0x8F
    SYNCHRONIZE_CACHE_16 = 0x91
    WRITE_SAME_16 = 0x93
    SERVICE_ACTION_IN_16 = 0x9E
    REPORT_LUNS = 0xA0
    READ_12 = 0xA8
    WRITE_12 = 0xAA
    WRITE_AND_VERIFY_12 = 0xAE
    VERIFY_12 = 0xAF


_READ = {Opcode.READ_6, Opcode.READ_10, Opcode.READ_12, Opcode.READ_16}
_WRITE = {Opcode.WRITE_6, Opcode.WRITE_10, Opcode.WRITE_12, Opcode.WRITE_16}
_WRITE_AND_VERIFY = {
    Opcode.WRITE_AND_VERIFY_10,
    Opcode.WRITE_AND_VERIFY_12,
    Opcode.WRITE_AND_VERIFY_16,
}
_VERIFY = {Opcode.VERIFY_10, Opcode.VERIFY_12, Opcode.VERIFY_16}
_SYNCHRONIZE_CACHE = {Opcode.SYNCHRONIZE_CACHE_10, Opcode.SYNCHRONIZE_CACHE_16}
_WRITE_SAME = {Opcode.WRITE_SAME_10, Opcode.WRITE_SAME_16}

#: which command is which request; what is not here the device answers without the backend
KIND: dict[Opcode, Kind] = {
    **dict.fromkeys(_READ, Kind.READ),
    # the medium is read; as in QEMU, it is compared with no payload (BYTCHK)
    **dict.fromkeys(_VERIFY, Kind.READ),
    **dict.fromkeys(_WRITE, Kind.WRITE),
    **dict.fromkeys(_WRITE_AND_VERIFY, Kind.WRITE),
    **dict.fromkeys(_SYNCHRONIZE_CACHE, Kind.FLUSH),
    **dict.fromkeys(_WRITE_SAME, Kind.WRITE_ZEROES),
    Opcode.UNMAP: Kind.DISCARD,
}


def direction(opcode: Opcode) -> Literal["rerror", "werror"] | None:
    """Whose policy an error meets: rerror where data comes from the device, else werror.

    None where the backend is not asked.
    """
    if opcode not in KIND:
        return None
    return "rerror" if opcode in _READ else "werror"


@dataclass(frozen=True, slots=True)
class Limits:
    """The disk as READ CAPACITY shows it."""

    blocks: int
    block_size: int = 512  # bytes
    read_only: bool = False


class FormatError(ValueError):
    """Not a command at all: its CDB is shorter than its operation code says."""


class Cdb(NamedTuple):
    """A command descriptor block, its fields where SBC-3 has them. LBA and length in blocks."""

    opcode: Opcode
    flags: int  # byte 1; of the 6-byte commands 0: there it holds bits of the LBA
    lba: int
    length: int  # of UNMAP: bytes of its parameter list


class Parameters(NamedTuple):
    """What the backend has to do: the fields of a core Request. Bytes.

    A WRITE_ZEROES of a WRITE SAME is one only if its one block of payload is all zeroes
    (`pattern` says that there is one); else it is a WRITE of that block, again and again.
    """

    kind: Kind
    offset: int
    length: int
    fua: bool = False
    may_unmap: bool = False
    pattern: bool = False


# By the group code, the operation code's upper three bits: layout of LBA and length (SPC-4, 4.3).
_LAYOUT = {
    1: struct.Struct(">xxIxHx"),
    2: struct.Struct(">xxIxHx"),
    4: struct.Struct(">xxQIxx"),
    5: struct.Struct(">xxIIxx"),
}


def parse_cdb(cdb: bytes | memoryview) -> Cdb | Sense:
    """The fields of a command, or the sense that refuses it. Raises FormatError.

    Of commands that are not in KIND only the operation code means anything.
    """
    if not cdb:
        raise FormatError("empty CDB")
    try:
        opcode = Opcode(cdb[0])
    except ValueError:
        return INVALID_OPCODE
    group = opcode >> 5
    needed = 6 if group == 0 else _LAYOUT[group].size
    if len(cdb) < needed:
        raise FormatError(f"CDB of {len(cdb)} bytes, {opcode.name} has {needed}")
    if group == 0:
        # 21 bits of LBA; a length of 0 means 256 blocks (SBC-3, 5.10).
        return Cdb(opcode, 0, int.from_bytes(cdb[1:4], "big") & 0x1FFFFF, cdb[4] or 256)
    lba, length = _LAYOUT[group].unpack_from(cdb)
    return Cdb(opcode, cdb[1], lba, length)


_FUA = 0x08
_UNMAP_BIT = 0x08
_NDOB = 0x01  # WRITE SAME (16): no data-out buffer, the pattern is zeroes
_BYTCHK = 0x06  # of VERIFY: there is a payload to compare with
_PROTECT = 0xE0  # protection information, which no disk of ours has
_SAME_UNSUPPORTED = 0x16  # ANCHOR, PBDATA, LBDATA


def decode(
    cdb: Cdb, limits: Limits, payload: bytes | memoryview = b""
) -> Sense | tuple[Parameters, ...]:
    """The sense that refuses a command, or what the backend has to do, in order.

    `payload` is UNMAP's parameter list. An empty tuple needs no backend. The order of checks is
    QEMU's: write protection, fields, range; of UNMAP and WRITE SAME fields first.
    """
    kind = KIND.get(cdb.opcode)
    if kind is None:
        return ()
    if kind is Kind.FLUSH:
        # The range is a hint: a flush of everything is always enough (SBC-3, 5.22).
        return (Parameters(kind, 0, 0),)
    if kind is Kind.DISCARD:
        return _decode_unmap(cdb, limits, payload)
    same = cdb.opcode in _WRITE_SAME
    # A length of 0 would mean "to the end of the disk"; as in QEMU, VPD page B0 says that it
    # is refused (WSNZ).
    if same and (cdb.flags & (_PROTECT | _SAME_UNSUPPORTED) or not cdb.length):
        return INVALID_FIELD
    if limits.read_only and kind is not Kind.READ:
        return WRITE_PROTECTED
    verify = cdb.opcode in _VERIFY
    if cdb.flags & (_PROTECT | _BYTCHK if verify else _PROTECT):
        return INVALID_FIELD
    if cdb.lba + cdb.length > limits.blocks:
        return LBA_OUT_OF_RANGE
    if not cdb.length:
        return ()
    fua = cdb.opcode in _READ | _WRITE and bool(cdb.flags & _FUA)
    whole = Parameters(
        kind,
        cdb.lba * limits.block_size,
        cdb.length * limits.block_size,
        # What was verified was read from the medium, so it is on it.
        fua=kind is Kind.WRITE and (fua or cdb.opcode in _WRITE_AND_VERIFY),
        may_unmap=same and bool(cdb.flags & _UNMAP_BIT),
        pattern=same and not (cdb.opcode is Opcode.WRITE_SAME_16 and cdb.flags & _NDOB),
    )
    if kind is Kind.READ and (fua or verify):  # of the medium: what a cache has newer goes there
        return (Parameters(Kind.FLUSH, 0, 0), whole)
    return (whole,)


def _decode_unmap(
    cdb: Cdb, limits: Limits, payload: bytes | memoryview
) -> Sense | tuple[Parameters, ...]:
    """SBC-3, 5.28: a header of 8 bytes, descriptors of 16 (LBA, blocks, reserved)."""
    if cdb.flags & 1:  # ANCHOR
        return INVALID_FIELD
    if not cdb.length:
        return ()  # no data is no error
    if cdb.length < 8 or len(payload) < cdb.length:
        return INVALID_PARAM_LEN
    data_length, descriptors = struct.unpack_from(">HH", payload)
    if cdb.length < data_length + 2 or cdb.length < descriptors + 8 or descriptors % 16:
        return INVALID_PARAM_LEN
    if limits.read_only:
        return WRITE_PROTECTED
    ranges = list(struct.iter_unpack(">QI4x", payload[8 : 8 + descriptors]))
    # All are checked before any is done: a refused command has done nothing.
    if any(lba + blocks > limits.blocks for lba, blocks in ranges):
        return LBA_OUT_OF_RANGE
    size = limits.block_size
    return tuple(
        Parameters(Kind.DISCARD, lba * size, blocks * size, may_unmap=True)
        for lba, blocks in ranges
        if blocks
    )
