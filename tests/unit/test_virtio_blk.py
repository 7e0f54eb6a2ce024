"""virtio-blk requests: the format, and the order of checks (virtio 1.2, 5.2.6)."""

import errno as e
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from healfs.core.policy import Action, DirectionPolicy, Policy
from healfs.core.request import Kind
from healfs.device import virtio_blk
from healfs.device.virtio_blk import (
    DIRECTION,
    MAX_SECTORS,
    FormatError,
    Header,
    Limits,
    Parameters,
    Segment,
    Status,
    Type,
    check,
    describe,
    device_id,
    parse_header,
    parse_segments,
    status,
)

IOERR, UNSUPP = Status.IOERR, Status.UNSUPP
HUGE = Limits(capacity=1 << 40)
DISK = Limits(capacity=2048)  # 1 MiB
READ_ONLY = Limits(capacity=2048, read_only=True)
BLOCKS_4K = Limits(capacity=2048, logical_block=4096)
SEGMENTED = (Type.DISCARD, Type.WRITE_ZEROES)


def check_segments(type_: int, *segments: Segment, limits: Limits = DISK) -> object:
    return check(Header(type_, 0, 0), 0, limits, segments)


def test_header_is_little_endian_and_16_bytes() -> None:
    data = bytes.fromhex("0d000000 78563412 0807060504030201 ff".replace(" ", ""))
    assert parse_header(data) == Header(13, 0x12345678, 0x0102030405060708)


@pytest.mark.parametrize("length", [0, 1, 15])
def test_short_header(length: int) -> None:
    with pytest.raises(FormatError, match=f"{length} bytes, 16 needed"):
        parse_header(bytes(length))


def test_segments_are_little_endian() -> None:
    data = struct.pack("<QII", 1 << 33, 2, 1) + struct.pack("<QII", 3, 0xFFFFFFFF, 1 << 31)
    assert parse_segments(data) == [Segment(1 << 33, 2, 1), Segment(3, 0xFFFFFFFF, 1 << 31)]


@pytest.mark.parametrize("length", [0, 8, 15, 17, 31])
def test_segments_come_whole(length: int) -> None:
    with pytest.raises(FormatError):
        parse_segments(bytes(length))


def test_accepted() -> None:
    assert check(Header(Type.IN, 0, 8), 4096, DISK) == (Parameters(Kind.READ, 4096, 4096),)
    assert check(Header(Type.OUT, 0, 2047), 512, DISK) == (Parameters(Kind.WRITE, 2047 * 512, 512),)
    assert check(Header(Type.FLUSH, 0, 0), 0, DISK) == (Parameters(Kind.FLUSH, 0, 0),)
    assert check_segments(Type.DISCARD, Segment(8, 16, 0)) == (
        Parameters(Kind.DISCARD, 4096, 8192),
    )
    for unmap in (False, True):
        assert check_segments(Type.WRITE_ZEROES, Segment(0, 2048, int(unmap))) == (
            Parameters(Kind.WRITE_ZEROES, 0, 1 << 20, may_unmap=unmap),
        )


def test_what_needs_no_backend() -> None:
    assert check(Header(Type.GET_ID, 0, 0), 20, DISK) == ()
    assert check(Header(Type.IN, 0, 2048), 0, DISK) == ()
    assert check_segments(Type.DISCARD, Segment(2048, 0, 0)) == ()


@pytest.mark.parametrize("type_", [Type.IN, Type.OUT])
@pytest.mark.parametrize(
    ("sector", "length", "limits"),
    [
        (0, (MAX_SECTORS + 1) * 512, HUGE),  # too many sectors
        (0, 511, DISK),  # no whole sector
        (0, 513, DISK),
        (2048, 512, DISK),  # out of range
        (2047, 1024, DISK),
        (2049, 0, DISK),
        ((1 << 64) - 1, 512, DISK),  # a sum that wraps in 64 bits
        ((1 << 64) - 1, 1024, HUGE),
        (1, 4096, BLOCKS_4K),  # misaligned
        (8, 512, BLOCKS_4K),
    ],
)
def test_transfer_refused(type_: Type, sector: int, length: int, limits: Limits) -> None:
    assert check(Header(type_, 0, sector), length, limits) is IOERR


def test_the_limit_itself_is_allowed() -> None:
    longest = MAX_SECTORS * 512
    assert check(Header(Type.OUT, 0, 0), longest, HUGE) == (Parameters(Kind.WRITE, 0, longest),)
    for type_ in SEGMENTED:
        assert not isinstance(
            check_segments(type_, Segment(0, MAX_SECTORS, 0), limits=HUGE), Status
        )


@pytest.mark.parametrize("type_", SEGMENTED)
@pytest.mark.parametrize("flags", [0, 1, 2, 0x80000001])
@pytest.mark.parametrize(
    ("sector", "count", "limits"),
    [
        (0, MAX_SECTORS + 1, HUGE),
        (2048, 1, DISK),
        (2000, 49, DISK),
        ((1 << 64) - 1, 1, DISK),
        (4, 8, BLOCKS_4K),
        (8, 4, BLOCKS_4K),
    ],
)
def test_range_comes_before_flags(
    type_: Type, flags: int, sector: int, count: int, limits: Limits
) -> None:
    assert check_segments(type_, Segment(sector, count, flags), limits=limits) is IOERR


