"""NBD's transmission phase, without I/O: framing, replies in any pieces, every violation."""

from __future__ import annotations

import errno
from itertools import pairwise
from struct import pack, unpack
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from healfs.backends import nbd_transmission as wire
from healfs.backends.nbd_frames import REQUEST
from healfs.backends.nbd_protocol import ProtocolError
from healfs.backends.nbd_transmission import PIECES_MAX, Assembly, Command, Transmission
from healfs.core.errors import ErrorClass, classify

CONTEXT = 7
AT = 1 << 40


class Session:
    """A Transmission whose answers are kept; cookies count from 1."""

    def __init__(self, structured: bool = True) -> None:
        self.wire = Transmission(structured, CONTEXT)
        self.answers: list[tuple[Any, int, bytes | None]] = []

    def ask(self, type: int, offset: int = 0, length: int = 0, flags: int = 0) -> None:
        command = Command(type, flags, offset, length, len(self.wire.pending), self.answer)
        self.wire.queue(command, bytes(length) if type == wire.CMD_WRITE else None)

    def answer(self, context: Any, error: int, data: Any) -> None:
        self.answers.append((context, error, None if data is None else bytes(data)))

    def get(self, data: bytes) -> int:
        self.send()
        return self.receive(data)

    def send(self) -> None:
        """All that was asked."""
        self.wire.taken(self.wire.queued - self.wire.sent)

    def receive(self, data: bytes) -> int:
        return self.wire.receive(memoryview(data), 0, len(data))


def simple(cookie: int, error: int = 0, data: bytes = b"") -> bytes:
    return pack(">IIQ", wire.SIMPLE_REPLY, error, cookie) + data


def chunk(cookie: int, kind: int, data: bytes = b"", done: bool = True) -> bytes:
    return pack(">IHHQI", wire.STRUCTURED_REPLY, done, kind, cookie, len(data)) + data


def data(cookie: int, offset: int, payload: bytes, done: bool = True) -> bytes:
    return chunk(cookie, wire.CHUNK_OFFSET_DATA, pack(">Q", AT + offset) + payload, done)


def hole(cookie: int, offset: int, length: int, done: bool = True) -> bytes:
    return chunk(cookie, wire.CHUNK_OFFSET_HOLE, pack(">QI", AT + offset, length), done)


def error(cookie: int, value: int, message: bytes = b"", done: bool = True) -> bytes:
    payload = pack(">IH", value, len(message)) + message
    return chunk(cookie, wire.CHUNK_ERROR, payload, done)


def error_at(cookie: int, value: int, offset: int, done: bool = True) -> bytes:
    payload = pack(">IH", value, 2) + b"no" + pack(">Q", AT + offset)
    return chunk(cookie, wire.CHUNK_ERROR_OFFSET, payload, done)


def status(cookie: int, *extents: tuple[int, int], context: int = CONTEXT) -> bytes:
    payload = pack(">I", context) + b"".join(pack(">II", *extent) for extent in extents)
    return chunk(cookie, wire.CHUNK_BLOCK_STATUS, payload)


@pytest.mark.parametrize("reply", [simple(2), chunk(2, wire.CHUNK_NONE), error(2, errno.EIO)])
def test_a_reply_to_what_was_not_sent_yet(reply: bytes) -> None:
    """The payload's memory is used for something else then, which would be sent as its rest."""
    session = Session()
    session.ask(wire.CMD_FLUSH)
    session.ask(wire.CMD_WRITE, AT, 8192)
    session.wire.taken(28 + 28 + 8191)
    assert session.receive(simple(1)) == 16
    with pytest.raises(ProtocolError, match="not sent yet"):
        session.receive(reply)
    assert session.answers == [(0, 0, None)]
    session.wire.handed = 1  # by TLS: the last byte may have gone, too
    assert session.receive(reply) == len(reply)
    assert len(session.answers) == 2


def test_framing() -> None:
    session = Session()
    session.ask(wire.CMD_READ, AT, 4096)
    session.ask(wire.CMD_WRITE, 512, 8, wire.CMD_FLAG_FUA)
    session.ask(wire.CMD_FLUSH)
    sent = b"".join(session.wire.out)
    assert unpack(">IHHQQI", sent[:28]) == (REQUEST, 0, wire.CMD_READ, 1, AT, 4096)
    assert unpack(">IHHQQI8s", sent[28:64]) == (REQUEST, 1, 1, 2, 512, 8, bytes(8))
    assert unpack(">IHHQQI", sent[64:]) == (REQUEST, 0, wire.CMD_FLUSH, 3, 0, 0)
    ends = [(c.start, c.end) for c in session.wire.pending.values()]
    assert ends == [(0, 28), (28, 64), (64, 92)]


