"""The FUSE features: what this version of healfs, pyfuse3 and libfuse makes of an INIT request.

The kernel keeps what was negotiated when the file system was mounted; a later worker, perhaps of
another version, has to live with that.
"""

from __future__ import annotations

import socket
import struct

import pyfuse3
import trio

from healfs.fuse import wire
from healfs.fuse.namespace import Namespace

# fuse_init_out: major, minor, max_readahead, flags, max_background, congestion_threshold,
# max_write, time_gran, max_pages, map_alignment, flags2
_INIT_OUT = struct.Struct("<IIIIHHIIHHI")


async def negotiate(request: bytes) -> bytes:
    """The reply to a saved INIT request, without a mount. pyfuse3 must not be in use."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        ours.setblocking(False)
        namespace = Namespace("disk.img", 0, read_only=False)
        fd = theirs.detach()  # libfuse closes it
        pyfuse3.init(namespace, f"/dev/fd/{fd}", set(pyfuse3.default_options))
        ours.send(request)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pyfuse3.main)
            await trio.lowlevel.wait_readable(ours)
            reply = bytearray(ours.recv(1 << 16))
            nursery.cancel_scope.cancel()
        pyfuse3.close(unmount=False)
    wire.for_healfs(reply)
    return bytes(reply)


def difference(negotiated: bytes, ours: bytes) -> str:
    """Why a worker that would reply `ours` cannot go on where `negotiated` was; "": it can."""
    was = _INIT_OUT.unpack_from(negotiated, wire.OUT_HEADER.size)
    now = _INIT_OUT.unpack_from(ours, wire.OUT_HEADER.size)
    if was[0] != now[0]:
        return f"it speaks FUSE {now[0]}, the mount FUSE {was[0]}"
    flags = (was[3] | was[10] << 32) ^ (now[3] | now[10] << 32)
    if flags:
        return f"its FUSE features differ from the mount's (flags {flags:#x})"
    if was[6] > wire.MAX_WRITE:
        return f"the mount's longest write is {was[6]} bytes, its own {wire.MAX_WRITE}"
    return ""
