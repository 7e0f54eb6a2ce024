"""What is fuzzed: each target takes any bytes, and raises when a rule is broken.

Standard library and healfs only: atheris calls them millions of times, hypothesis some hundreds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from struct import pack, unpack_from
from typing import Any

from healfs.backends import nbd_protocol as proto
from healfs.backends import nbd_transmission as wire
from healfs.backends.nbd_transmission import Command, Transmission
from healfs.control import qmp
from healfs.control.server import Argument, CommandError, Peer, Verb
from healfs.core.policy import Policy
from healfs.daemon import commands

AT, LENGTH = 1 << 40, 256
PIECE = 97  # bytes that come at once


def handshake(data: bytes) -> None:
    """An NBD server that says anything at all while the export is negotiated.

    The first byte chooses how far an honest server comes before it turns hostile.
    """
    if not data:
        return
    machine = proto.Handshake("export", tls=bool(data[0] & 128))
    honest = _HONEST[: _HONEST_ENDS[data[0] % len(_HONEST_ENDS)]]
    stream = honest + data[1:]
    try:
        for at in range(0, len(stream), PIECE):
            machine.receive(stream[at : at + PIECE])
            machine.data_to_send()
            if machine.export is not None or machine.starts_tls:
                break
            held = len(machine._in)
            assert held <= proto.OPTION_REPLY_MAX + PIECE, held
    except (proto.ProtocolError, proto.OptionError):
        return
    if (export := machine.export) is not None:
        assert 0 <= export.size < 1 << 63
        assert 1 <= export.minimum_block <= 1 << 16
        assert export.maximum_payload is None or export.maximum_payload >= export.minimum_block
        assert len(export.description) <= proto.STRING_MAX
        assert export.flags & proto.HAS_FLAGS


def _reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return pack(">QIII", proto.OPTION_REPLY, option, kind, len(data)) + data


_HONEST_PARTS = (
    pack(">QQH", proto.NBDMAGIC, proto.IHAVEOPT, 3),
    _reply(proto.OPT_STRUCTURED_REPLY, proto.REP_ACK),
    _reply(proto.OPT_SET_META_CONTEXT, proto.REP_META_CONTEXT, pack(">I", 7) + b"base:allocation"),
    _reply(proto.OPT_SET_META_CONTEXT, proto.REP_ACK),
    _reply(proto.OPT_GO, proto.REP_INFO, pack(">HQH", proto.INFO_EXPORT, 1 << 30, proto.HAS_FLAGS)),
)
_HONEST = b"".join(_HONEST_PARTS)
_HONEST_ENDS = [len(b"".join(_HONEST_PARTS[:n])) for n in range(len(_HONEST_PARTS) + 1)]


def transmission(data: bytes) -> None:
    """An NBD server that answers anything at all to six commands."""
    if len(data) < 2:
        return
    structured = bool(data[0] & 1)
    session = Transmission(structured, 7)
    asked = _ASKED if structured else _ASKED[:4]  # block status needs structured replies
    answered: set[int] = set()

    def complete(number: Any, errno: int, payload: Any) -> None:
        kind = asked[number][0]
        assert number not in answered, "answered twice"
        answered.add(number)
        assert errno == 0 or errno in wire.ERRORS
        if errno:
            assert payload is None
        elif kind == wire.CMD_READ:
            assert len(payload) == LENGTH
        elif kind == wire.CMD_BLOCK_STATUS:
            assert len(payload) == 8 and 0 < unpack_from(">I", payload)[0] <= LENGTH
        else:
            assert payload is None

    for number, (kind, flags) in enumerate(asked):
        payload = bytes(LENGTH) if kind == wire.CMD_WRITE else None
        session.queue(Command(kind, flags, AT, LENGTH, number, complete), payload)
    session.taken(session.queued)
    stream, pos = memoryview(_framed(data[1:])), 0
    try:
        for end in (*range(PIECE, len(stream), PIECE), len(stream)):
            before, pos = pos, session.receive(stream, pos, end)
            assert before <= pos <= end
            assert 0 <= session.missing <= wire.BLOCK_STATUS_MAX + LENGTH + 28
    except proto.ProtocolError:
        pass
    assert len(session.pending) == len(asked) - len(answered)


_ASKED = (
    (wire.CMD_READ, 0),
    (wire.CMD_WRITE, 0),
    (wire.CMD_FLUSH, 0),
    (wire.CMD_TRIM, 0),
    (wire.CMD_BLOCK_STATUS, wire.CMD_FLAG_REQ_ONE),
    (wire.CMD_READ, 0),
)


def _framed(data: bytes) -> bytes:
    """Mostly replies with the right magic, else nothing behind the first check is ever reached.

    A piece of 16 bytes: what is right in it, the cookie, flags, type, length, and a payload.
    """
    out = bytearray()
    for at in range(0, len(data), 16):
        piece = data[at : at + 16].ljust(16, b"\0")
        right, cookie, flags, kind, length = unpack_from(">BBHHH", piece)
        kind = _KINDS[kind % len(_KINDS)] if right & 1 else kind
        cookie = cookie % 7 + 1 if right & 2 else cookie << 24
        length = _LENGTHS[length % len(_LENGTHS)] if right & 4 else length << 8
        payload = piece[8:] if right & 8 else pack(">Q", AT + piece[9])
        payload = (payload + bytes(piece[10:12]) + bytes(length))[: min(length, 3 * LENGTH)]
        if right & 16:
            out += pack(">IIQ", wire.SIMPLE_REPLY, piece[8] if right & 32 else 0, cookie)
            out += bytes(LENGTH) if right & 64 else b""
        elif right & 128:
            out += piece
        else:
            out += pack(">IHHQI", wire.STRUCTURED_REPLY, flags, kind, cookie, length) + payload
    return bytes(out)


_KINDS = (0, 1, 2, 5, (1 << 15) + 1, (1 << 15) + 2)
_LENGTHS = (0, 4, 6, 8, 12, 14, 20, 9, 64 + 8, LENGTH + 8)


def control(data: bytes) -> None:
    """A control client that says anything at all, as far as the verbs' own arguments."""
    splitter = qmp.Splitter()
    for at in range(0, len(data), PIECE):
        for message in splitter.feed(data[at : at + PIECE]):
            if isinstance(message, qmp.ProtocolError):
                _is_one_line(qmp.encode(qmp.failure(message.desc)))
                if message.fatal:
                    return
            else:
                assert len(message) <= qmp.MAXIMUM_MESSAGE
                _command(message)


