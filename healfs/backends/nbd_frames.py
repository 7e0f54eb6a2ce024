"""The fixed parts of NBD's messages in the transmission phase (nbd/doc/proto.md).

nbd_frames.pyx is the same for a C compiler, and takes the place of this where it was compiled.
"""

from __future__ import annotations

from struct import Struct

_REQUEST = Struct(">IHHQQI")
_REPLY = Struct(">IIQ")
_CHUNK = Struct(">IIQIQ")
REQUEST = 0x25609513


def request(flags: int, type: int, cookie: int, offset: int, length: int) -> bytes:
    """The 28 bytes of a command."""
    return _REQUEST.pack(REQUEST, flags, type, cookie, offset, length)


class Reply:
    """The head of a reply: of a simple one `magic`, `error` and `cookie`; of a structured one
    `error` is its flags and type, and there are `length` and, where the chunk has it, `offset`.
    """

    def __init__(self) -> None:
        self.magic = 0
        self.error = 0
        self.cookie = 0
        self.length = 0
        self.offset = 0

    def read(self, view: memoryview, pos: int, end: int) -> None:
        """At least 16 bytes are there; what is behind `end` is 0."""
        if end - pos >= 28:
            self.magic, self.error, self.cookie, self.length, self.offset = _CHUNK.unpack_from(
                view, pos
            )
            return
        self.magic, self.error, self.cookie = _REPLY.unpack_from(view, pos)
        self.length = int.from_bytes(view[pos + 16 : pos + 20], "big") if end - pos >= 20 else 0
        self.offset = 0
