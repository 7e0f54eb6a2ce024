"""TLS under an NBD connection: who the server has to be, who we are, and the socket."""

from __future__ import annotations

import errno as e
import os
import pwd
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import trio

from healfs.backends.base import SourceError
from healfs.backends.nbd_protocol import Buffer
from healfs.backends.nbd_uri import NbdUri, Tls

RECEIVE = 256 << 10  # bytes of records taken from the socket at once
SEND = 256 << 10  # bytes encrypted before the socket has taken them
SYSTEM_DIRECTORY = "/etc/pki/libnbd"  # for root; libnbd's, as are the file names

# X509_V_ERR_* of openssl/x509_vfy.h -> what is wrong and what to do
_UNTRUSTED = (
    "its certificate is not signed by a CA that is trusted here; "
    "put its CA's into {ca}, or name another directory: tls-certificates=DIR"
)
_WRONG_NAME = (
    "its certificate is not for {name}; use a name that is in it, "
    "or say which to expect: tls-hostname=NAME"
)
_VERIFY = {
    9: "its certificate, or its CA's, is not valid yet; check the clocks",
    10: "its certificate, or its CA's, has expired; renew it",
    12: "the list of revoked certificates has expired; renew ca-crl.pem",
    **dict.fromkeys((2, 18, 19, 20, 21), _UNTRUSTED),
    23: "its certificate was revoked",
    **dict.fromkeys((62, 64), _WRONG_NAME),
}

# the part of OpenSSL's reason that names a TLS alert -> what is wrong and what to do
_ALERTS = {
    "CERTIFICATE_REQUIRED": "it wants a client certificate; put client-cert.pem and "
    "client-key.pem into {directory}",
    "UNKNOWN_CA": "it does not trust the CA of our {directory}/client-cert.pem",
    "BAD_CERTIFICATE": "it does not accept our {directory}/client-cert.pem",
    "CERTIFICATE_EXPIRED": "our {directory}/client-cert.pem has expired; renew it",
    "CERTIFICATE_REVOKED": "our {directory}/client-cert.pem was revoked; get another",
    "UNKNOWN_PSK_IDENTITY": "it does not know our user name; see its PSK file",
    "DECRYPT_ERROR": "it does not accept our key",
    "BAD_RECORD_MAC": "it does not accept our key",
    "HANDSHAKE_FAILURE": "it accepts none of our ways to authenticate; "
    "certificates are in {directory}, tls-psk-file=FILE names a key",
    "ACCESS_DENIED": "it denies us access",
}


def default_directories() -> tuple[str, ...]:
    """Where libnbd looks for certificates."""
    if os.geteuid() == 0:
        return (SYSTEM_DIRECTORY,)
    home = os.path.expanduser("~")
    return f"{home}/.pki/libnbd", f"{home}/.config/pki/libnbd"


def directory_of(tls: Tls) -> str | None:
    """The directory of our certificates; None: there is none, the system's CAs are trusted."""
    if tls.certificates is not None:
        return tls.certificates
    found = (place for place in default_directories() if os.path.lexists(f"{place}/ca-cert.pem"))
    return next(found, None)


def credentials(uri: NbdUri) -> ssl.SSLContext:
    """What the files say now; reading them may block. SourceError: one of ours is wrong."""
    tls = uri.tls
    assert tls is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.check_hostname = tls.verify and bool(tls.hostname) and tls.psk_file is None
    if not tls.verify:
        context.verify_mode = ssl.CERT_NONE
    if tls.psk_file is not None:
        _use_key(context, tls.psk_file, tls.username)
        return context
    directory = directory_of(tls)
    if directory is not None:
        _use_directory(context, directory, tls.verify)
    elif tls.verify and not tls.hostname:
        raise SourceError(
            f"{uri}: a Unix socket has no name to look for in a certificate, and the system's CAs "
            "sign for anybody; add tls-hostname=NAME, or tls-certificates=DIR with the server's CA"
        )
    else:
        context.load_default_certs()
    return context


