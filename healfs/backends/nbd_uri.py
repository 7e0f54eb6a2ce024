"""NBD URIs, as the NBD URI specification (nbd/doc/uri.md) and libnbd (nbd_connect_uri(3)) have
them."""

from __future__ import annotations

import os
import platform
import ssl
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, unquote, unquote_to_bytes, urlsplit

from healfs.backends.base import SourceError

SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix")
DEFAULT_PORT = 10809
EXPORT_NAME_MAX = 4096  # bytes; the protocol's limit on strings
SUN_PATH_MAX = 107  # bytes of sockaddr_un.sun_path, without its NUL

_TLS_PARAMETERS = (
    *("tls-type", "tls-hostname", "tls-verify-peer"),
    *("tls-certificates", "tls-psk-file", "tls-username"),
)
_PATHS = ("socket", "tls-certificates", "tls-psk-file")


@dataclass(frozen=True, slots=True)
class Tls:
    """How the server is known, and we to it: by certificates, or by the key of `psk_file`."""

    hostname: str = ""  # to be in the server's certificate; "": any name
    verify: bool = True
    certificates: str | None = None  # a directory; None: see nbd_tls
    psk_file: str | None = None
    username: str = ""


@dataclass(frozen=True, slots=True)
class NbdUri:
    """Where an export is: `socket` for a Unix socket, else `host` and `port`."""

    export: str
    host: str = ""
    port: int = DEFAULT_PORT
    socket: str | None = None
    tls: Tls | None = None

    def __str__(self) -> str:
        if self.socket is not None:
            return self.socket
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse(text: str) -> NbdUri:
    """Parse nbd[s]://[USER@]HOST[:PORT]/EXPORT or nbd[s]+unix://[USER@]/EXPORT?socket=PATH.

    Raises SourceError with one line that says what is wrong.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        text = f"{text}: an NBD URI is UTF-8; write the other bytes of a path as %XX"
        raise SourceError(text) from None
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise SourceError(f"{text}: not an NBD URI: {error}") from error
    if parts.password is not None:
        # It is not repeated.
        raise SourceError("an NBD URI has no password; tls-psk-file=FILE names a file of keys")
    if parts.scheme not in SCHEMES:
        raise SourceError(
            f"{text}: unknown scheme; use nbd://, nbds://, nbd+unix:// or nbds+unix://"
        )
    if parts.fragment:
        raise SourceError(f"{text}: an NBD URI has no fragment; write '#' in a name as %23")
    export = _text(text, parts.path[1:])
    if len(export.encode()) > EXPORT_NAME_MAX or "\0" in export:
        raise SourceError(f"{text}: no NBD export can have this name")
    unix, secure = parts.scheme.endswith("+unix"), parts.scheme.startswith("nbds")
    found = _parameters(text, parts.query, unix, secure)
    if parts.username is not None and not secure:
        raise SourceError(f"{text}: a user name needs TLS; write nbds in place of nbd")
    if unix:
        if host or port is not None:
            raise SourceError(
                f"{text}: a Unix socket has no host; write nbd+unix:///EXPORT?socket=PATH"
            )
        host, path = "", _socket(text, found.get("socket", ""))
    else:
        path = None
        if not host:
            raise SourceError(f"{text}: a host is missing; write nbd://HOST[:PORT]/EXPORT")
        if port == 0:
            raise SourceError(f"{text}: port 0 is none")
        host = _text(text, host)
        _check_host(text, host)
    tls = _tls(text, found, host, _text(text, parts.username or "")) if secure else None
    return NbdUri(export, host, port or DEFAULT_PORT, path, tls)


def absolute(text: str) -> str:
    """The URI with its paths as seen from any directory."""
    text, hash_, fragment = text.partition("#")
    head, mark, query = text.partition("?")
    parameters = query.split("&")
    for i, parameter in enumerate(parameters):
        key, _, value = parameter.partition("=")
        path = os.fsdecode(unquote_to_bytes(os.fsencode(value)))
        if unquote(key) in _PATHS and path and not path.startswith(("/", "\0")):
            value = quote(os.fsencode(os.path.abspath(path)), safe="/")
            parameters[i] = f"{key}={value}"
    return head + mark + "&".join(parameters) + hash_ + fragment


def _parameters(uri: str, query: str, unix: bool, secure: bool) -> dict[str, str]:
    found: dict[str, str] = {}
    # In NBD URIs '+' is itself, as in RFC 3986, and no space, as in HTML forms.
    pairs = parse_qsl(query.replace("+", "%2B"), keep_blank_values=True, errors="surrogateescape")
    for key, value in pairs:
        if key in _TLS_PARAMETERS and not secure:
            raise SourceError(f"{uri}: {key} needs TLS; write nbds in place of nbd")
        if key not in _TLS_PARAMETERS and not (key == "socket" and unix):
            raise SourceError(f"{uri}: unknown parameter {key!r}")
        if key in found:
            raise SourceError(f"{uri}: {key} is there twice")
        found[key] = value
    return found


def _text(uri: str, quoted: str) -> str:
    try:
        return unquote(quoted, errors="strict")
    except UnicodeDecodeError as error:
        raise SourceError(f"{uri}: the %-escapes are not UTF-8") from error


def _socket(uri: str, path: str) -> str:
    if not path:
        raise SourceError(f"{uri}: needs one parameter socket=PATH")
    if len(path.encode(errors="surrogateescape")) > SUN_PATH_MAX:
        raise SourceError(f"{uri}: the socket's path is longer than {SUN_PATH_MAX} bytes")
    if "\0" in path[1:] or path == "\0":
        raise SourceError(f"{uri}: the socket's path has a NUL in it")
    return path


def _tls(uri: str, found: dict[str, str], host: str, user: str) -> Tls:
    certificates, psk_file = found.get("tls-certificates"), found.get("tls-psk-file")
    for key in ("tls-certificates", "tls-psk-file"):
        if "\0" in found.get(key, "") or found.get(key) == "":
            raise SourceError(f"{uri}: {key} needs a path")
    kind = found.get("tls-type", "x509" if psk_file is None else "psk")
    if kind == "anon":
        raise SourceError(f"{uri}: with tls-type=anon anybody is the server; use x509 or psk")
    if kind not in ("x509", "psk"):
        raise SourceError(f"{uri}: tls-type is x509 or psk")
    if kind == "psk" and psk_file is None:
        raise SourceError(f"{uri}: tls-type=psk needs tls-psk-file=FILE")
    if psk_file is not None and (kind == "x509" or certificates is not None):
        raise SourceError(f"{uri}: certificates or tls-psk-file, not both")
    verify = found.get("tls-verify-peer", "1")
    if verify not in ("0", "1"):
        raise SourceError(f"{uri}: tls-verify-peer is 0 or 1")
    if user and found.get("tls-username", user) != user:
        raise SourceError(f"{uri}: two user names; leave out tls-username")
    if psk_file is not None and not getattr(ssl, "HAS_PSK", False):
        raise SourceError(
            f"{uri}: tls-psk-file needs Python 3.13 or later, this is "
            f"{platform.python_version()}; use certificates: tls-certificates=DIR"
        )
    hostname = _hostname(uri, found.get("tls-hostname", host))
    user = user or found.get("tls-username", "")
    return Tls(hostname, verify == "1", certificates, psk_file, user)


def _hostname(uri: str, name: str) -> str:
    name = name.partition("%")[0].removesuffix(".")  # certificates have no zones and no root
    _check_host(uri, name)
    return name


def _check_host(uri: str, name: str) -> None:
    try:
        name.encode("idna")
    except UnicodeError:
        raise SourceError(f"{uri}: {name!r} is no host name") from None
    if name.startswith(".") or "\0" in name:
        raise SourceError(f"{uri}: {name!r} is no host name")