def _command(message: bytes) -> None:
    try:
        command = qmp.parse_command(message)
    except qmp.ProtocolError as error:
        _is_one_line(qmp.encode(qmp.failure(error.desc, of=error)))
        return
    verb = _VERBS.get(command.name)
    if verb is None:
        return
    try:
        verb.check(command.arguments)
        value = verb.handler(command.arguments, Peer(0, 1))
    except CommandError as error:
        _is_one_line(qmp.encode(qmp.failure(error.desc, error.cls, command)))
    else:
        _is_one_line(qmp.encode(qmp.success(value, command)))


def _is_one_line(line: bytes) -> None:
    assert line.endswith(b"\r\n") and line.count(b"\n") == 1
    json.loads(line)


class _Engine:
    """Takes a policy, as the engine does. The other verbs have no argument worth fuzzing."""

    def __init__(self) -> None:
        self.policy = Policy()

    def set_policy(self, policy: Policy) -> None:
        assert policy.read.retry_interval > 0 and policy.write.retry_timeout >= 0


class _Worker:
    engine = _Engine()

    def event(self, name: str, data: dict[str, Any]) -> None:
        json.dumps(data, allow_nan=False)

    def commit(self) -> None:
        pass


def _verbs() -> dict[str, Verb]:
    """healfs-set-policy as it is; of the others, what they declare."""
    table = commands.verbs(_Worker())  # type: ignore[arg-type]
    declared = {
        name: Verb(lambda arguments, peer: {}, verb.arguments) for name, verb in table.items()
    }
    enable = Verb(lambda arguments, peer: {}, {"enable": Argument(list, optional=True)})
    name = "healfs-set-policy"
    return {**declared, "qmp_capabilities": enable, name: table[name]}


_VERBS = _verbs()

TARGETS: dict[str, Callable[[bytes], None]] = {
    "handshake": handshake,
    "transmission": transmission,
    "control": control,
}
