"""The NBD client protocol without I/O (nbd/doc/proto.md), its handshake.

`Handshake` negotiates an export: fixed newstyle, TLS where it is wanted, structured replies,
base:allocation, NBD_OPT_GO.
Whatever a server sends that the protocol does not allow raises ProtocolError, after which the
connection is of no more use.
"""

from __future__ import annotations

import errno as e
from collections.abc import Generator
from dataclasses import dataclass, replace
from struct import Struct, unpack

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
OLDSTYLE = 0x0000420281861253
OPTION_REPLY = 0x0003E889045565A9
FLAG_FIXED_NEWSTYLE = 1
FLAG_NO_ZEROES = 2

OPT_EXPORT_NAME = 1
OPT_STARTTLS = 5
OPT_GO = 7
OPT_STRUCTURED_REPLY = 8
OPT_SET_META_CONTEXT = 10

REP_ACK = 1
REP_INFO = 3
REP_META_CONTEXT = 4
REP_ERROR = 1 << 31
REP_ERR_UNSUP = REP_ERROR + 1
REP_ERR_POLICY = REP_ERROR + 2
REP_ERR_TLS_REQD = REP_ERROR + 5
REP_ERR_UNKNOWN = REP_ERROR + 6
REP_ERR_SHUTDOWN = REP_ERROR + 7

INFO_EXPORT = 0
INFO_NAME = 1
INFO_DESCRIPTION = 2
INFO_BLOCK_SIZE = 3

HAS_FLAGS = 1 << 0
READ_ONLY = 1 << 1
SEND_FLUSH = 1 << 2
SEND_FUA = 1 << 3
SEND_TRIM = 1 << 5
SEND_WRITE_ZEROES = 1 << 6
CAN_MULTI_CONN = 1 << 8

STRING_MAX = 4096
OPTION_REPLY_MAX = 4 * STRING_MAX
OPTION_REPLIES_MAX = 64
_OPTION = Struct(">QII")
_OPTION_REPLY = Struct(">QIII")
_U16 = Struct(">H")
_U32 = Struct(">I")
_U64 = Struct(">Q")

Buffer = memoryview | bytes | bytearray


class ProtocolError(OSError):
    """The server broke the protocol, or speaks another. `errno` is EPROTO."""

    def __init__(self, message: str) -> None:
        super().__init__(e.EPROTO, message)


class OptionError(Exception):
    """The server refused `option`: `code` is one of NBD_REP_ERR_*, `message` its own words."""

    def __init__(self, code: int, message: str, option: int) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.option = option


def _string(data: bytes, what: str) -> str:
    if len(data) > STRING_MAX:
        raise ProtocolError(f"{what} of {len(data)} bytes, more than {STRING_MAX}")
    return data.decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Export:
    """What was negotiated. Sizes in bytes; `flags` are the transmission flags."""

    size: int = 0
    flags: int = 0
    minimum_block: int = 1
    maximum_payload: int | None = None  # None: the server names no limit
    name: str | None = None  # the canonical one, where the server tells
    description: str = ""
    structured: bool = False
    context: int | None = None  # id of base:allocation


