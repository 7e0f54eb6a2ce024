"""SCSI: errno <-> sense, sense data, and which command is which request."""

import errno as e
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from healfs.core.request import Kind
from healfs.device import scsi
from healfs.device.scsi import (
    INVALID_FIELD,
    INVALID_OPCODE,
    INVALID_PARAM_LEN,
    IO_ERROR,
    KIND,
    LBA_OUT_OF_RANGE,
    WRITE_PROTECTED,
    Cdb,
    FormatError,
    Limits,
    Opcode,
    Parameters,
    Sense,
    Status,
    decode,
    describe,
    descriptor_sense,
    direction,
    errno_of,
    fixed_sense,
    outcome,
    parse_cdb,
)

DISK = Limits(blocks=1000)
READ_ONLY = Limits(blocks=1000, read_only=True)

# QEMU's scsi-disk: what is not here is ABORTED COMMAND, I/O PROCESS TERMINATED.
QEMU = {
    e.ENOMEM: (0x4, 0x44, 0x00),
    e.EREMOTEIO: (0x4, 0x44, 0x00),
    e.ENOSPC: (0x7, 0x27, 0x07),
    e.ENOMEDIUM: (0x2, 0x3A, 0x00),
    e.ENODATA: (0x3, 0x11, 0x00),
    e.EINVAL: (0x5, 0x24, 0x00),
}


def cdb6(opcode: int, lba: int, length: int) -> bytes:
    return bytes([opcode]) + lba.to_bytes(3, "big") + bytes([length, 0])


def cdb10(opcode: int, lba: int, length: int, flags: int = 0) -> bytes:
    return struct.pack(">BBIBHB", opcode, flags, lba, 0, length, 0)


def cdb12(opcode: int, lba: int, length: int, flags: int = 0) -> bytes:
    return struct.pack(">BBIIBB", opcode, flags, lba, length, 0, 0)


def cdb16(opcode: int, lba: int, length: int, flags: int = 0) -> bytes:
    return struct.pack(">BBQIBB", opcode, flags, lba, length, 0, 0)


def run(data: bytes, limits: Limits = DISK, payload: bytes = b"") -> object:
    cdb = parse_cdb(data)
    return cdb if isinstance(cdb, Sense) else decode(cdb, limits, payload)


def test_sense_of_every_errno() -> None:
    for errno, name in e.errorcode.items():
        status, sense = outcome(errno)
        if name == "EBADE":
            assert (status, sense) == (Status.RESERVATION_CONFLICT, None)
        elif name == "EDOM":
            assert (status, sense) == (Status.TASK_SET_FULL, None)
        else:
            assert status is Status.CHECK_CONDITION and sense is not None
            assert sense[:3] == QEMU.get(errno, (0xB, 0x00, 0x06)), name
    assert outcome(0) == (Status.GOOD, None)
    assert [int(s) for s in Status] == [0x00, 0x02, 0x18, 0x28]


@pytest.mark.parametrize("errno", [*sorted(set(QEMU) - {e.ENOMEM}), e.EIO])
def test_and_back(errno: int) -> None:
    sense = outcome(errno)[1]
    assert sense is not None and errno_of(*sense[:3]) == errno


@pytest.mark.parametrize(
    ("sense", "errno"),
    [
        ((0x0, 0x00, 0x00), 0),
        ((0x1, 0x17, 0x01), 0),  # recovered
        ((0x2, 0x04, 0x01), e.EIO),
        ((0x3, 0x0C, 0x02), e.ENODATA),  # write error: a medium error too
        ((0x4, 0x15, 0x01), e.EREMOTEIO),
        ((0x5, 0x20, 0x00), e.EOPNOTSUPP),
        ((0x5, 0x21, 0x00), e.EINVAL),
        ((0x5, 0x1A, 0x00), e.EINVAL),
        ((0x6, 0x29, 0x00), e.EAGAIN),
        ((0x7, 0x27, 0x00), e.EROFS),
        ((0xE, 0x1D, 0x00), e.EIO),
    ],
)
def test_errno_of_other_senses(sense: tuple[int, int, int], errno: int) -> None:
    assert errno_of(*sense) == errno


