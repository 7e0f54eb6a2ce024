"""The NBD handshake, without I/O: every way to agree, and every field that may be wrong."""

from __future__ import annotations

import errno
from itertools import pairwise
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from healfs.backends import nbd_protocol as proto
from healfs.backends.nbd_protocol import Export, Handshake, OptionError, ProtocolError

SIZE = 1 << 30
FLAGS = proto.HAS_FLAGS | proto.SEND_FLUSH
GREETING = b"NBDMAGICIHAVEOPT" + pack(">H", 3)


def reply(option: int, kind: int, data: bytes = b"", magic: int = proto.OPTION_REPLY) -> bytes:
    return pack(">QIII", magic, option, kind, len(data)) + data


def info(kind: int, data: bytes) -> bytes:
    return reply(proto.OPT_GO, proto.REP_INFO, pack(">H", kind) + data)


def context(identifier: int = 7, name: bytes = b"base:allocation") -> bytes:
    return reply(proto.OPT_SET_META_CONTEXT, proto.REP_META_CONTEXT, pack(">I", identifier) + name)


SR = reply(proto.OPT_STRUCTURED_REPLY, proto.REP_ACK)
META = context() + reply(proto.OPT_SET_META_CONTEXT, proto.REP_ACK)
EXPORT = info(proto.INFO_EXPORT, pack(">QH", SIZE, FLAGS))
BLOCKS = info(proto.INFO_BLOCK_SIZE, pack(">III", 512, 4096, 1 << 20))
NAMES = info(proto.INFO_NAME, b"disk") + info(proto.INFO_DESCRIPTION, "größe".encode())
GO = reply(proto.OPT_GO, proto.REP_ACK)


def shake(*parts: bytes, name: str = "disk", tls: bool = False) -> Handshake:
    handshake = Handshake(name, tls=tls)
    for part in parts:
        handshake.receive(part)
    return handshake


def options(sent: bytes) -> list[tuple[int, bytes]]:
    """The options in what a client sent after its flags."""
    found = []
    while sent:
        assert sent[:8] == b"IHAVEOPT"
        option, length = int.from_bytes(sent[8:12], "big"), int.from_bytes(sent[12:16], "big")
        found.append((option, sent[16 : 16 + length]))
        sent = sent[16 + length :]
    return found


@given(st.data())
def test_any_chunking_agrees_the_same(data: st.DataObject) -> None:
    stream = GREETING + SR + META + EXPORT + BLOCKS + NAMES + info(99, b"unknown") + GO
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=20)))
    bounds = [0, *cuts, len(stream)]
    handshake = Handshake("disk")
    sent = b""
    for start, end in pairwise(bounds):
        assert handshake.export is None or start == len(stream)
        handshake.receive(stream[start:end])
        sent += handshake.data_to_send()
    assert handshake.export == Export(
        SIZE, FLAGS, 512, 1 << 20, "disk", "größe", structured=True, context=7
    )
    assert sent[:4] == pack(">I", 3)
    assert options(sent[4:]) == [
        (proto.OPT_STRUCTURED_REPLY, b""),
        (
            proto.OPT_SET_META_CONTEXT,
            pack(">I", 4) + b"disk" + pack(">II", 1, 15) + b"base:allocation",
        ),
        (proto.OPT_GO, pack(">I", 4) + b"disk" + pack(">HHHH", 3, 3, 1, 2)),
    ]


NO_SR = reply(proto.OPT_STRUCTURED_REPLY, proto.REP_ERR_UNSUP, b"no such thing")
NO_META = reply(proto.OPT_SET_META_CONTEXT, proto.REP_ERR_UNSUP)
NO_GO = reply(proto.OPT_GO, proto.REP_ERR_UNSUP)
OLD_EXPORT = pack(">QH", SIZE, FLAGS)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((NO_SR, EXPORT, GO), Export(SIZE, FLAGS)),
        ((SR, NO_META, EXPORT, GO), Export(SIZE, FLAGS, structured=True)),
        (
            (SR, reply(proto.OPT_SET_META_CONTEXT, proto.REP_ACK), EXPORT, GO),
            Export(SIZE, FLAGS, structured=True),
        ),
        ((NO_SR, NO_GO, OLD_EXPORT), Export(SIZE, FLAGS)),
        ((SR, META, NO_GO, OLD_EXPORT), Export(SIZE, FLAGS, structured=True, context=7)),
    ],
)
def test_older_servers_are_fallen_back_to(parts: tuple[bytes, ...], expected: Export) -> None:
    assert shake(GREETING, *parts).export == expected