@pytest.mark.parametrize("limits", [DISK, READ_ONLY])
def test_flags_come_before_read_only(limits: Limits) -> None:
    for type_ in SEGMENTED:
        for flags in (2, 3, 0x80000000):
            assert check_segments(type_, Segment(0, 8, flags), limits=limits) is UNSUPP
    assert check_segments(Type.DISCARD, Segment(0, 8, 1), limits=limits) is UNSUPP


@pytest.mark.parametrize("type_", SEGMENTED)
def test_segments_up_to_the_limit(type_: Type) -> None:
    two = (Segment(0, 8, 0), Segment(16, 8, 0))
    assert check_segments(type_, *two) is UNSUPP  # QEMU's limit is one
    assert check_segments(type_) is UNSUPP
    more = Limits(2048, max_discard_seg=2, max_write_zeroes_seg=2)
    accepted = check_segments(type_, *two, limits=more)
    assert isinstance(accepted, tuple) and [p.offset for p in accepted] == [0, 8192]
    # one bad segment refuses all
    assert check_segments(type_, two[0], Segment(2048, 1, 0), limits=more) is IOERR


@pytest.mark.parametrize("type_", [2, 3, 5, 7, 9, 10, 12, 14, 0x80000000, 0x80000001])
@pytest.mark.parametrize("limits", [DISK, READ_ONLY])
def test_unknown_type(type_: int, limits: Limits) -> None:
    # whatever else is wrong with it
    assert check(Header(type_, 0, 1 << 63), 7, limits, [Segment(0, 8, 2)]) is UNSUPP


def test_read_only_disk() -> None:
    assert check(Header(Type.OUT, 0, 0), 512, READ_ONLY) is IOERR
    assert check(Header(Type.OUT, 0, 0), 0, READ_ONLY) is IOERR
    for type_ in SEGMENTED:
        assert check_segments(type_, Segment(0, 8, 0), limits=READ_ONLY) is IOERR
    assert check(Header(Type.IN, 0, 0), 512, READ_ONLY) == (Parameters(Kind.READ, 0, 512),)
    assert check(Header(Type.FLUSH, 0, 0), 0, READ_ONLY) == (Parameters(Kind.FLUSH, 0, 0),)
    assert check(Header(Type.GET_ID, 0, 0), 20, READ_ONLY) == ()


@given(
    header=st.builds(Header, st.integers(0, 20), st.just(0), st.integers(0, (1 << 64) - 1)),
    length=st.integers(0, 1 << 32),
    segments=st.lists(
        st.builds(Segment, st.integers(0, 4096), st.integers(0, 4096), st.integers(0, 3)),
        max_size=2,
    ),
    limits=st.sampled_from([DISK, READ_ONLY, BLOCKS_4K]),
)
def test_what_is_accepted_is_inside_the_disk(
    header: Header, length: int, segments: list[Segment], limits: Limits
) -> None:
    accepted = check(header, length, limits, segments)
    if isinstance(accepted, Status):
        assert accepted is not Status.OK
        return
    for parameters in accepted:
        assert 0 <= parameters.offset <= parameters.offset + parameters.length <= 1 << 20
        assert parameters.offset % limits.logical_block == 0
        assert parameters.length % limits.logical_block == 0
        assert not limits.read_only or parameters.kind in (Kind.READ, Kind.FLUSH)


def test_qemus_limits() -> None:
    assert DISK.seg_max == DISK.queue_size - 2 == 254
    assert (DISK.max_discard_seg, DISK.max_discard_sectors) == (1, 4194303)
    assert (DISK.max_write_zeroes_seg, DISK.max_write_zeroes_sectors) == (1, 4194303)


@pytest.mark.parametrize(
    ("serial", "answer"),
    [("", bytes(20)), ("disk", b"disk" + bytes(16)), ("x" * 20, b"x" * 20), ("y" * 30, b"y" * 20)],
)
def test_get_id(serial: str, answer: bytes) -> None:
    assert device_id(serial) == answer


def test_status_of_every_errno() -> None:
    assert (Status.OK, Status.IOERR, Status.UNSUPP) == (0, 1, 2)
    assert status(0) is Status.OK
    for errno, name in e.errorcode.items():
        unsupported = name in ("EOPNOTSUPP", "ENOTSUP", "ENOSYS", "ENOTTY", "ENOTBLK")
        assert status(errno) is (UNSUPP if unsupported else IOERR), name


def test_describe() -> None:
    assert virtio_blk.NAME == "virtio-blk"
    assert describe(0) == "VIRTIO_BLK_S_OK"
    assert describe(e.ECONNRESET) == "VIRTIO_BLK_S_IOERR"
    assert describe(e.EOPNOTSUPP) == "VIRTIO_BLK_S_UNSUPP"


def test_direction_agrees_with_the_policy() -> None:
    policy = Policy(read=DirectionPolicy(Action.STOP), write=DirectionPolicy(Action.REPORT))
    assert DIRECTION[Type.GET_ID] is None
    for type_ in set(Type) - {Type.GET_ID}:
        accepted = check(Header(type_, 0, 0), 512, DISK, [Segment(0, 1, 0)])
        assert isinstance(accepted, tuple)
        wanted = policy.read if DIRECTION[type_] == "rerror" else policy.write
        assert policy.of(accepted[0].kind) is wanted
