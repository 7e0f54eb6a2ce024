"""The kinds of requests. Apart from Request, so that the keeper needs no compiled module."""

from __future__ import annotations

import enum


class Kind(enum.IntEnum):
    """Request kinds: virtio-blk's IN, OUT, FLUSH, DISCARD, WRITE_ZEROES (virtio 1.2, 5.2.6)."""

    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3
    WRITE_ZEROES = 4
