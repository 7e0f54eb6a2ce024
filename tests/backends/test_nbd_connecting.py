"""The way to a connection: which address, how long, and what only looks like a server."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from struct import pack

import pytest
import trio
import trio.testing

from healfs.backends import nbd_tcp
from healfs.backends.base import SourceError
from healfs.backends.nbd import NbdBackend
from healfs.backends.nbd_connect import HANDSHAKE_MAX, HANDSHAKE_SECONDS, Tries
from tests.backends.nbd_disk import DEADLINE, MIB
from tests.backends.nbd_servers import free_port, nbdkit

GREETING = b"NBDMAGICIHAVEOPT\0\0"


async def _serve(sock: trio.socket.SocketType) -> None:
    """As far as a server that knows no options but the export's name."""
    await sock.send(GREETING)
    await sock.recv(4 + 16)
    await sock.send(pack(">QH", MIB, 1) + bytes(124))
    await sock.recv(1 << 16)


async def _accept(listener: trio.socket.SocketType, delay: float = 0) -> None:
    """Serve everybody, at once, after the delay."""

    async def serve(sock: trio.socket.SocketType) -> None:
        with sock, suppress(OSError):  # of those that have given up
            await trio.sleep(delay)
            await _serve(sock)

    async with trio.open_nursery() as nursery:
        while True:
            sock, _ = await listener.accept()
            nursery.start_soon(serve, sock)


@asynccontextmanager
async def listening(
    address: str | tuple[str, int], backlog: int = 16
) -> AsyncIterator[trio.socket.SocketType]:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with trio.socket.socket(family) as sock:
        await sock.bind(address)
        sock.listen(backlog)
        yield sock


def _full(address: str | tuple[str, int]) -> list[socket.socket]:
    """Connections that fill the backlog: the next one waits."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    clients: list[socket.socket] = []
    for _ in range(8):
        clients.append(socket.socket(family))
        clients[-1].setblocking(False)
        if clients[-1].connect_ex(address) == errno.EAGAIN:
            break
    return clients


async def test_who_hangs_is_left_for_another_at_the_same_path(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    backend = NbdBackend(f"nbd+unix:///?socket={path}")
    refused: list[OSError] = []

    async def connect() -> None:
        with pytest.raises(OSError) as caught:
            await backend.connect()
        refused.append(caught.value)

    async with listening(str(path)):  # and nothing else
        with trio.fail_after(HANDSHAKE_SECONDS / 2):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connect)
                await trio.testing.wait_all_tasks_blocked(0.3)
                path.with_name("another file").touch()
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert not refused
                path.unlink()
                async with listening(str(path)) as listener:
                    nursery.start_soon(_accept, listener)
                    with trio.fail_after(HANDSHAKE_SECONDS / 4):
                        await backend.wait_changed()  # as after the try, too
                        while not refused:  # noqa: ASYNC110
                            await trio.sleep(0.01)
                    assert (await backend.connect()).size == MIB
                    nursery.cancel_scope.cancel()
    assert refused[0].errno == errno.ECONNABORTED
    await backend.aclose()


async def test_a_full_backlog_is_waited_for(tmp_path: Path) -> None:
    """connect(2) says EAGAIN to a Unix socket then, and nothing is under way."""
    path = str(tmp_path / "nbd.sock")
    async with listening(path, 0) as listener, trio.open_nursery() as nursery:
        waiting = _full(path)
        backend = NbdBackend(f"nbd+unix:///?socket={path}")
        connected = trio.Event()

        async def connect() -> None:
            assert (await backend.connect()).size == MIB
            connected.set()

        nursery.start_soon(connect)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not connected.is_set()
        for client in waiting:
            client.close()
        nursery.start_soon(_accept, listener)
        with trio.fail_after(DEADLINE):
            await connected.wait()
        backend.close()
        nursery.cancel_scope.cancel()


async def test_a_connection_to_ourselves_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may choose the very port as ours, where nobody listens."""
    port = free_port()

    def opening(family: int) -> trio.socket.SocketType:
        sock = socket.socket(family)
        sock.bind(("127.0.0.1", port))
        return trio.socket.from_stdlib_socket(sock)

    monkeypatch.setattr(nbd_tcp, "_opening", opening)
    with trio.fail_after(HANDSHAKE_SECONDS / 2), pytest.raises(OSError) as caught:
        await NbdBackend(f"nbd://127.0.0.1:{port}/").connect()
    assert caught.value.errno == errno.ECONNREFUSED
    assert not isinstance(caught.value, SourceError)
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))  # no TIME_WAIT is in its way


