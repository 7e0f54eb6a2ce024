"""NBD backend: the sockets under nbd_protocol and nbd_transmission."""

from __future__ import annotations

import errno as e
import hashlib
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from struct import iter_unpack
from typing import Any

import trio

from healfs.backends import nbd_protocol as proto
from healfs.backends import nbd_transmission as wire
from healfs.backends import nbd_uri
from healfs.backends.base import Backend, Extent, Geometry, Polled, SourceError
from healfs.backends.nbd_connect import Tries, open_export
from healfs.backends.nbd_link import RECEIVE, Link
from healfs.backends.nbd_peer import LOOK_SECONDS, Peer, Tcp
from healfs.backends.nbd_tls import TlsSocket
from healfs.backends.nbd_watch import path_changed
from healfs.core.request import Done, Kind, Request

HANGS_SECONDS = 0.1  # of a try to connect: from then on its socket file is watched
PIECE_MAX = 2 << 20  # bytes of one READ or WRITE; a whole READ must fit the receive buffer
ZERO_MAX = 128 << 20  # bytes of one TRIM or WRITE_ZEROES: slow servers write the zeroes
PIECES_IN_FLIGHT = 4  # of one request
STATUS_MAX = 1 << 30  # bytes asked by one BLOCK_STATUS
EXTENT_ROUNDS = 64
BUFFER = PIECE_MAX + 4 * RECEIVE
IDENTITY_MAX = 256  # bytes of a name or description; a longer one is known by its hash
MAXIMUM_PAYLOAD = 32 << 20  # where the server names no limit

_COMMANDS = {
    Kind.READ: wire.CMD_READ,
    Kind.WRITE: wire.CMD_WRITE,
    Kind.FLUSH: wire.CMD_FLUSH,
    Kind.DISCARD: wire.CMD_TRIM,
    Kind.WRITE_ZEROES: wire.CMD_WRITE_ZEROES,
}


def _short(text: str) -> str:
    """Of an identity: it is kept beside the write log, where there is not room for all that a
    server may say of itself."""
    data = text.encode(errors="replace")
    if len(data) <= IDENTITY_MAX:
        return text
    return f"{text[:32]}... (sha256 {hashlib.sha256(data).hexdigest()})"


class Pieces:
    """A request that needs several commands: too long, or a FUA write without NBD's FUA."""

    def __init__(
        self, backend: NbdBackend, request: Request, done: Done, piece: int, flags: int, flush: bool
    ) -> None:
        self._backend = backend
        self._request = request
        self._done = done
        self._flags = flags
        self._flush = flush
        self._errno = 0
        self._in_flight = 0
        self._todo = self._cut(piece)
        self._data = bytearray(request.length) if request.kind is Kind.READ else None
        for _ in range(PIECES_IN_FLIGHT):
            self._next()

    def _cut(self, piece: int) -> Iterator[tuple[int, int]]:
        for start in range(0, self._request.length, piece):
            yield start, min(piece, self._request.length - start)

    def _next(self) -> None:
        start, length = next(self._todo, (0, 0))
        if not length:
            return
        self._in_flight += 1
        request = self._request
        payload = None
        if request.data is not None:
            payload = memoryview(request.data)[start : start + length]
        self._backend.queue(
            _COMMANDS[request.kind],
            self._flags,
            request.offset + start,
            length,
            request,
            partial(self._piece, start),
            payload,
        )

    def _piece(self, start: int, request: Request, errno: int, data: proto.Buffer | None) -> None:
        self._in_flight -= 1
        if errno:
            self._errno = self._errno or errno
            self._todo = iter(())
        elif self._data is not None and data is not None:
            self._data[start : start + len(data)] = data
        self._next()
        if self._in_flight:
            return
        if self._flush and not self._errno:
            self._backend.queue(wire.CMD_FLUSH, 0, 0, 0, request, self._done, None)
            return
        self._done(request, self._errno, None if self._errno else self._data)