@given(st.lists(st.integers(1, 60), max_size=60))
def test_the_socket_may_take_any_part(counts: list[int]) -> None:
    session = Session()
    for i in range(8):
        session.ask(wire.CMD_WRITE, i, i + 1)
    whole = b"".join(session.wire.out)
    for count in counts:
        left = len(whole) - session.wire.sent
        session.wire.taken(min(count, left)) if left else None
        assert b"".join(session.wire.out) == whole[session.wire.sent :]
    assert session.wire.sent == min(sum(counts), len(whole))


SECTORS = 8


@st.composite
def read_replies(draw: st.DrawFn) -> tuple[bytes, list[tuple[int, int, bytes | None]]]:
    """Replies to reads of 8 sectors at AT, cookies 1 to 4, chunks in any order and mixture."""
    streams: list[list[bytes]] = []
    answers = []
    for cookie in range(1, 5):
        payload = draw(st.binary(min_size=SECTORS, max_size=SECTORS))
        cuts = sorted(draw(st.sets(st.integers(1, SECTORS - 1))))
        ranges = list(zip([0, *cuts], [*cuts, SECTORS], strict=True))
        for start, end in ranges:
            if draw(st.booleans()):
                payload = payload[:start] + bytes(end - start) + payload[end:]
        chunks = []
        for start, end in draw(st.permutations(ranges)):
            if payload[start:end] == bytes(end - start):
                chunks.append(hole(cookie, start, end - start, False))
            else:
                chunks.append(data(cookie, start, payload[start:end], False))
        bad = draw(st.sampled_from([None, error(cookie, errno.EIO), error_at(cookie, 5, 1)]))
        chunks.append(bad or chunk(cookie, wire.CHUNK_NONE))
        streams.append(chunks)
        answers.append((cookie - 1, errno.EIO if bad else 0, None if bad else payload))
    order = draw(st.permutations([i for i, chunks in enumerate(streams) for _ in chunks]))
    return b"".join(streams[i].pop(0) for i in order), answers


@given(read_replies(), st.lists(st.integers(1, 120), min_size=1))
def test_any_chunks_in_any_pieces_are_put_together(
    replies: tuple[bytes, list[tuple[int, int, bytes | None]]], sizes: list[int]
) -> None:
    stream, answers = replies
    session = Session()
    for _ in answers:
        session.ask(wire.CMD_READ, AT, SECTORS)
    session.send()
    view = memoryview(stream)
    pos = end = turn = 0
    while end < len(stream):
        end = min(end + sizes[turn % len(sizes)], len(stream))
        turn += 1
        pos = session.wire.receive(view, pos, end)
    assert pos == end
    assert sorted(session.answers) == answers
    assert not session.wire.pending


@pytest.mark.parametrize("structured", [False, True])
def test_the_short_way_gives_the_receive_buffer_itself(structured: bool) -> None:
    session = Session(structured)
    seen: list[Any] = []
    command = Command(wire.CMD_READ, 0, AT, 4, None, lambda _c, _e, data: seen.append(data))
    session.wire.queue(command)
    buffer = bytearray(data(1, 0, b"abcd") if structured else simple(1, 0, b"abcd"))
    session.send()
    session.wire.receive(memoryview(buffer), 0, len(buffer))
    assert seen[0].obj is buffer and seen[0] == b"abcd"


@pytest.mark.parametrize("structured", [False, True])
def test_simple_replies(structured: bool) -> None:
    session = Session(structured)
    for type in (wire.CMD_WRITE, wire.CMD_FLUSH, wire.CMD_TRIM, wire.CMD_WRITE_ZEROES):
        session.ask(type, AT, 8 * (type != wire.CMD_FLUSH))
    replies = simple(2) + simple(4, errno.ENOSPC) + simple(1) + simple(3, errno.ESHUTDOWN)
    assert session.get(replies) == len(replies)
    assert session.answers == [
        (1, 0, None),
        (3, errno.ENOSPC, None),
        (0, 0, None),
        (2, errno.ESHUTDOWN, None),
    ]


@pytest.mark.parametrize("value", sorted(wire.ERRORS))
def test_every_error_of_the_specification(value: int) -> None:
    """READ, WRITE and FLUSH every server can do, and what we ask fits: what sounds like a fault of
    the request is the server's complaint."""
    session = Session()
    for type in (wire.CMD_TRIM, wire.CMD_WRITE_ZEROES):
        session.ask(type, AT, 8)
    for type in (wire.CMD_READ, wire.CMD_WRITE, wire.CMD_FLUSH):
        session.ask(type, AT, 8 * (type != wire.CMD_FLUSH))
    session.get(simple(1, value) + error(2, value, b"with a message"))
    session.get(error(3, value) + error_at(4, value, 0) + simple(5, value))
    no_refusal = errno.EIO if classify(value) is ErrorClass.REFUSED else value
    assert [answer[1] for answer in session.answers] == [value] * 2 + [no_refusal] * 3
    assert (no_refusal != value) is (value in (errno.EINVAL, errno.EOVERFLOW, errno.EOPNOTSUPP))