@pytest.mark.parametrize(("flags", "zeroes"), [(0, 124), (2, 0)])
def test_plain_newstyle_has_the_export_name_only(flags: int, zeroes: int) -> None:
    handshake = shake(b"NBDMAGICIHAVEOPT" + pack(">H", flags))
    sent = handshake.data_to_send()
    assert sent[:4] == pack(">I", flags)
    assert options(sent[4:]) == [(proto.OPT_EXPORT_NAME, b"disk")]
    if zeroes:
        handshake.receive(OLD_EXPORT + bytes(zeroes - 1))
        assert handshake.export is None
        handshake.receive(b"\0")
    else:
        handshake.receive(OLD_EXPORT)
    assert handshake.export == Export(SIZE, FLAGS)


@pytest.mark.parametrize(
    ("limits", "payload"),
    [((1, 4096, 0xFFFFFFFF), None), ((4096, 4096, 70000), 69632), ((65536, 65536, 65536), 65536)],
)
def test_block_sizes(limits: tuple[int, int, int], payload: int | None) -> None:
    blocks = info(proto.INFO_BLOCK_SIZE, pack(">III", *limits))
    export = shake(GREETING, NO_SR, EXPORT, blocks, GO).export
    assert export is not None
    assert (export.minimum_block, export.maximum_payload) == (limits[0], payload)


@pytest.mark.parametrize(
    "parts",
    [
        (b"SSH-2.0-",),
        (b"NBDMAGIC" + bytes(8),),
        (b"NBDMAGIC" + pack(">Q", proto.OLDSTYLE),),
        (GREETING, reply(proto.OPT_STRUCTURED_REPLY, proto.REP_ACK, magic=1)),
        (GREETING, GO),
        (GREETING, reply(proto.OPT_STRUCTURED_REPLY, proto.REP_INFO)),
        (GREETING, reply(proto.OPT_STRUCTURED_REPLY, proto.REP_ACK, b"x")),
        (GREETING, pack(">QIII", proto.OPTION_REPLY, 8, 1, proto.OPTION_REPLY_MAX + 1)),
        (GREETING, reply(proto.OPT_STRUCTURED_REPLY, proto.REP_ERR_UNSUP, b"x" * 4097)),
        (GREETING, SR, context(name=b"qemu:dirty")),
        (GREETING, SR, context(), context(8)),
        (GREETING, SR, reply(proto.OPT_SET_META_CONTEXT, proto.REP_META_CONTEXT, b"abc")),
        (GREETING, SR, reply(proto.OPT_SET_META_CONTEXT, proto.REP_INFO)),
        (GREETING, SR, META, GO),
        (GREETING, SR, META, BLOCKS, GO),
        (GREETING, SR, META, reply(proto.OPT_GO, proto.REP_INFO, b"x")),
        (GREETING, SR, META, reply(proto.OPT_GO, 2, b"server")),
        (GREETING, SR, META, info(proto.INFO_EXPORT, pack(">Q", SIZE))),
        (GREETING, SR, META, info(proto.INFO_EXPORT, pack(">QH", SIZE, FLAGS) + b"x")),
        (GREETING, SR, META, info(proto.INFO_EXPORT, pack(">QH", 1 << 63, FLAGS))),
        (GREETING, SR, META, info(proto.INFO_EXPORT, pack(">QH", SIZE, proto.SEND_FLUSH))),
        (GREETING, SR, META, info(proto.INFO_BLOCK_SIZE, pack(">II", 1, 4096))),
        (GREETING, SR, META, info(proto.INFO_BLOCK_SIZE, pack(">III", 0, 4096, 4096))),
        (GREETING, SR, META, info(proto.INFO_BLOCK_SIZE, pack(">III", 513, 4096, 4096))),
        (GREETING, SR, META, info(proto.INFO_BLOCK_SIZE, pack(">III", 1 << 17, 1 << 17, 1 << 20))),
        (GREETING, SR, META, info(proto.INFO_BLOCK_SIZE, pack(">III", 4096, 4096, 512))),
        (GREETING, SR, META, info(proto.INFO_NAME, b"x" * 4097)),
        (GREETING, SR, META, info(99, b"") * proto.OPTION_REPLIES_MAX),
        (GREETING, SR, META, EXPORT, GO, b"early"),
        (GREETING, SR, META, EXPORT, GO + b"early"),
        (GREETING, SR, META, NO_GO, pack(">QH", SIZE, 0)),
    ],
)
def test_what_the_protocol_does_not_allow(parts: tuple[bytes, ...]) -> None:
    handshake = shake(*parts[:-1])
    with pytest.raises(ProtocolError) as caught:
        handshake.receive(parts[-1])
    assert caught.value.errno == errno.EPROTO


