"""NBD URIs, as the NBD URI specification (nbd/doc/uri.md) has them."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit

from healfs.backends.base import SourceError

DEFAULT_PORT = 10809
EXPORT_NAME_MAX = 4096  # bytes; the protocol's limit on strings
SUN_PATH_MAX = 107  # bytes of sockaddr_un.sun_path, without its NUL


@dataclass(frozen=True, slots=True)
class NbdUri:
    """Where an export is: `socket` for a Unix socket, else `host` and `port`."""

    export: str
    host: str = ""
    port: int = DEFAULT_PORT
    socket: str | None = None

    def __str__(self) -> str:
        if self.socket is not None:
            return self.socket
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse(text: str) -> NbdUri:
    """Parse nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH.

    Raises SourceError with one line that says what is wrong.
    """
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise SourceError(f"{text}: not an NBD URI: {error}") from error
    if parts.username is not None:
        # The text may hold a password: it is not repeated.
        raise SourceError("an NBD URI with a user name needs TLS, which is not supported yet")
    if parts.scheme in ("nbds", "nbds+unix"):
        raise SourceError(f"{text}: TLS is not supported yet; use nbd:// or nbd+unix://")
    if parts.scheme not in ("nbd", "nbd+unix"):
        raise SourceError(f"{text}: unknown scheme; use nbd:// or nbd+unix://")
    if parts.fragment:
        raise SourceError(f"{text}: an NBD URI has no fragment; write '#' in a name as %23")
    export = _text(text, parts.path[1:])
    if len(export.encode()) > EXPORT_NAME_MAX or "\0" in export:
        raise SourceError(f"{text}: no NBD export can have this name")
    # In NBD URIs '+' is itself, as in RFC 3986, and no space, as in HTML forms.
    query = parse_qsl(parts.query.replace("+", "%2B"), keep_blank_values=True)
    for key, _ in query:
        if key != "socket" or parts.scheme == "nbd":
            raise SourceError(f"{text}: unknown parameter {key!r}")
    if parts.scheme == "nbd":
        if not host:
            raise SourceError(f"{text}: a host is missing; write nbd://HOST[:PORT]/EXPORT")
        if port == 0:
            raise SourceError(f"{text}: port 0 is none")
        return NbdUri(export, _text(text, host), port or DEFAULT_PORT)
    if parts.netloc:
        raise SourceError(
            f"{text}: a Unix socket has no host; write nbd+unix:///EXPORT?socket=PATH"
        )
    return NbdUri(export, socket=_socket(text, [value for _, value in query]))


def _text(uri: str, quoted: str) -> str:
    try:
        return unquote(quoted, errors="strict")
    except UnicodeDecodeError as error:
        raise SourceError(f"{uri}: the %-escapes are not UTF-8") from error


def _socket(uri: str, values: list[str]) -> str:
    if len(values) != 1 or not values[0]:
        raise SourceError(f"{uri}: needs one parameter socket=PATH")
    path = values[0]
    if len(path.encode(errors="surrogateescape")) > SUN_PATH_MAX:
        raise SourceError(f"{uri}: the socket's path is longer than {SUN_PATH_MAX} bytes")
    if "\0" in path[1:] or path == "\0":
        raise SourceError(f"{uri}: the socket's path has a NUL in it")
    return path