@pytest.mark.parametrize("value", [2, 30, 122, 1 << 31])
def test_any_other_error_is_eio(value: int) -> None:
    session = Session()
    session.ask(wire.CMD_WRITE, AT, 8)
    session.get(simple(1, value))
    assert session.answers == [(0, errno.EIO, None)]


def test_an_unknown_error_chunk_is_an_error() -> None:
    session = Session()
    session.ask(wire.CMD_READ, AT, 8)
    session.get(chunk(1, (1 << 15) + 99, pack(">IH", errno.ENOMEM, 2) + b"no, and more"))
    assert session.answers == [(0, errno.ENOMEM, None)]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (error(1, 0), errno.EIO),
        (error_at(1, errno.ENOSPC, 8), errno.ENOSPC),
        (error_at(1, errno.ENOSPC, -1), errno.ENOSPC),
        (chunk(1, wire.CHUNK_ERROR), errno.EIO),
        (chunk(1, wire.CHUNK_ERROR, bytes(5)), errno.EIO),
        (chunk(1, wire.CHUNK_ERROR, pack(">IH", errno.ENOSPC, 3) + b"no"), errno.ENOSPC),
        (chunk(1, wire.CHUNK_ERROR, pack(">IH", errno.ENOSPC, 1) + b"no"), errno.ENOSPC),
        (chunk(1, wire.CHUNK_ERROR_OFFSET, pack(">IH", errno.ENOSPC, 0) + b"x"), errno.ENOSPC),
        (error(1, errno.ENOSPC, b"x" * 0xFFFF), errno.ENOSPC),
        (simple(1, errno.ENOSPC), errno.ENOSPC),
    ],
)
def test_what_is_wrong_in_an_error_ends_no_connection(reply: bytes, expected: int) -> None:
    """The request has failed in any case, and the next reply is found."""
    session = Session()
    session.ask(wire.CMD_READ, AT, 8)
    session.ask(wire.CMD_READ, AT, 8)
    session.get(reply + data(2, 0, b"x" * 8))
    assert session.answers == [(0, expected, None), (1, 0, b"x" * 8)]


def test_the_first_error_counts_and_bytes_may_come_with_it() -> None:
    session = Session()
    session.ask(wire.CMD_READ, AT, 8)
    session.get(error_at(1, errno.ENOMEM, 4, False) + data(1, 0, b"abcd", False))
    session.get(error(1, errno.EIO))
    assert session.answers == [(0, errno.ENOMEM, None)]


def test_block_status() -> None:
    session = Session()
    session.ask(wire.CMD_BLOCK_STATUS, AT, 8)
    session.ask(wire.CMD_BLOCK_STATUS, AT, 8, wire.CMD_FLAG_REQ_ONE)
    session.get(status(1, (4, 3), (64, 0)) + status(2, (8, 3)))
    assert session.answers == [(0, 0, pack(">IIII", 4, 3, 64, 0)), (1, 0, pack(">II", 8, 3))]


def test_after_close_nothing_is_answered() -> None:
    session = Session()
    for _ in range(3):
        session.ask(wire.CMD_FLUSH)

    def answer(context: Any, error: int, data: Any) -> None:
        session.answers.append((context, error, None))
        session.wire.closed = True
        session.wire.pending.clear()

    for command in session.wire.pending.values():
        command.complete = answer
    session.get(simple(1) + simple(2) + simple(3))
    assert session.answers == [(0, 0, None)]


R = wire.CMD_READ
S = wire.CMD_BLOCK_STATUS
ONE = wire.CMD_FLAG_REQ_ONE