def test_describe() -> None:
    assert scsi.NAME == "scsi"
    assert describe(0) == "status GOOD"
    assert describe(e.ENODATA) == "sense 3/11/00 UNRECOVERED READ ERROR"
    assert describe(e.ECONNRESET) == "sense B/00/06 I/O PROCESS TERMINATED"
    assert describe(e.ENOMEDIUM) == "sense 2/3a/00 MEDIUM NOT PRESENT"
    assert describe(e.EBADE) == "status RESERVATION CONFLICT"
    assert describe(e.EDOM) == "status TASK SET FULL"


def test_guest_errors_and_unit_attentions() -> None:
    assert LBA_OUT_OF_RANGE[:3] == (0x5, 0x21, 0x00)
    assert WRITE_PROTECTED[:3] == (0x7, 0x27, 0x00)
    assert INVALID_OPCODE[:3] == (0x5, 0x20, 0x00)
    assert INVALID_PARAM_LEN[:3] == (0x5, 0x1A, 0x00)
    assert INVALID_FIELD[:3] == (0x5, 0x24, 0x00)
    assert scsi.CAPACITY_CHANGED[:3] == (0x6, 0x2A, 0x09)
    assert scsi.RESET[:3] == (0x6, 0x29, 0x00)


@pytest.mark.parametrize(
    ("information", "data"),
    [
        (None, "70 00 03 00000000 0a 00000000 11 00 00 000000"),
        (0x12345678, "f0 00 03 12345678 0a 00000000 11 00 00 000000"),
        (1 << 32, "70 00 03 00000000 0a 00000000 11 00 00 000000"),
    ],
)
def test_fixed_sense(information: int | None, data: str) -> None:
    assert fixed_sense(scsi.READ_ERROR, information) == bytes.fromhex(data)
    assert len(bytes.fromhex(data)) == 18


@pytest.mark.parametrize(
    ("information", "data"),
    [
        (None, "72 07 27 07 000000 00"),
        (1 << 32, "72 07 27 07 000000 0c 00 0a 80 00 0000000100000000"),
    ],
)
def test_descriptor_sense(information: int | None, data: str) -> None:
    sense = scsi.SPACE_ALLOC_FAILED
    assert descriptor_sense(sense, information) == bytes.fromhex(data)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (cdb6(0x08, 5, 3), Kind.READ),
        (cdb10(0x28, 5, 3), Kind.READ),
        (cdb12(0xA8, 5, 3), Kind.READ),
        (cdb16(0x88, 5, 3), Kind.READ),
        (cdb6(0x0A, 5, 3), Kind.WRITE),
        (cdb10(0x2A, 5, 3), Kind.WRITE),
        (cdb12(0xAA, 5, 3), Kind.WRITE),
        (cdb16(0x8A, 5, 3), Kind.WRITE),
        (cdb10(0x41, 5, 3), Kind.WRITE_ZEROES),
        (cdb16(0x93, 5, 3), Kind.WRITE_ZEROES),
    ],
)
def test_which_request(data: bytes, kind: Kind) -> None:
    pattern = kind is Kind.WRITE_ZEROES
    assert run(data) == (Parameters(kind, 5 * 512, 3 * 512, pattern=pattern),)
    assert run(data, Limits(1000, 4096)) == (Parameters(kind, 5 * 4096, 3 * 4096, pattern=pattern),)


@pytest.mark.parametrize("data", [cdb10(0x35, 5, 3), cdb16(0x91, 1 << 40, 3), cdb10(0x35, 0, 0, 2)])
@pytest.mark.parametrize("limits", [DISK, READ_ONLY])
def test_synchronize_cache_flushes_everything(data: bytes, limits: Limits) -> None:
    assert run(data, limits) == (Parameters(Kind.FLUSH, 0, 0),)


def test_fua() -> None:
    for plain in (cdb10(0x2A, 0, 1), cdb12(0xAA, 0, 1), cdb16(0x8A, 0, 1), cdb6(0x0A, 0, 1)):
        assert run(plain) == (Parameters(Kind.WRITE, 0, 512, fua=False),)
    for fua in (cdb10(0x2A, 0, 1, 8), cdb12(0xAA, 0, 1, 8), cdb16(0x8A, 0, 1, 8)):
        assert run(fua) == (Parameters(Kind.WRITE, 0, 512, fua=True),)
    for verified in (cdb10(0x2E, 0, 1), cdb12(0xAE, 0, 1), cdb16(0x8E, 0, 1)):
        assert run(verified) == (Parameters(Kind.WRITE, 0, 512, fua=True),)