def _use_directory(context: ssl.SSLContext, directory: str, verify: bool) -> None:
    certificate, key = f"{directory}/client-cert.pem", f"{directory}/client-key.pem"
    crl = f"{directory}/ca-crl.pem"
    if verify:
        _load(context.load_verify_locations, f"{directory}/ca-cert.pem")
        if os.path.lexists(crl):
            _load(context.load_verify_locations, crl)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    if os.path.lexists(certificate) or os.path.lexists(key):

        def encrypted() -> str:
            raise SourceError(
                f"{key} is encrypted, and nobody is there to ask; "
                f"openssl pkey -in {key} -out NEW writes it plain"
            )

        _load(lambda path, key: context.load_cert_chain(path, key, encrypted), certificate, key)


def _load(load: Callable[..., Any], *paths: str) -> None:
    try:
        for path in paths:
            with open(path, "rb"):
                pass
        load(*paths)
    except ssl.SSLError as error:
        names = " and ".join(paths)
        why = (error.reason or str(error)).replace("_", " ").lower()
        raise SourceError(f"{names}: no PEM files that belong here ({why})") from error
    except SourceError:
        raise
    except OSError as error:
        raise SourceError(
            f"{path}: {error.strerror}; TLS needs it (tls-certificates=DIR names its directory)",
            error.errno or e.EIO,
        ) from error


def _use_key(context: ssl.SSLContext, path: str, username: str) -> None:
    try:
        name = username or pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        text = f"{path}: uid {os.geteuid()} has no name; nbds://USER@HOST/ gives one"
        raise SourceError(text) from None
    key = _key_of(path, name)
    context.verify_mode = ssl.CERT_NONE  # both prove that they have the key; no certificate
    # From 1.3 on a server may answer with a certificate all the same, which nobody would check.
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("kECDHEPSK:kDHEPSK:!eNULL")
    context.set_psk_client_callback(lambda hint: (name, key))  # type: ignore[attr-defined]


