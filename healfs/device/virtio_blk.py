"""virtio-blk's request format and checks (virtio 1.2, section 5.2.6), without I/O.

`check` says what a guest's request is: a status that refuses it at once (a guest's own error
never reaches the policy), or what the backend has to do.
"""

from __future__ import annotations

import enum
import errno as e
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from healfs.core.errors import for_guest
from healfs.core.request import Kind

NAME = "virtio-blk"

SECTOR = 512  # the unit of every sector field, whatever the logical block size (5.2.4)
ID_BYTES = 20  # of GET_ID's answer
MAX_SECTORS = 4194303  # QEMU's BDRV_REQUEST_MAX_SECTORS: 2 GiB less a sector

_HEADER = struct.Struct("<IIQ")
_SEGMENT = struct.Struct("<QII")
_UNMAP = 1  # the one flag of a segment


class Type(enum.IntEnum):
    """`type` of struct virtio_blk_req (5.2.6)."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


class Status(enum.IntEnum):
    """`status` of struct virtio_blk_req (5.2.6)."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


#: whose policy an error of this type meets; GET_ID never asks the backend
DIRECTION: dict[Type, Literal["rerror", "werror"] | None] = {
    Type.IN: "rerror",
    Type.OUT: "werror",
    Type.FLUSH: "werror",
    Type.GET_ID: None,
    Type.DISCARD: "werror",
    Type.WRITE_ZEROES: "werror",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """The disk as the device's configuration shows it (5.2.4); the defaults are QEMU's."""

    capacity: int  # sectors
    logical_block: int = 512  # bytes
    read_only: bool = False
    queue_size: int = 256
    max_sectors: int = MAX_SECTORS
    max_discard_sectors: int = MAX_SECTORS
    max_discard_seg: int = 1
    max_write_zeroes_sectors: int = MAX_SECTORS
    max_write_zeroes_seg: int = 1

    @property
    def seg_max(self) -> int:
        """Data segments of one request: two descriptors are the header and the status."""
        return self.queue_size - 2


class FormatError(ValueError):
    """Not a request at all: too short to hold its header or its status (5.2.6.1)."""


class Header(NamedTuple):
    type: int
    reserved: int
    sector: int


class Segment(NamedTuple):
    """struct virtio_blk_discard_write_zeroes (5.2.6)."""

    sector: int
    num_sectors: int
    flags: int


class Parameters(NamedTuple):
    """What the backend has to do: the fields of a core Request. Bytes."""

    kind: Kind
    offset: int
    length: int
    may_unmap: bool = False


def parse_header(data: bytes | memoryview) -> Header:
    """The first 16 bytes of a request. Raises FormatError."""
    if len(data) < _HEADER.size:
        raise FormatError(f"virtio-blk header of {len(data)} bytes, 16 needed")
    return Header(*_HEADER.unpack_from(data))


def parse_segments(data: bytes | memoryview) -> list[Segment]:
    """The payload of DISCARD and WRITE_ZEROES. Raises FormatError.

    5.2.6.1: its length MUST be a multiple of 16.
    """
    if not data or len(data) % _SEGMENT.size:
        raise FormatError(f"virtio-blk segments of {len(data)} bytes, not a multiple of 16")
    return [Segment(*fields) for fields in _SEGMENT.iter_unpack(data)]


def check(
    header: Header, length: int, limits: Limits, segments: Sequence[Segment] = ()
) -> Status | tuple[Parameters, ...]:
    """A status that refuses the request, or what the backend has to do, in order.

    `length` is the payload of IN and OUT in bytes. An empty tuple needs no backend and is
    answered OK: GET_ID, and whatever covers no bytes.
    """
    match header.type:
        case Type.IN | Type.OUT:
            return _check_transfer(header, length, limits)
        case Type.FLUSH:
            # The driver MUST set sector to 0 (5.2.6.1); the device has no use for it.
            return (Parameters(Kind.FLUSH, 0, 0),)
        case Type.GET_ID:
            return ()
        case Type.DISCARD | Type.WRITE_ZEROES:
            return _check_segments(Type(header.type), limits, segments)
    return Status.UNSUPP


def _check_transfer(header: Header, length: int, limits: Limits) -> Status | tuple[Parameters, ...]:
    write = header.type == Type.OUT
    # 5.2.6.1: the length MUST be a multiple of 512.
    if length % SECTOR or not _range_ok(
        header.sector, length // SECTOR, limits.max_sectors, limits
    ):
        return Status.IOERR
    # 5.2.6.2: a device MUST set IOERR for a write request if VIRTIO_BLK_F_RO is offered.
    if write and limits.read_only:
        return Status.IOERR
    if not length:
        return ()
    kind = Kind.WRITE if write else Kind.READ
    return (Parameters(kind, header.sector * SECTOR, length),)


def _check_segments(
    type_: Type, limits: Limits, segments: Sequence[Segment]
) -> Status | tuple[Parameters, ...]:
    discard = type_ is Type.DISCARD
    kind = Kind.DISCARD if discard else Kind.WRITE_ZEROES
    most = limits.max_discard_seg if discard else limits.max_write_zeroes_seg
    longest = limits.max_discard_sectors if discard else limits.max_write_zeroes_sectors
    # All are checked before any is done: a refused request has done nothing.
    if not 0 < len(segments) <= most:
        return Status.UNSUPP
    for sector, count, flags in segments:
        if not _range_ok(sector, count, longest, limits):
            return Status.IOERR
        # 5.2.6.2: MUST set UNSUPP if any unknown flag is set, and for a discard with unmap.
        if flags & ~_UNMAP or (discard and flags & _UNMAP):
            return Status.UNSUPP
    if limits.read_only:
        return Status.IOERR
    return tuple(
        Parameters(kind, sector * SECTOR, count * SECTOR, may_unmap=bool(flags & _UNMAP))
        for sector, count, flags in segments
        if count
    )


def _range_ok(sector: int, count: int, most: int, limits: Limits) -> bool:
    """5.2.6.1: no request beyond capacity; 5.2.4: logical blocks are the unit of a request."""
    block = limits.logical_block // SECTOR
    return (
        count <= most
        and sector % block == 0
        and count % block == 0
        and sector + count <= limits.capacity
    )


def device_id(serial: str) -> bytes:
    """GET_ID's answer: 20 bytes, padded with zeroes, with no zero at the end when it is full."""
    return serial.encode("ascii", "replace")[:ID_BYTES].ljust(ID_BYTES, b"\0")


def status(errno: int) -> Status:
    """The status byte for a backend's errno (0 is success)."""
    if errno == 0:
        return Status.OK
    return Status.UNSUPP if for_guest(errno) == e.EOPNOTSUPP else Status.IOERR


def describe(errno: int) -> str:
    """What this device answers for a backend's errno, as status and events name it."""
    return f"VIRTIO_BLK_S_{status(errno).name}"
