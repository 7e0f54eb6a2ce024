# cython: annotation_typing=False
"""One connection of the NBD backend: the socket, what is to be sent, what was received."""

from __future__ import annotations

import errno as e
import os
import socket
from collections.abc import Callable
from functools import partial
from time import monotonic

import trio

from healfs.backends import nbd_protocol as proto
from healfs.backends import nbd_transmission as wire
from healfs.backends.nbd_connect import Socket
from healfs.backends.nbd_tls import TlsSocket
from healfs.backends.syscalls import receive
from healfs.core.request import Done, Kind, Request

IOV_MAX = 1024
# Small enough to stay in the processor's cache. A reply cut at its end is received to its end, and
# no farther: so the buffer is empty again then, and is used from its start.
RECEIVE = 256 << 10
RECEIVES_MAX = 16  # per wake-up, so that other tasks run

# An enum's member is looked up through its metaclass, and these are wanted for each request.
READ, WRITE = Kind.READ, Kind.WRITE
CMD_READ, CMD_WRITE = wire.CMD_READ, wire.CMD_WRITE


class Link:
    """One connection in the transmission phase.

    `piece` is the longest READ or WRITE, in bytes, and fits `view` beside one RECEIVE; `seldom`
    takes the requests that are more than one plain READ or WRITE.
    """

    def __init__(
        self,
        sock: Socket,
        export: proto.Export,
        view: memoryview,
        piece: int,
        seldom: Callable[[Request, Done], None],
    ) -> None:
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
        self.received = 0  # bytes, ever
        self.heard = 0.0  # when any came
        self.watched = True  # else what is sent next sets `busy`
        self.busy = trio.Event()
        self.answers: list[tuple[Request, Done, int]] = []  # that need no server
        self._piece = piece
        self._room = max(piece, wire.BLOCK_STATUS_MAX) + 64  # bytes of the longest chunk
        self._seldom = seldom

    def submit(self, request: Request, done: Done) -> None:
        """See Backend.submit."""
        if self.protocol.closed:
            return  # the engine will hear of it, and park what is in flight
        if request.length <= self._piece and not request.fua:  # nearly all requests
            kind = request.kind
            if kind is READ:
                self.protocol.queue(
                    wire.transfer(CMD_READ, request.offset, request.length, request, done)
                )
                return
            if kind is WRITE:
                self.protocol.queue(
                    wire.transfer(CMD_WRITE, request.offset, request.length, request, done),
                    request.data,
                )
                return
        self._seldom(request, done)

    def commit(self) -> None:
        """See Backend.commit."""
        while self.answers:
            request, done, errno = self.answers.pop(0)
            done(request, errno, None)
        if self.protocol.out and not self.blocked:
            self.send()

    def poll(self) -> bool:
        """See base.Polled: receive what is there, a bounded number of times."""
        if self.blocked:
            self.blocked = False
            self.send()
        before = self.received
        for _ in range(RECEIVES_MAX):
            if self.ended is not None or not self._receive():
                break
        if self.tls is not None:
            # Nobody would see that this is there: it came off the socket.
            while self.ended is None and self.tls.pending() and self._receive():
                pass
        if self.received == before:
            return False
        self.heard = monotonic()
        return True

    def attend(self, attended: bool) -> None:
        """See base.Polled: the socket is readable all the same; `poll` leaves nothing above it."""

    def _receive(self) -> bool:
        """Whether there may be more."""
        protocol, view, end = self.protocol, self.view, self.end
        if protocol.closed:
            return False  # so is the descriptor
        wanted = protocol.missing or RECEIVE
        try:
            if self.tls is not None:
                count = self.tls.recv_into(view[end : end + wanted])
            else:
                count = receive(self.ready_fd, view, end, wanted)
                if count == -e.EAGAIN:
                    return False
                if count < 0:
                    raise OSError(-count, os.strerror(-count))
            if not count:
                raise OSError(e.ECONNRESET, "the server closed the connection")
            self.received += count
            end += count
            self.pos = protocol.receive(view, self.pos, end)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self.finish(self.broken or error)
            return False
        self.commit()
        if protocol.closed:
            return False
        if self.pos == end:
            self.pos = end = 0
        elif len(view) - self.pos < self._room:
            view[: end - self.pos] = view[self.pos : end]
            self.pos, end = 0, end - self.pos
        self.end = end
        return count == wanted or self.tls is not None  # whose bytes epoll does not see

    def finish(self, error: OSError) -> None:
        """There is nothing more to receive, and why."""
        self.ended = error
        trio.lowlevel.notify_closing(self.sock)  # `serve` waits for more of it

    def send(self) -> None:
        """Send what is queued, as far as the socket takes it."""
        if not self.watched:
            self.watched = True
            self.busy.set()
        protocol = self.protocol
        out = protocol.out
        while out and self.broken is None:
            try:
                count = self.sock.sendmsg(out if len(out) <= IOV_MAX else out[:IOV_MAX])
            except BlockingIOError:
                if self.tls is not None:
                    protocol.handed = self.tls.handed
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
