"""Opening an NBD connection: the socket, its options, the negotiation."""

from __future__ import annotations

import errno as e
import os
import socket
import ssl
import stat

import trio

from healfs.backends import nbd_protocol as proto
from healfs.backends.base import SourceError
from healfs.backends.nbd_tls import TlsSocket, credentials
from healfs.backends.nbd_uri import NbdUri

# A silent peer is noticed within about 10 s: idle by keepalive, with bytes on the way by the
# user time-out.
KEEPALIVE = {socket.TCP_KEEPIDLE: 3, socket.TCP_KEEPINTVL: 2, socket.TCP_KEEPCNT: 3}
USER_TIMEOUT_MS = 9000

# Attempts that were abandoned may hang as long as their file system does: they must not use up the
# threads of everybody else.
READERS = 4
_readers = trio.CapacityLimiter(READERS)

Socket = socket.socket | TlsSocket


async def open_export(uri: NbdUri) -> tuple[Socket, proto.Export]:
    """A non-blocking socket in the transmission phase.

    Raises SourceError for what waiting does not mend, else OSError. The deadline is the caller's.
    """
    context = None
    if uri.tls is not None:
        # First: a file that is missing is told also while the server is away. They are read for
        # each connection, since certificates are renewed, and in a thread, since a home
        # directory may be on NFS.
        context = await trio.to_thread.run_sync(
            credentials, uri, abandon_on_cancel=True, limiter=_readers
        )
    sock = await (_open_tcp(uri) if uri.socket is None else _open_unix(uri.socket))
    try:
        sock.setblocking(False)
        return await _negotiate(uri, sock, context)
    except BaseException:
        sock.close()
        raise


async def _open_unix(path: str) -> socket.socket:
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as opening:
        # The kernel grants what net.core.wmem_max allows.
        opening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        try:
            await opening.connect(path)
        except PermissionError as error:
            text = f"{path}: permission denied; mount as a user who may write to it, or as root"
            raise SourceError(text, e.EACCES) from error
        except ConnectionRefusedError as error:
            if not path.startswith("\0") and not stat.S_ISSOCK(os.stat(path).st_mode):
                raise SourceError(f"{path}: not a socket") from error
            raise
        return socket.socket(fileno=opening.detach())


async def _open_tcp(uri: NbdUri) -> socket.socket:
    try:
        stream = await trio.open_tcp_stream(uri.host, uri.port)
    except socket.gaierror as error:
        message = f"cannot resolve {uri.host}: {error.strerror}"
        raise OSError(e.EHOSTUNREACH, message) from error
    except OSError as error:
        raise _first_with_errno(error) from error
    sock = socket.socket(fileno=stream.socket.detach())
    # trio's choice for small latency halves what a stream of writes reaches.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 0xFFFFFFFF >> 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
    return sock


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


def _first_with_errno(error: BaseException) -> OSError:
    """trio.open_tcp_stream hides the reasons, one for each address, under one OSError."""
    todo: list[BaseException | None] = [error]
    while todo:
        cause = todo.pop(0)
        if isinstance(cause, OSError) and cause.errno is not None:
            return OSError(cause.errno, os.strerror(cause.errno))  # trio's own words say more
        if isinstance(cause, BaseExceptionGroup):
            todo += cause.exceptions
        elif cause is not None:
            todo.append(cause.__cause__)
    return OSError(e.EHOSTUNREACH, str(error))


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