def _resolves_to(monkeypatch: pytest.MonkeyPatch, *ports: int) -> None:
    async def resolve(host: str, port: int) -> list[nbd_tcp.Target]:
        return [(socket.AF_INET, ("127.0.0.1", port)) for port in ports]

    monkeypatch.setattr(nbd_tcp, "_resolve", resolve)


async def test_an_address_that_takes_connections_and_says_nothing_lets_the_others_try(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("healfs.backends.nbd_connect.HANDSHAKE_SECONDS", 0.5)
    with nbdkit("memory", "1M", tcp=True) as server:
        ports = [free_port() for _ in range(2)]
        assert server.port is not None
        _resolves_to(monkeypatch, *ports, server.port)
        backend = NbdBackend("nbd://three-addresses/")
        async with listening(("127.0.0.1", ports[0])), listening(("127.0.0.1", ports[1])):
            for _ in ports:
                with pytest.raises(OSError) as caught:
                    await backend.connect()
                assert caught.value.errno == errno.ETIMEDOUT
            with trio.fail_after(DEADLINE):
                assert (await backend.connect()).size == MIB
                backend.close()


async def test_an_address_that_does_not_answer_delays_the_next_one_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with nbdkit("memory", "1M", tcp=True) as server:
        silent, refusing = ("127.0.0.1", free_port()), free_port()
        assert server.port is not None
        _resolves_to(monkeypatch, silent[1], refusing, server.port)
        backend = NbdBackend("nbd://three-addresses/")
        async with listening(silent, 0):
            clients = _full(silent)
            assert (await backend.connect()).size == MIB
            backend.close()
            for client in clients:
                client.close()


async def test_a_server_that_is_slow_to_greet_is_given_more_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("healfs.backends.nbd_connect.HANDSHAKE_SECONDS", 0.05)
    path = str(tmp_path / "nbd.sock")
    async with listening(path) as listener, trio.open_nursery() as nursery:
        nursery.start_soon(_accept, listener, 0.3)
        backend = NbdBackend(f"nbd+unix:///?socket={path}")
        for _ in range(10):
            try:
                assert (await backend.connect()).size == MIB
                break
            except OSError as error:
                assert error.errno == errno.ETIMEDOUT
        else:
            raise AssertionError("never connected")
        backend.close()
        nursery.cancel_scope.cancel()


def test_the_time_for_a_handshake_is_bounded() -> None:
    tries = Tries()
    given = []
    for _ in range(6):
        given.append(tries.seconds)
        tries.hung()
    assert given[:2] == [HANDSHAKE_SECONDS, 2 * HANDSHAKE_SECONDS]
    assert given[-1] == given[-2] == HANDSHAKE_MAX
    tries.succeeded()
    assert tries.seconds == HANDSHAKE_SECONDS


async def test_a_name_that_no_resolver_takes_is_a_wrong_source() -> None:
    """The URI's parser takes it, by an older table."""
    with pytest.raises(SourceError, match="no host name"):
        await NbdBackend("nbd://⒈x/").connect()


@pytest.mark.parametrize("found", ["ab", "ba", "aab", "abb"])
async def test_the_other_family_is_not_far(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    async def getaddrinfo(*_: object, **__: object) -> list[tuple[object, ...]]:
        return [({"a": 10, "b": 2}[one], 1, 6, "", (i,)) for i, one in enumerate(found)]

    monkeypatch.setattr("trio.socket.getaddrinfo", getaddrinfo)
    targets = await nbd_tcp._resolve("host", 1)
    assert targets[0] == ({"a": 10, "b": 2}[found[0]], (0,))
    assert targets[1][0] != targets[0][0]
    assert sorted(address for _, (address,) in targets) == list(range(len(found)))