@pytest.mark.parametrize(
    "data",
    [
        *(cdb10(0x28, 5, 3, 8), cdb12(0xA8, 5, 3, 8), cdb16(0x88, 5, 3, 8)),
        *(cdb10(0x2F, 5, 3), cdb12(0xAF, 5, 3), cdb16(0x8F, 5, 3)),
    ],
)
def test_what_reads_the_medium_flushes_first(data: bytes) -> None:
    """SBC-3, 4.15: what a volatile cache has newer is written to the medium before. A read has no
    FUA of its own: its error would be taken for that of a flush."""
    read = Parameters(Kind.READ, 5 * 512, 3 * 512)
    assert run(data) == run(data, READ_ONLY) == (Parameters(Kind.FLUSH, 0, 0), read)


@pytest.mark.parametrize("flags", [2, 4, 6])
def test_verify_compares_with_no_payload(flags: int) -> None:
    for data in cdb10(0x2F, 5, 3, flags), cdb12(0xAF, 5, 3, flags), cdb16(0x8F, 5000, 3, flags):
        assert run(data) == INVALID_FIELD


def test_read_6_has_21_bits_and_256_blocks_at_most() -> None:
    assert parse_cdb(cdb6(0x08, 0xFFFFFF, 0)) == Cdb(Opcode.READ_6, 0, 0x1FFFFF, 256)
    # the LBA's own bits are no FUA
    assert run(cdb6(0x0A, 0x080000, 1), Limits(1 << 21)) == (
        Parameters(Kind.WRITE, 0x080000 * 512, 512),
    )


def test_write_same() -> None:
    zeroes = Kind.WRITE_ZEROES
    assert run(cdb10(0x41, 0, 8, 0x08)) == (
        Parameters(zeroes, 0, 4096, may_unmap=True, pattern=True),
    )
    assert run(cdb16(0x93, 0, 8, 0x09)) == (Parameters(zeroes, 0, 4096, may_unmap=True),)
    assert run(cdb16(0x93, 0, 8, 0x01)) == (Parameters(zeroes, 0, 4096),)
    # WRITE SAME (10) has no NDOB
    assert run(cdb10(0x41, 0, 8, 0x01)) == (Parameters(zeroes, 0, 4096, pattern=True),)
    for flags in (0x10, 0x04, 0x02):
        assert run(cdb16(0x93, 0, 8, flags)) == INVALID_FIELD
    assert run(cdb10(0x41, 0, 0)) == INVALID_FIELD


@pytest.mark.parametrize(
    "data",
    [
        cdb6(0x08, 999, 2),
        cdb6(0x08, 0x1FFFFF, 1),
        cdb10(0x28, 1000, 1),
        cdb10(0x28, 1001, 0),
        cdb10(0x2A, 0, 1001),
        cdb12(0xAA, 0xFFFFFFFF, 0xFFFFFFFF),
        cdb16(0x88, (1 << 64) - 1, 1),
        cdb16(0x8A, (1 << 64) - 1, 2),
        cdb10(0x2F, 999, 2),
        cdb16(0x93, 999, 2),
    ],
)
def test_out_of_range(data: bytes) -> None:
    assert run(data) == LBA_OUT_OF_RANGE


def test_no_blocks_need_no_backend() -> None:
    for data in (cdb10(0x28, 1000, 0), cdb12(0xAA, 0, 0), cdb16(0x8F, 5, 0)):
        assert run(data) == ()


@pytest.mark.parametrize("flags", [0x20, 0x40, 0x80, 0xE0])
def test_protection_information_comes_before_range(flags: int) -> None:
    for opcode in (0x28, 0x2A, 0x2E, 0x2F, 0x41):
        assert run(cdb10(opcode, 5000, 1, flags)) == INVALID_FIELD


@pytest.mark.parametrize("opcode", [o for o in KIND if KIND[o] is Kind.WRITE])
def test_write_protection_comes_first(opcode: Opcode) -> None:
    data = bytes([opcode]) + b"\xff" * 15
    assert run(data, READ_ONLY) == WRITE_PROTECTED


