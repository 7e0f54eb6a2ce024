"""A TCP connection to an NBD server: its addresses, and the socket's options."""

from __future__ import annotations

import errno as e
import os
import socket
from struct import pack
from typing import Any

import trio

from healfs.backends.base import SourceError

STAGGER = 0.25  # seconds: then the next address is tried beside those that have not answered
# A peer that is gone is noticed within about 10 s: here when nothing is on the way, by nbd_peer
# when something is. (TCP_USER_TIMEOUT would also end a connection whose peer is there and takes
# nothing for so long.)
KEEPALIVE = {socket.TCP_KEEPIDLE: 3, socket.TCP_KEEPINTVL: 2, socket.TCP_KEEPCNT: 3}
TCP_RTO_MAX_MS = 44  # linux/tcp.h, from 6.15 on
RTO_MAX_MS = 3000  # so that a peer that is back, or has room again, is noticed as soon

Target = tuple[int, Any]  # address family, address


class Addresses:
    """Of a name's addresses, which to try first: those that have failed less often since the last
    that served. One may take connections, and then say nothing."""

    def __init__(self) -> None:
        self._failures: dict[Any, int] = {}

    def ordered(self, targets: list[Target]) -> list[Target]:
        failures = {address: self._failures.get(address, 0) for _, address in targets}
        self._failures = failures  # of those that there are now
        return sorted(targets, key=lambda target: failures[target[1]])

    def failed(self, sock: socket.socket) -> None:
        try:
            address = sock.getpeername()
        except OSError:
            return  # gone already; another try meets it again
        if address in self._failures:
            self._failures[address] += 1

    def served(self) -> None:
        self._failures.clear()


async def open_tcp(host: str, port: int, addresses: Addresses) -> socket.socket:
    """Connect to the first address that answers. The deadline is the caller's."""
    targets = addresses.ordered(await _resolve(host, port))
    found: list[socket.socket] = []
    errors: list[OSError] = []
    try:
        async with trio.open_nursery() as nursery:

            async def attempt(target: Target, failed: trio.Event) -> None:
                try:
                    found.append(await _connect(*target))
                    nursery.cancel_scope.cancel()
                except OSError as error:
                    errors.append(error)
                    failed.set()

            for target in targets:
                failed = trio.Event()
                nursery.start_soon(attempt, target, failed)
                with trio.move_on_after(STAGGER):
                    await failed.wait()
        if found:
            return found.pop(0)
    finally:
        for late in found:
            late.close()
    number = errors[0].errno or e.EHOSTUNREACH
    raise OSError(number, os.strerror(number)) from errors[0]  # trio's own words say more


async def _resolve(host: str, port: int) -> list[Target]:
    try:
        found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        message = f"cannot resolve {host}: {error.strerror}"
        raise OSError(e.EHOSTUNREACH, message) from error
    except UnicodeError as error:
        raise SourceError(f"{host!r} is no host name") from error
    targets: list[Target] = [(family, address) for family, _, _, _, address in found]
    # As RFC 8305 has it: should none of the first family answer, the other is not far.
    for i, target in enumerate(targets):
        if target[0] != targets[0][0]:
            targets.insert(1, targets.pop(i))
            break
    return targets


async def _connect(family: int, address: Any) -> socket.socket:
    with _opening(family) as opening:
        await opening.connect(address)
        if opening.getsockname() == opening.getpeername():
            # The kernel chose the port as ours: nobody listens there, and while we are connected to
            # ourselves nobody can. Nor may the port stay in TIME_WAIT.
            opening.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, pack("ii", 1, 0))
            raise ConnectionRefusedError(e.ECONNREFUSED, os.strerror(e.ECONNREFUSED))
        sock = socket.socket(fileno=opening.detach())
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS, RTO_MAX_MS)
    except OSError:
        pass  # an older kernel
    return sock


def _opening(family: int) -> trio.socket.SocketType:
    return trio.socket.socket(family, socket.SOCK_STREAM)