def _key_of(path: str, name: str) -> bytes:
    """From a file of lines USER:HEX, as psktool(1) writes them."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = [line.strip().partition(":") for line in file]
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}", error.errno or e.EIO) from error
    found = next((key for user, _, key in lines if user == name), None)
    if found is None:
        raise SourceError(f"{path}: no key of user {name!r}; nbds://USER@HOST/ names another user")
    try:
        key = bytes.fromhex(found)
    except ValueError:
        key = b""
    if not key:
        raise SourceError(f"{path}: the key of user {name!r} is not hexadecimal")
    return key


class TlsSocket:
    """As much of a non-blocking socket.socket as an NBD connection uses.

    Bytes count as sent when the socket has taken all records that hold them; of the next
    `handed` bytes it may have taken any part.
    """

    def __init__(self, raw: socket.socket, context: ssl.SSLContext, uri: NbdUri) -> None:
        assert uri.tls is not None
        self._raw = raw
        self._uri = uri
        self._tls_uri = uri.tls
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=uri.tls.hostname or None)
        self._buffer = memoryview(bytearray(RECEIVE))
        self._unsent = memoryview(b"")
        self._ended = False
        self._failure: OSError | None = None
        self.handed = 0
        self.fileno, self.family = raw.fileno, raw.family
        self.getsockopt, self.setsockopt = raw.getsockopt, raw.setsockopt
        self.shutdown = raw.shutdown

    async def handshake(self) -> None:
        """SourceError: one does not accept the other."""
        while True:
            done = True
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                done = False
            except ssl.SSLError as error:
                with suppress(OSError):
                    self._flush()  # the alert that tells the server why
                raise self._explained(error) from error
            await self._flushed()
            if done:
                break
            await trio.lowlevel.wait_readable(self._raw)
            with suppress(BlockingIOError):
                self._fill()
            if self._ended:
                raise ConnectionResetError(e.ECONNRESET, "closed during the TLS handshake")
        if self._tls_uri.psk_file is not None and "PSK" not in self.description["cipher"]:
            raise SourceError(f"{self._uri}: the server did not use the key")

    @property
    def description(self) -> dict[str, str]:
        """For status."""
        tls, certificate = self._tls_uri, self._tls.getpeercert() or {}
        subject: Any = certificate.get("subject", ())
        names = [value for part in subject for key, value in part if key == "commonName"]
        if tls.psk_file is not None:
            peer = "has the key"
        elif not tls.verify:
            peer = "not checked"
        else:
            peer = tls.hostname or next(iter(names), "without a name")
        cipher = self._tls.cipher()
        return {
            "version": self._tls.version() or "",
            "cipher": cipher[0] if cipher else "",
            "peer": peer,
        }

    @property
    def notes(self) -> tuple[str, ...]:
        """For status: what is not checked."""
        if self._tls_uri.psk_file is not None:
            return ()
        if not self._tls_uri.verify:
            return ("who the server is was not checked (tls-verify-peer=0)",)
        if not self._tls_uri.hostname:
            return (
                "any server that our CA signed for is taken: a Unix socket has no host name; "
                "tls-hostname=NAME says which",
            )
        return ()

    async def readable(self) -> None:
        """As trio's wait_readable. ClosedResourceError when it was closed."""
        if self.pending():
            await trio.lowlevel.checkpoint()
        elif self._raw.fileno() >= 0:
            await trio.lowlevel.wait_readable(self._raw)
        if self._raw.fileno() < 0:
            raise trio.ClosedResourceError

    def pending(self) -> bool:
        """Whether there is something to receive that the socket below is not readable for."""
        ended = self._ended or self._failure is not None
        return ended or bool(self._in.pending or self._tls.pending())

    def recv_into(self, view: memoryview) -> int:
        if not self.pending():
            self._fill()  # once: a server that sends records without data must not hold the loop
        filled = 0
        while filled < len(view) and self.pending():
            if self._failure is not None:
                if filled:
                    break
                raise self._failure
            try:
                # A record at a time, of 16 KiB at most.
                count: int = self._tls.read(len(view) - filled, view[filled:])  # type: ignore[assignment]
            except ssl.SSLWantReadError:
                continue
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                count = 0
            except ssl.SSLError as error:
                self._failure = self._explained(error)
                continue
            if not count:
                self._ended = True
                break
            filled += count
        if self._out.pending:
            with suppress(OSError):
                self._flush()
        if not filled and not self._ended:
            raise BlockingIOError(e.EAGAIN, "no whole record has come")
        return filled

    def recv(self, size: int) -> bytes:
        data = bytearray(size)
        return bytes(data[: self.recv_into(memoryview(data))])

    def sendmsg(self, buffers: Sequence[Buffer]) -> int:
        """After BlockingIOError the same bytes have to be given again, more may follow them."""
        if not self.handed:
            parts: list[Buffer] = []
            room = SEND
            for buffer in buffers:
                parts.append(buffer if len(buffer) <= room else memoryview(buffer)[:room])
                room -= len(parts[-1])
                if not room:
                    break
            data = memoryview(b"".join(parts))
            self.handed = len(data)
            try:
                while data:
                    data = data[self._tls.write(data) :]  # a record at a time
            except ssl.SSLError as error:
                raise self._explained(error) from error
        self._flush()
        count, self.handed = self.handed, 0
        return count

    def send(self, data: Buffer) -> int:
        return self.sendmsg([data])

    def close(self) -> None:
        if not self.handed:  # else the end of a record is missing: nothing may follow
            with suppress(OSError):
                self._tls.unwrap()  # close_notify; the answer to it is not waited for
            with suppress(OSError):
                self._flush()
        self._raw.close()

    def _fill(self) -> None:
        count = self._raw.recv_into(self._buffer)
        if count:
            self._in.write(self._buffer[:count])
        else:
            self._in.write_eof()
            self._ended = True

    def _flush(self) -> None:
        while self._unsent or self._out.pending:
            if not self._unsent:
                self._unsent = memoryview(self._out.read())
            self._unsent = self._unsent[self._raw.send(self._unsent) :]

    async def _flushed(self) -> None:
        while True:
            try:
                return self._flush()
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._raw)

    def _explained(self, error: ssl.SSLError) -> SourceError:
        """One line; what no table has is told in OpenSSL's words."""
        directory = directory_of(self._tls_uri) or default_directories()[0]
        if isinstance(error, ssl.SSLCertVerificationError):
            text = _VERIFY.get(error.verify_code, f"its certificate: {error.verify_message}")
        else:
            reason = error.reason or str(error)
            known = (text for alert, text in _ALERTS.items() if reason.endswith("ALERT_" + alert))
            text = next(known, f"TLS failed: {reason.replace('_', ' ').lower()}")
        text = text.format(
            name=self._tls_uri.hostname, ca=f"{directory}/ca-cert.pem", directory=directory
        )
        return SourceError(f"{self._uri}: the server: {text}", e.EPROTO)
