"""Opening an NBD connection: the socket, its options, the negotiation."""

from __future__ import annotations

import errno as e
import os
import socket
import ssl
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from healfs.backends import nbd_protocol as proto
from healfs.backends.base import SourceError
from healfs.backends.nbd_tcp import Addresses, open_tcp
from healfs.backends.nbd_tls import TlsSocket, credentials
from healfs.backends.nbd_uri import NbdUri

CONNECT_SECONDS = 10.0  # until a connection is open
HANDSHAKE_SECONDS = 10.0  # from then to the end of the negotiation; after that time twice as long,
HANDSHAKE_MAX = 40.0  # and twice, up to this: a server may take longer to open the disk
BACKLOG_PAUSE = 0.005, 0.25  # seconds, the first and the longest, while a backlog is full

# Attempts that were abandoned may hang as long as their file system does: they must not use up the
# threads of everybody else.
READERS = 4
_readers = trio.CapacityLimiter(READERS)

Socket = socket.socket | TlsSocket


class Tries:
    """What the tries to connect since the last that succeeded have taught."""

    def __init__(self) -> None:
        self.addresses = Addresses()
        self.seconds = HANDSHAKE_SECONDS

    def hung(self) -> None:
        self.seconds = min(self.seconds * 2, HANDSHAKE_MAX)

    def succeeded(self) -> None:
        self.addresses.served()
        self.seconds = HANDSHAKE_SECONDS


async def open_export(uri: NbdUri, tries: Tries) -> tuple[Socket, proto.Export]:
    """A non-blocking socket in the transmission phase.

    Raises SourceError for what waiting does not mend, else OSError.
    """
    with _deadline(uri, CONNECT_SECONDS):
        context = None
        if uri.tls is not None:
            # First: a file that is missing is told also while the server is away. They are read
            # for each connection, since certificates are renewed, and in a thread, since a home
            # directory may be on NFS.
            context = await trio.to_thread.run_sync(
                credentials, uri, abandon_on_cancel=True, limiter=_readers
            )
        if uri.socket is None:
            sock = await open_tcp(uri.host, uri.port, tries.addresses)
        else:
            sock = await _open_unix(uri.socket)
    try:
        sock.setblocking(False)
        with _deadline(uri, tries.seconds, tries.hung):
            negotiated = await _negotiate(uri, sock, context)
    except BaseException:
        tries.addresses.failed(sock)
        sock.close()
        raise
    tries.succeeded()
    return negotiated


@contextmanager
def _deadline(
    uri: NbdUri, seconds: float, hung: Callable[[], None] = lambda: None
) -> Iterator[None]:
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError:
        hung()
        raise OSError(e.ETIMEDOUT, f"no answer from {uri} in {seconds:g} s") from None


async def _open_unix(path: str) -> socket.socket:
    pause, longest = BACKLOG_PAUSE
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # The kernel grants what net.core.wmem_max allows.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        while True:
            try:
                sock.connect(path)
                return sock
            except BlockingIOError:
                # It listens, and more wait to be accepted than it has room for. Nothing is under
                # way, and the socket never tells when there is room.
                await trio.sleep(pause)
                pause = min(pause * 2, longest)
    except BaseException as error:
        sock.close()
        if isinstance(error, PermissionError):
            text = f"{path}: permission denied; mount as a user who may write to it, or as root"
            raise SourceError(text, e.EACCES) from error
        if isinstance(error, ConnectionRefusedError) and not _may_be_socket(path):
            raise SourceError(f"{path}: not a socket") from error
        raise


def _may_be_socket(path: str) -> bool:
    return path.startswith("\0") or stat.S_ISSOCK(os.stat(path).st_mode)


async def _negotiate(
    uri: NbdUri, raw: socket.socket, context: ssl.SSLContext | None
) -> tuple[Socket, proto.Export]:
    handshake = proto.Handshake(uri.export, tls=context is not None)
    sock: Socket = raw
    accepted = context is None  # the server has answered over TLS
    try:
        while handshake.export is None:
            if handshake.starts_tls and context is not None:
                handshake.starts_tls = False
                sock = TlsSocket(raw, context, uri)
                await sock.handshake()
            await _send_all(sock, handshake.data_to_send())
            if data := await _receive_some(sock):
                accepted = accepted or sock is not raw
                handshake.receive(data)
            elif handshake.asked_by_export_name:
                # An old server has no other way to say so.
                raise _refused(uri, "the server closed the connection when asked for it")
            else:
                raise ConnectionResetError(e.ECONNRESET, "closed during the handshake")
    except proto.ProtocolError as error:
        raise SourceError(f"{uri}: {error.strerror}; is this an NBD server?") from error
    except proto.OptionError as error:
        raise _option_error(uri, error) from error
    except (ConnectionResetError, BrokenPipeError) as error:
        if accepted or sock is raw:
            raise
        # GnuTLS's servers say no more to a client whose certificate they miss or do not like.
        raise OSError(e.ECONNRESET, f"{uri}: {_CLOSED_IN_TLS}") from error
    return sock, handshake.export


_CLOSED_IN_TLS = (
    "the server closed the connection as TLS began; if it wants a client certificate, "
    "tls-certificates=DIR names a directory with client-cert.pem and client-key.pem"
)


def _refused(uri: NbdUri, why: str) -> SourceError:
    return SourceError(
        f"{uri}: export {uri.export!r} refused: {why}; "
        f"`nbdinfo --list` shows what the server offers"
    )


def _option_error(uri: NbdUri, error: proto.OptionError) -> OSError:
    if error.code == proto.REP_ERR_SHUTDOWN:
        return OSError(e.ESHUTDOWN, f"{uri}: the server is shutting down")
    if error.option == proto.OPT_STARTTLS:
        return SourceError(
            f"{uri}: the server offers no TLS{error.message and f' ({error.message})'}; set it up "
            "there, or write nbd in place of nbds: nothing is encrypted or checked then"
        )
    if error.code == proto.REP_ERR_TLS_REQD:
        return SourceError(f"{uri}: the server demands TLS; write nbds in place of nbd")
    if error.code == proto.REP_ERR_UNKNOWN:
        return _refused(uri, error.message or "the server has none of this name")
    if error.code == proto.REP_ERR_POLICY:
        return _refused(uri, error.message or "the server's policy forbids it")
    return _refused(uri, error.message or f"option error {error.code - proto.REP_ERROR}")


async def _send_all(sock: Socket, data: bytes) -> None:
    while data:
        try:
            data = data[sock.send(data) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)


async def _receive_some(sock: Socket) -> bytes:
    while True:
        try:
            return sock.recv(1 << 16)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)
