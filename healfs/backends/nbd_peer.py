"""Is the other end of a TCP connection there? Of the peer's kernel, not of the server."""

from __future__ import annotations

import errno as e
import socket
from dataclasses import dataclass
from struct import Struct

from healfs.backends.nbd_connect import Socket

LOOK_SECONDS = 1.0
GONE_SECONDS = 9.0  # without an acknowledgement of what asks for one

_INFO = Struct("8B13I")  # struct tcp_info of linux/tcp.h, its beginning


@dataclass(frozen=True, slots=True)
class Tcp:
    """What the kernel knows of a connection."""

    asked: int  # retransmissions and probes (of a closed window, too) since the last answer to any
    silent: float  # seconds since the last acknowledgement

    @staticmethod
    def of(sock: Socket) -> Tcp:
        found = _INFO.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size))
        retransmits, probes, last_ack_recv = found[2], found[3], found[20]
        return Tcp(retransmits + probes, last_ack_recv / 1000)


class Peer:
    """Tells a peer that is gone from one that is slow: it may have no room for as long as it likes
    (and then asks for it to be probed, less and less often), as long as it acknowledges."""

    def __init__(self) -> None:
        self._unanswered_since: float | None = None

    def look(self, tcp: Tcp, now: float) -> OSError | None:
        """To be called again and again while something is on the way; the error when it is gone."""
        since = self._unanswered_since
        if not tcp.asked:
            self._unanswered_since = None
        elif since is None or now - since > tcp.silent:
            # What is first asked for now: silence before that says nothing, nobody had asked.
            self._unanswered_since = now
        elif now - since >= GONE_SECONDS - LOOK_SECONDS and tcp.silent >= GONE_SECONDS:
            return OSError(e.ETIMEDOUT, f"the peer has acknowledged nothing for {tcp.silent:.0f} s")
        return None