class NbdBackend(Backend):
    """An NBD export. `source` is an NBD URI; a bad one raises SourceError at once."""

    settle = 5.0

    def __init__(self, source: str) -> None:
        self.source = source
        self._uri = nbd_uri.parse(source)
        self._tries = Tries()
        self._link: Link | None = None
        self._view = memoryview(bytearray(BUFFER))
        self._answers: list[tuple[Request, Done, int]] = []
        self._extent_waiters: set[trio.Event] = set()
        self._taken: set[Request] = set()
        self._sent = 0
        self._was_connected = False
        self._socket_file: tuple[int, int] | None = None
        self._piece_max = PIECE_MAX
        self._zero_max = ZERO_MAX
        self._fua_flag = 0

    # --- connecting ---

    def resumed(self) -> None:
        self._was_connected = True

    async def connect(self) -> Geometry:
        """See Backend.connect. SourceError only before the first success: later, a server that
        refuses the export or talks nonsense is one that has not started up."""
        self.close()
        self._taken = set()
        self._socket_file = self._stat_socket()
        try:
            geometry = await self._connect_while_there()
        except SourceError as error:
            if self._was_connected:
                raise OSError(e.ECONNREFUSED, str(error)) from error
            raise
        self._was_connected = True
        return geometry

    async def _connect_while_there(self) -> Geometry:
        """A server that hangs is not waited for when another one has taken its socket's place."""
        if self._uri.socket is None:
            return await self._connect()
        geometry = failure = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._until_replaced, nursery.cancel_scope)
            try:
                geometry = await self._connect()
            except OSError as error:  # not to be wrapped in a group
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if geometry is None:
            raise OSError(e.ECONNABORTED, f"{self._uri.socket}: another server is there now")
        return geometry

    async def _until_replaced(self, scope: trio.CancelScope) -> None:
        await trio.sleep(HANGS_SECONDS)
        await self.wait_changed()
        scope.cancel()

    async def _connect(self) -> Geometry:
        sock, export = await open_export(self._uri, self._tries)
        try:
            geometry = self._geometry(export)
            if isinstance(sock, TlsSocket):
                notes = geometry.notes + sock.notes
                geometry = replace(geometry, notes=notes, tls=sock.description)
        except BaseException:
            sock.close()
            raise
        self._link = link = Link(sock, export, self._view, self._piece_max, self._seldom)
        # A call less for each request and each batch.
        self.submit = link.submit  # type: ignore[method-assign]
        self.commit = link.commit  # type: ignore[method-assign]
        return geometry

    def _geometry(self, export: proto.Export) -> Geometry:
        block = export.minimum_block
        size = export.size - export.size % block
        if not size:
            raise SourceError(f"{self._uri}: export {self._uri.export!r} has size 0")
        limit = export.maximum_payload
        self._piece_max = min(limit or PIECE_MAX, PIECE_MAX)
        # Servers may refuse more than their maximum payload even where there is none (EOVERFLOW).
        self._zero_max = min(limit or ZERO_MAX, ZERO_MAX)
        self._fua_flag = wire.CMD_FLAG_FUA if export.flags & proto.SEND_FUA else 0
        can_flush = bool(export.flags & proto.SEND_FLUSH)
        notes = () if can_flush else ("the server cannot flush: nothing is known to be stable",)
        return Geometry(
            size=size,
            minimum_block=block,
            maximum_payload=limit or MAXIMUM_PAYLOAD,
            read_only=bool(export.flags & proto.READ_ONLY),
            can_flush=can_flush,
            can_fua=bool(self._fua_flag),
            can_discard=bool(export.flags & proto.SEND_TRIM),
            can_write_zeroes=bool(export.flags & proto.SEND_WRITE_ZEROES),
            volatile_cache=can_flush,
            multi_conn=bool(export.flags & proto.CAN_MULTI_CONN),
            identity={
                "export": _short(self._uri.export if export.name is None else export.name),
                "minimum_block": str(block),
                "description": _short(export.description),
            },
            notes=notes,
        )

    # --- requests ---

    def submit(self, request: Request, done: Done) -> None:
        """Not connected."""
        self._answers.append((request, done, e.ENOTCONN))

    def _seldom(self, request: Request, done: Done) -> None:
        """What is more than one READ or WRITE."""
        link, kind = self._link, request.kind
        if link is None:
            return
        flags = 0
        limit = self._piece_max
        flush = False
        if kind is Kind.WRITE or kind is Kind.WRITE_ZEROES:
            if request.fua:
                flags = self._fua_flag
                flush = not flags and bool(link.export.flags & proto.SEND_FLUSH)
            if kind is Kind.WRITE_ZEROES:
                limit = self._zero_max
                if not request.may_unmap:
                    flags |= wire.CMD_FLAG_NO_HOLE
        elif kind is Kind.DISCARD:
            limit = self._zero_max
        errno = self._unable(link, kind)
        if errno is not None:
            link.answers.append((request, done, errno))
        elif request.length > limit or flush:
            Pieces(self, request, done, limit, flags, flush)
        elif kind is Kind.FLUSH:
            self.queue(wire.CMD_FLUSH, 0, 0, 0, request, done, None)
        else:
            command = wire.Command(
                _COMMANDS[kind], flags, request.offset, request.length, request, done
            )
            link.protocol.queue(command, request.data if kind is Kind.WRITE else None)

    @staticmethod
    def _unable(link: Link, kind: Kind) -> int | None:
        """The errno for what the server cannot do at all; 0 for what is done by nothing."""
        flags = link.export.flags
        if kind is Kind.FLUSH and not flags & proto.SEND_FLUSH:
            # As QEMU and Linux do: a guest cannot use a disk whose flush fails. notes says it.
            return 0
        if kind is Kind.WRITE_ZEROES and not flags & proto.SEND_WRITE_ZEROES:
            return e.EOPNOTSUPP
        if kind is Kind.DISCARD and not flags & proto.SEND_TRIM:
            return e.EOPNOTSUPP
        return None

    def queue(
        self,
        type: int,
        flags: int,
        offset: int,
        length: int,
        context: Any,
        complete: wire.Complete,
        payload: proto.Buffer | None,
    ) -> None:
        """One command of a request; for Pieces."""
        if self._link is not None:
            command = wire.Command(type, flags, offset, length, context, complete)
            self._link.protocol.queue(command, payload)

    def commit(self) -> None:
        while self._answers:
            request, done, errno = self._answers.pop(0)
            done(request, errno, None)

    # --- serving ---

    @property
    def polled(self) -> Polled | None:
        return self._link

    @property
    def heard(self) -> float:
        return 0.0 if self._link is None else self._link.heard

    async def serve(self) -> OSError:
        link = self._link
        if link is None:
            return OSError(e.ENOTCONN, os.strerror(e.ENOTCONN))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_rest, link)
            if link.sock.family != socket.AF_UNIX:
                nursery.start_soon(self._watch_peer, link)
            error = await self._receive(link)
            nursery.cancel_scope.cancel()
        if self._link is link:
            self.close()
        return error

    async def _send_rest(self, link: Link) -> None:
        """Send what the socket did not take at once."""
        while True:
            await link.writable_wanted.wait()
            if link.protocol.closed:
                return
            try:
                await trio.lowlevel.wait_writable(link.sock)
            except trio.ClosedResourceError:
                return
            link.writable_wanted = trio.Event()
            link.blocked = False
            link.send()

    async def _watch_peer(self, link: Link) -> None:
        """With something on the way; with nothing the kernel's keepalive does it, and we sleep."""
        peer = Peer()
        while not link.protocol.closed:
            if not link.protocol.pending:
                link.busy = trio.Event()
                link.watched = False
                await link.busy.wait()
                peer = Peer()
            await trio.sleep(LOOK_SECONDS)
            try:
                gone = peer.look(Tcp.of(link.sock), trio.current_time())
            except OSError:
                return  # the connection has ended
            if gone is not None:
                link.finish(gone)
                return

    async def _receive(self, link: Link) -> OSError:
        while link.ended is None and not link.protocol.closed:
            try:
                await link.readable()
            except trio.ClosedResourceError:
                break
            link.poll()
        return link.ended or OSError(e.ECONNABORTED, "the connection was given up")

    def close(self) -> None:
        link = self._link
        if link is None:
            return
        self._link = None
        del self.submit, self.commit
        link.answers.clear()
        self._sent = link.sent
        pending = link.protocol.pending.values()
        self._taken = {c.context for c in pending if c.start < self._sent and c.context}
        link.close()
        link.protocol.pending.clear()
        link.protocol.out.clear()
        for event in self._extent_waiters:
            event.set()

    def taken(self, request: Request) -> bool:
        """What the socket took no byte of, the server cannot carry out."""
        return request in self._taken

    # --- what else ---

    async def extents(self, offset: int, length: int) -> list[Extent] | None:
        """See Backend.extents: base:allocation, where what reads as zeroes is a hole. Gives at
        least the first run and, if it is in the range, the beginning of the next."""
        found: list[Extent] = []
        end = offset + length
        for _ in range(EXTENT_ROUNDS):
            entry = await self._extent(offset, end - offset)
            if entry is None:
                return None
            if found and found[-1].hole == entry.hole:
                found[-1] = Extent(found[-1].offset, found[-1].length + entry.length, entry.hole)
            else:
                found.append(entry)
            offset += entry.length
            if offset >= end or len(found) == 2:
                break
        return found

    async def _extent(self, offset: int, length: int) -> Extent | None:
        link = self._link
        if link is None or link.export.context is None:
            return None
        block = link.export.minimum_block
        start = offset - offset % block
        stop = min(-(-(offset + length) // block) * block, start + STATUS_MAX)
        answer: list[bytes] = []
        event = trio.Event()

        def complete(context: None, errno: int, data: proto.Buffer | None) -> None:
            if not errno and data is not None:
                answer.append(bytes(data))
            event.set()

        self.queue(
            wire.CMD_BLOCK_STATUS, wire.CMD_FLAG_REQ_ONE, start, stop - start, None, complete, None
        )
        self.commit()
        self._extent_waiters.add(event)
        try:
            await event.wait()
        finally:
            self._extent_waiters.discard(event)
        if not answer:
            return None
        size, state = next(iter_unpack(">II", answer[0]))
        until = min(start + size, offset + length)
        # A server may claim an extent shorter than its own minimum block.
        if until <= offset:
            return None
        return Extent(offset, until - offset, bool(state & wire.STATE_ZERO))

    def _stat_socket(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._uri.socket or "")
        except (OSError, ValueError):
            return None
        return found.st_ino, found.st_ctime_ns

    async def wait_changed(self) -> None:
        """See Backend.wait_changed: the socket file is another than at the last connect()."""
        path = self._uri.socket
        if path is None or path.startswith("\0"):
            await trio.sleep_forever()
        else:
            await path_changed(path, lambda: self._stat_socket() not in (None, self._socket_file))