class Handshake:
    """Negotiation as a machine: `receive` what comes, send `data_to_send()`, until `export`.

    With `tls`, whoever drives it looks at `starts_tls` after each `receive`: when it is set, TLS
    begins, it is set back, and all else goes over TLS. Nothing but that is asked for before.
    """

    def __init__(self, name: str, *, tls: bool = False) -> None:
        self.export: Export | None = None
        self.starts_tls = False
        self._tls = tls
        self.greeted = False
        self.asked_by_export_name = False
        self._name = name.encode()
        self._in = bytearray()
        self._out = bytearray()
        self._steps = self._negotiate()
        self._need = next(self._steps)

    def data_to_send(self) -> bytes:
        """Bytes to send now; they are handed out once."""
        out = bytes(self._out)
        self._out.clear()
        return out

    def receive(self, data: Buffer) -> None:
        """Take bytes from the server. Raises ProtocolError, OptionError."""
        self._in += data
        while self.export is None and len(self._in) >= self._need:
            taken = bytes(self._in[: self._need])
            del self._in[: self._need]
            try:
                self._need = self._steps.send(taken)
            except StopIteration as stop:
                self.export = stop.value
        if self.export is not None and self._in:
            raise ProtocolError("the server replies before it was asked")

    def _negotiate(self) -> Generator[int, bytes, Export]:
        if (yield 8) != _U64.pack(NBDMAGIC):
            raise ProtocolError("this is no NBD server")
        magic = _U64.unpack((yield 8))[0]
        if magic != IHAVEOPT:
            old = magic == OLDSTYLE
            raise ProtocolError("oldstyle NBD, which has no exports" if old else "unknown greeting")
        flags = _U16.unpack((yield 2))[0]
        self.greeted = True
        self._out += _U32.pack(flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES))
        export = Export()
        if self._tls:
            yield from self._start_tls(bool(flags & FLAG_FIXED_NEWSTYLE))
        if flags & FLAG_FIXED_NEWSTYLE:
            if (yield from self._structured_reply()):
                export = replace(export, structured=True, context=(yield from self._meta_context()))
            try:
                return (yield from self._go(export))
            except OptionError as error:
                if error.code != REP_ERR_UNSUP:
                    raise
        return (yield from self._export_name(export, bool(flags & FLAG_NO_ZEROES)))

    def _option(self, option: int, data: bytes = b"") -> None:
        self._out += _OPTION.pack(IHAVEOPT, option, len(data)) + data

    def _reply(self, asked: int) -> Generator[int, bytes, tuple[int, bytes]]:
        magic, option, kind, length = _OPTION_REPLY.unpack((yield _OPTION_REPLY.size))
        if magic != OPTION_REPLY or option != asked:
            raise ProtocolError(f"a reply that is none to option {asked}")
        if length > OPTION_REPLY_MAX:
            raise ProtocolError(f"a reply of {length} bytes to option {asked}")
        data = (yield length) if length else b""
        if kind & REP_ERROR:
            raise OptionError(kind, _string(data, "an error message"), asked)
        if kind == REP_ACK and data:
            raise ProtocolError("an acknowledgement with data")
        return kind, data

    def _start_tls(self, fixed_newstyle: bool) -> Generator[int, bytes, None]:
        if not fixed_newstyle:
            raise OptionError(REP_ERR_UNSUP, "", OPT_STARTTLS)
        self._option(OPT_STARTTLS)
        kind, _ = yield from self._reply(OPT_STARTTLS)
        if kind != REP_ACK:
            raise ProtocolError(f"reply type {kind} to NBD_OPT_STARTTLS")
        if self._in:
            # Somebody between us and the server could have put it there.
            raise ProtocolError("data before TLS began")
        self.starts_tls = True

    def _structured_reply(self) -> Generator[int, bytes, bool]:
        self._option(OPT_STRUCTURED_REPLY)
        try:
            kind, _ = yield from self._reply(OPT_STRUCTURED_REPLY)
        except OptionError as error:
            _raise_if_final(error)
            return False
        if kind != REP_ACK:
            raise ProtocolError(f"reply type {kind} to NBD_OPT_STRUCTURED_REPLY")
        return True

    def _meta_context(self) -> Generator[int, bytes, int | None]:
        query = b"base:allocation"
        data = _U32.pack(len(self._name)) + self._name + _U32.pack(1)
        self._option(OPT_SET_META_CONTEXT, data + _U32.pack(len(query)) + query)
        context = None
        while True:
            try:
                kind, data = yield from self._reply(OPT_SET_META_CONTEXT)
            except OptionError as error:
                _raise_if_final(error)
                return None
            if kind == REP_ACK:
                return context
            if kind != REP_META_CONTEXT or len(data) < 4 or data[4:] != query:
                raise ProtocolError("a metadata context that was not asked for")
            if context is not None:
                raise ProtocolError("base:allocation twice")
            context = _U32.unpack_from(data)[0]

    def _go(self, export: Export) -> Generator[int, bytes, Export]:
        infos = (INFO_BLOCK_SIZE, INFO_NAME, INFO_DESCRIPTION)
        data = _U32.pack(len(self._name)) + self._name + _U16.pack(len(infos))
        self._option(OPT_GO, data + b"".join(_U16.pack(info) for info in infos))
        told = False
        for _ in range(OPTION_REPLIES_MAX):
            kind, data = yield from self._reply(OPT_GO)
            if kind == REP_ACK:
                if not told:
                    raise ProtocolError("NBD_OPT_GO without NBD_INFO_EXPORT")
                return export
            if kind != REP_INFO or len(data) < 2:
                raise ProtocolError(f"reply type {kind}, {len(data)} bytes, to NBD_OPT_GO")
            told = told or _U16.unpack_from(data)[0] == INFO_EXPORT
            export = _info(export, _U16.unpack_from(data)[0], data[2:])
        raise ProtocolError("NBD_OPT_GO: no end of replies")

    def _export_name(self, export: Export, no_zeroes: bool) -> Generator[int, bytes, Export]:
        self.asked_by_export_name = True
        self._option(OPT_EXPORT_NAME, self._name)
        export = _info(export, INFO_EXPORT, (yield 10))
        if not no_zeroes:
            yield 124
        return export


def _raise_if_final(error: OptionError) -> None:
    """A server that demands TLS, or goes down, says so to whatever option comes first."""
    if error.code in (REP_ERR_TLS_REQD, REP_ERR_SHUTDOWN):
        raise error


def _info(export: Export, kind: int, data: bytes) -> Export:
    """One NBD_INFO_*; unknown ones are ignored, as the specification asks."""
    if kind == INFO_EXPORT:
        if len(data) != 10:
            raise ProtocolError("NBD_INFO_EXPORT of a wrong length")
        size, flags = unpack(">QH", data)
        if size >= 1 << 63 or not flags & HAS_FLAGS:
            raise ProtocolError(f"export of {size} bytes with flags {flags:#x}")
        return replace(export, size=size, flags=flags)
    if kind == INFO_BLOCK_SIZE:
        if len(data) != 12:
            raise ProtocolError("NBD_INFO_BLOCK_SIZE of a wrong length")
        minimum, _, maximum = unpack(">III", data)
        if not 1 <= minimum <= 1 << 16 or minimum & (minimum - 1) or maximum < minimum:
            raise ProtocolError(f"block sizes: minimum {minimum}, maximum {maximum}")
        limit = None if maximum == 0xFFFFFFFF else maximum - maximum % minimum
        return replace(export, minimum_block=minimum, maximum_payload=limit)
    if kind == INFO_NAME:
        return replace(export, name=_string(data, "an export name"))
    if kind == INFO_DESCRIPTION:
        return replace(export, description=_string(data, "a description"))
    return export