@pytest.mark.parametrize(
    ("type", "flags", "reply"),
    [
        (R, 0, pack(">IIQ", 0xBAD, 0, 1)),
        (R, 0, data(2, 0, b"x" * 8)),
        (R, 0, data(1, 0, b"x" * 8) + chunk(1, wire.CHUNK_NONE)),
        (R, 0, simple(1, 0, bytes(8))),
        (R, 0, data(1, 0, b"abcd", False) + simple(1)),
        (R, 0, data(1, 0, b"abcd", False) + simple(1, errno.EIO)),
        (R, 0, data(1, 1, b"x" * 8)),
        (R, 0, data(1, -1, b"x" * 8)),
        (R, 0, data(1, 4, b"x" * 5)),
        (R, 0, data(1, -1, b"x" * 5)),
        (R, 0, data(1, 0, b"x" * 9)[:28]),
        (R, 0, data(1, 0, b"")),
        (R, 0, data(1, 0, b"x" * 7)),
        (R, 0, data(1, 0, b"x" * 4, False) + data(1, 5, b"x" * 3)),
        (R, 0, data(1, 0, b"x" * 4, False) + data(1, 3, b"x" * 5)),
        (R, 0, data(1, 4, b"x" * 4, False) + data(1, 0, b"x" * 5)),
        (R, 0, data(1, 0, b"x" * 4, False) + data(1, 0, b"x" * 4)),
        (R, 0, data(1, 0, b"x" * 8, False) + hole(1, 7, 1)),
        (R, 0, hole(1, 0, 0)),
        (R, 0, hole(1, 0, 9)),
        (R, 0, hole(1, 8, 1)),
        (R, 0, chunk(1, wire.CHUNK_OFFSET_HOLE, bytes(11))),
        (R, 0, chunk(1, wire.CHUNK_NONE)),
        (R, 0, chunk(1, wire.CHUNK_NONE, done=False)),
        (R, 0, chunk(1, wire.CHUNK_NONE, b"x")),
        (R, 0, chunk(1, 3, bytes(8))),
        (R, 0, chunk(1, 6, bytes(8))),
        (R, 0, status(1, (8, 0))),
        (R, 0, chunk(1, wire.CHUNK_ERROR, bytes(wire.ERROR_CHUNK_MAX + 1))[:20]),
        (wire.CMD_FLUSH, 0, data(1, 0, b"x")),
        (wire.CMD_WRITE, 0, status(1, (8, 0))),
        (S, 0, simple(1)),
        (S, 0, chunk(1, wire.CHUNK_NONE)),
        (S, 0, status(1)),
        (S, 0, status(1, (8, 0), context=CONTEXT + 1)),
        (S, 0, status(1, (0, 0))),
        (S, 0, status(1, (8, 0), (8, 0))),
        (S, 0, status(1, (8, 0))[:16] + pack(">I", 1 << 20)),
        (S, 0, chunk(1, wire.CHUNK_BLOCK_STATUS, bytes(13))),
        (S, 0, status(1, (8, 0)).replace(b"\0\1\0\5", b"\0\0\0\5", 1) + status(1, (8, 0))),
        (S, ONE, status(1, (4, 0), (4, 0))),
        (S, ONE, status(1, (9, 0))),
    ],
)
def test_what_the_protocol_does_not_allow(type: int, flags: int, reply: bytes) -> None:
    session = Session()
    session.ask(type, AT, 8, flags)
    with pytest.raises(ProtocolError):
        session.get(reply)


def test_structured_replies_must_have_been_agreed_on() -> None:
    session = Session(structured=False)
    session.ask(wire.CMD_READ, AT, 8)
    with pytest.raises(ProtocolError):
        session.get(data(1, 0, b"x" * 8))


@given(st.binary(max_size=64), st.booleans())
def test_noise_never_does_more_than_raise(noise: bytes, structured: bool) -> None:
    session = Session(structured)
    session.ask(wire.CMD_READ, AT, 8)
    magic = pack(">I", wire.STRUCTURED_REPLY) + noise[:4] + pack(">Q", 1) + noise[4:]
    try:
        assert 0 <= session.get(magic) <= len(magic)
    except ProtocolError:
        pass


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), max_size=20))
def test_cover_is_a_set_of_bytes(ranges: list[tuple[int, int]]) -> None:
    assembly = Assembly()
    covered: set[int] = set()
    for start, length in ranges:
        new = set(range(start, start + length))
        if new & covered:
            with pytest.raises(ProtocolError):
                assembly.cover(start, start + length)
            continue
        assembly.cover(start, start + length)
        covered |= new
        runs = list(zip(assembly.starts, assembly.ends, strict=True))
        assert {i for run in runs for i in range(*run)} == covered
        assert all(a[1] < b[0] for a, b in pairwise(runs))


def test_a_read_may_not_come_in_more_pieces_than_anybody_makes_of_it() -> None:
    """Each costs a search and a move: a million would keep the event loop for minutes."""
    assembly = Assembly()
    for start in range(2 * PIECES_MAX, 0, -2):
        assembly.cover(start, start + 1)
    assembly.cover(2 * PIECES_MAX + 1, 2 * PIECES_MAX + 2)  # touches one
    with pytest.raises(ProtocolError):
        assembly.cover(0, 1)


def test_a_reply_does_not_go_on_for_ever_with_errors() -> None:
    """They bring nothing, and would pass for a sign of life."""
    session = Session()
    session.ask(wire.CMD_READ, AT, 8)
    session.get(error(1, errno.EIO, done=False) * PIECES_MAX)
    with pytest.raises(ProtocolError):
        session.get(error(1, errno.EIO, done=False))
