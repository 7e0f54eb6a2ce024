"""Makes healfs see a kernel before 6.9; on PYTHONPATH only where a test puts it.

The INIT request of such a kernel has no FUSE_HAS_RESEND. It is cleared where healfs first looks
at the request; all behind that is healfs as it is.
"""

from __future__ import annotations

import struct
import sys

if "healfs.daemon.worker" in sys.orig_argv:
    from healfs.fuse import wire

    _without_splice = wire.without_splice

    def without_splice_and_resend(init: bytearray) -> None:
        _without_splice(init)
        (flags2,) = struct.unpack_from("<I", init, wire.INIT_IN_FLAGS2_AT)
        flags2 &= ~wire.HAS_RESEND_FLAGS2
        struct.pack_into("<I", init, wire.INIT_IN_FLAGS2_AT, flags2)

    wire.without_splice = without_splice_and_resend
