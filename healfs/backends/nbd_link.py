# cython: annotation_typing=False
"""One connection of the NBD backend: the socket, what is to be sent, what was received."""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial

import trio

from healfs.backends import nbd_protocol as proto
from healfs.backends import nbd_transmission as wire
from healfs.backends.nbd_connect import Socket
from healfs.backends.nbd_tls import TlsSocket

IOV_MAX = 1024


class Link:
    """One connection in the transmission phase."""

    __slots__ = (
        *("blocked", "broken", "end", "ended", "export", "poll", "pos", "protocol", "readable"),
        *("ready_fd", "sock", "tls", "view", "writable_wanted"),
    )

    def __init__(self, sock: Socket, export: proto.Export, view: memoryview) -> None:
        self.sock = sock
        self.tls = sock if isinstance(sock, TlsSocket) else None
        self.readable = (
            partial(trio.lowlevel.wait_readable, sock) if self.tls is None else self.tls.readable
        )
        self.export = export
        self.protocol = wire.Transmission(export.structured, export.context)
        self.view = view
        self.broken: OSError | None = None
        self.blocked = False  # the socket is full; `writable_wanted` is set
        self.writable_wanted = trio.Event()
        self.pos = self.end = 0  # of what was received and is no whole reply yet, in view
        self.ended: OSError | None = None  # why there is nothing more to receive
        self.ready_fd = sock.fileno()
        self.poll: Callable[[], None] = lambda: None  # see base.Polled

    def send(self) -> None:
        """Send what is queued, as far as the socket takes it."""
        protocol = self.protocol
        out = protocol.out
        while out and self.broken is None:
            try:
                count = self.sock.sendmsg(out if len(out) <= IOV_MAX else out[:IOV_MAX])
            except BlockingIOError:
                self.blocked = True
                self.writable_wanted.set()
                return
            except InterruptedError:
                continue
            except OSError as error:
                # Replies that came before the end are still to be read: serve() finds the end
                # after them, and sees this error, which recv would no longer tell.
                self.broken = error
                try:
                    self.sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
                return
            protocol.taken(count)

    @property
    def sent(self) -> int:
        """Bytes of the commands that the socket took, or may have taken."""
        return self.protocol.sent + (self.tls.handed if self.tls is not None else 0)

    def close(self) -> None:
        protocol = self.protocol
        protocol.closed = True
        try:
            trio.lowlevel.notify_closing(self.sock)
        except RuntimeError:
            pass  # no event loop: nobody waits
        try:
            if not protocol.pending and self.broken is None:
                self.sock.send(wire.disconnect())
            elif self.sock.family != socket.AF_UNIX:
                # Unacknowledged writes must die with the connection: else the kernel would go on
                # to send them, and they could land after newer ones.
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        except OSError:
            pass
        self.sock.close()