def test_of_unmap_and_write_same_fields_come_first() -> None:
    for data in cdb10(0x41, 0, 0), cdb10(0x41, 0, 8, 0x10), cdb16(0x93, 0, 8, 0x20):
        assert run(data, READ_ONLY) == INVALID_FIELD
    for data in cdb10(0x41, 5000, 8), cdb16(0x93, 0, 8, 0x09):
        assert run(data, READ_ONLY) == WRITE_PROTECTED
    one = unmap((5000, 8))
    assert run(cdb10(0x42, 0, 24, 1), READ_ONLY, one) == INVALID_FIELD
    assert run(cdb10(0x42, 0, 7), READ_ONLY, one) == INVALID_PARAM_LEN
    assert run(cdb10(0x42, 0, 24), READ_ONLY, one) == WRITE_PROTECTED
    assert run(cdb10(0x42, 0, 0), READ_ONLY) == ()


def test_a_read_only_disk_reads() -> None:
    assert run(cdb10(0x28, 0, 1), READ_ONLY) == (Parameters(Kind.READ, 0, 512),)


def unmap(*ranges: tuple[int, int]) -> bytes:
    body = b"".join(struct.pack(">QI4x", *r) for r in ranges)
    return struct.pack(">HH4x", len(body) + 6, len(body)) + body


def run_unmap(payload: bytes, length: int | None = None, flags: int = 0) -> object:
    length = len(payload) if length is None else length
    return run(cdb10(0x42, 0, length, flags), DISK, payload)


def test_unmap() -> None:
    assert run_unmap(unmap((0, 8), (10, 0), (100, 900))) == (
        Parameters(Kind.DISCARD, 0, 4096, may_unmap=True),
        Parameters(Kind.DISCARD, 51200, 900 * 512, may_unmap=True),
    )
    assert run_unmap(b"") == run_unmap(unmap()) == ()
    # one bad range refuses all
    assert run_unmap(unmap((0, 8), (999, 2))) == LBA_OUT_OF_RANGE
    assert run_unmap(unmap(((1 << 64) - 1, 2))) == LBA_OUT_OF_RANGE
    assert run_unmap(unmap((0, 8)), flags=1) == INVALID_FIELD


@pytest.mark.parametrize(
    ("payload", "length"),
    [
        (unmap((0, 8)), 7),
        (unmap((0, 8)), 23),  # cut short
        (unmap((0, 8))[:20], 24),  # less came than was said
        (struct.pack(">HH4x", 100, 16) + bytes(16), 24),
        (struct.pack(">HH4x", 22, 32) + bytes(16), 24),
        (struct.pack(">HH4x", 14, 8) + bytes(8), 16),  # half a descriptor
    ],
)
def test_unmap_of_a_wrong_length(payload: bytes, length: int) -> None:
    assert run_unmap(payload, length) == INVALID_PARAM_LEN


def test_every_operation_code() -> None:
    for opcode in range(256):
        data = bytes([opcode]) + bytes(15)
        if opcode not in set(Opcode):
            assert run(data) == INVALID_OPCODE
        elif opcode not in KIND:
            assert run(data) == ()


@pytest.mark.parametrize("opcode", Opcode)
def test_a_cdb_comes_whole(opcode: Opcode) -> None:
    length = {0: 6, 1: 10, 2: 10, 4: 16, 5: 12}[opcode >> 5]
    with pytest.raises(FormatError, match=opcode.name):
        parse_cdb(bytes([opcode]).ljust(length - 1, b"\0"))
    assert isinstance(parse_cdb(bytes([opcode]).ljust(length, b"\0")), Cdb)
    with pytest.raises(FormatError):
        parse_cdb(b"")


def test_direction_is_the_direction_of_the_data() -> None:
    reads = {Opcode.READ_6, Opcode.READ_10, Opcode.READ_12, Opcode.READ_16}
    for opcode in Opcode:
        wanted = "rerror" if opcode in reads else "werror" if opcode in KIND else None
        assert direction(opcode) == wanted, opcode.name


@given(st.binary(min_size=16, max_size=16), st.binary(max_size=64), st.booleans())
def test_whatever_comes_is_inside_the_disk(data: bytes, payload: bytes, read_only: bool) -> None:
    for opcode in (data[0], *KIND):
        decoded = run(bytes([opcode]) + data[1:], Limits(1 << 30, 512, read_only), payload)
        if isinstance(decoded, Sense):
            assert decoded[0] in (0x5, 0x7) and decoded != IO_ERROR
            continue
        assert isinstance(decoded, tuple)
        for parameters in decoded:
            assert parameters.offset + parameters.length <= 1 << 39
            assert not read_only or parameters.kind in (Kind.READ, Kind.FLUSH)