@pytest.mark.parametrize("code", [proto.REP_ERR_TLS_REQD, proto.REP_ERR_SHUTDOWN])
@pytest.mark.parametrize(
    ("option", "before"),
    [
        (proto.OPT_STRUCTURED_REPLY, ()),
        (proto.OPT_SET_META_CONTEXT, (SR,)),
        (proto.OPT_GO, (SR, META)),
    ],
)
def test_some_refusals_end_it_at_any_option(
    code: int, option: int, before: tuple[bytes, ...]
) -> None:
    handshake = shake(GREETING, *before)
    with pytest.raises(OptionError) as caught:
        handshake.receive(reply(option, code, b"because"))
    assert (caught.value.code, caught.value.message) == (code, "because")


@pytest.mark.parametrize("code", [proto.REP_ERR_UNKNOWN, proto.REP_ERR_POLICY, (1 << 31) + 77])
def test_a_refused_export(code: int) -> None:
    handshake = shake(GREETING, SR, META)
    with pytest.raises(OptionError) as caught:
        handshake.receive(reply(proto.OPT_GO, code, b"\xff"))
    assert (caught.value.code, caught.value.message) == (code, "\ufffd")


TLS = reply(proto.OPT_STARTTLS, proto.REP_ACK)


def test_tls_begins_before_anything_else_is_asked() -> None:
    handshake = shake(GREETING, tls=True)
    sent = handshake.data_to_send()
    assert options(sent[4:]) == [(proto.OPT_STARTTLS, b"")]
    assert not handshake.starts_tls
    for byte in TLS:
        assert not handshake.starts_tls
        handshake.receive(bytes([byte]))
    assert handshake.starts_tls
    handshake.starts_tls = False
    assert options(handshake.data_to_send()) == [(proto.OPT_STRUCTURED_REPLY, b"")]
    handshake.receive(SR + META + EXPORT + GO)
    assert handshake.export == Export(SIZE, FLAGS, structured=True, context=7)


@given(st.data())
def test_what_came_before_tls_is_never_taken_for_the_server(data: st.DataObject) -> None:
    """STARTTLS injection: the replies of somebody in between, behind the server's own."""
    injected = SR + META + EXPORT + GO
    stream = GREETING + TLS + injected[: data.draw(st.integers(1, len(injected)))]
    cut = data.draw(st.integers(0, len(GREETING + TLS) - 1))
    handshake = shake(stream[:cut], tls=True)
    with pytest.raises(ProtocolError, match="before TLS"):
        handshake.receive(stream[cut:])
    assert handshake.export is None and not handshake.starts_tls


@pytest.mark.parametrize(
    "parts",
    [
        (GREETING, reply(proto.OPT_STARTTLS, proto.REP_ERR_UNSUP, b"no")),
        (GREETING, reply(proto.OPT_STARTTLS, proto.REP_ERR_POLICY)),
        (b"NBDMAGICIHAVEOPT" + pack(">H", 2),),
        (b"NBDMAGICIHAVEOPT" + pack(">H", 0),),
    ],
)
def test_without_tls_nothing_more_is_said(parts: tuple[bytes, ...]) -> None:
    """No way leads on without TLS: not an old server, not a refusal."""
    handshake = shake(*parts[:-1], tls=True)
    handshake.data_to_send()
    with pytest.raises(OptionError) as caught:
        handshake.receive(parts[-1])
    assert caught.value.option == proto.OPT_STARTTLS
    assert b"disk" not in handshake.data_to_send()


def test_other_answers_to_starttls_break_the_protocol() -> None:
    for wrong in (reply(proto.OPT_STARTTLS, proto.REP_INFO, b"xx"), SR):
        with pytest.raises(ProtocolError):
            shake(GREETING, wrong, tls=True)
