"""A TCP peer that is gone, and one that is there and takes nothing."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
from collections.abc import Iterator

import pytest
import trio

from healfs.backends.nbd import NbdBackend
from healfs.backends.nbd_peer import Tcp
from tests.backends.nbd_disk import DEADLINE, MIB, Disk, connected, read, write
from tests.backends.nbd_servers import NbdServer, nbdkit


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("healfs.backends.nbd_peer.GONE_SECONDS", 1.0)
    monkeypatch.setattr("healfs.backends.nbd_peer.LOOK_SECONDS", 0.1)
    monkeypatch.setattr("healfs.backends.nbd.LOOK_SECONDS", 0.1)


def _fill(disk: Disk) -> list[int]:
    """More than any socket takes."""
    answers: list[int] = []
    for i in range(64):
        disk.backend.submit(write(i * MIB, bytes(MIB)), lambda _r, error, _d: answers.append(error))
    disk.backend.commit()
    return answers


async def _until_silent(backend: NbdBackend, seconds: float) -> None:
    """The peer's kernel has not answered for so long; nor has it been asked, in this time."""
    with trio.fail_after(DEADLINE):
        while backend._link is not None and Tcp.of(backend._link.sock).silent < seconds:  # noqa: ASYNC110
            await trio.sleep(0.01)


async def test_a_server_that_takes_nothing_is_not_given_up() -> None:
    """Its kernel answers the probes; TCP_USER_TIMEOUT would end that."""
    with nbdkit("--threads=1", "memory", "64M", tcp=True) as server:
        async with connected(server.uri()) as disk:
            await disk.ok(write(0, bytes(4096)))
            server.pause()
            answers = _fill(disk)
            await _until_silent(disk.backend, 1.5)  # the probes come less and less often
            assert disk.lost is None and len(answers) < 64
            server.resume()
            await disk.ok(read(63 * MIB, MIB))
            assert answers == [0] * 64


_number = itertools.count()


class Wire:
    """A server in a network of its own, at the end of a wire that can be cut without a sound."""

    def __init__(self) -> None:
        name = f"{os.getpid()}-{next(_number)}"
        self._namespace, self._device = f"healfs-{name}", f"hf{name}"
        self._subnet = f"10.213.{os.getpid() % 256}"
        self.address = f"{self._subnet}.2"

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, timeout=20, capture_output=True)

    def lay(self) -> None:
        inside = ("-n", self._namespace)
        self._ip("netns", "add", self._namespace)
        names = ("name", self._device, "type", "veth", "peer", "name", "eth0")
        self._ip("link", "add", *names, "netns", self._namespace)
        self._ip("addr", "add", f"{self._subnet}.1/30", "dev", self._device)
        self._ip(*inside, "addr", "add", f"{self.address}/30", "dev", "eth0")
        self._ip(*inside, "link", "set", "eth0", "up")
        self._ip("link", "set", self._device, "up")

    def serve(self) -> NbdServer:
        inside = ["ip", "netns", "exec", self._namespace]
        server = nbdkit("--threads=1", "memory", "64M", tcp=True)
        server.host = self.address
        command = server._command
        server._command = lambda server: [*inside, *command(server)]
        return server

    def cut(self) -> None:
        """What comes is for nobody there, and nobody says so."""
        self._ip("-n", self._namespace, "addr", "del", f"{self.address}/30", "dev", "eth0")

    def remove(self) -> None:
        for what in (("link", "del", self._device), ("netns", "del", self._namespace)):
            subprocess.run(["ip", *what], check=False, timeout=20, capture_output=True)


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    try:
        wire.lay()
    except (OSError, subprocess.CalledProcessError) as error:
        wire.remove()
        pytest.skip(f"no network namespaces here: {error}")
    yield wire
    wire.remove()


@pytest.mark.parametrize("full", [False, True])
async def test_a_server_that_is_gone_is_given_up(wire: Wire, full: bool) -> None:
    """With data on the way, and with a window that was closed before."""
    with wire.serve() as server:
        async with connected(server.uri()) as disk:
            await disk.ok(write(0, bytes(4096)))
            sock = disk.backend._link.sock  # type: ignore[union-attr]
            # So that the kernel is not who notices.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
            if full:
                server.pause()
                _fill(disk)
                await _until_silent(disk.backend, 0.5)
                assert disk.lost is None
            wire.cut()
            disk.backend.submit(write(0, bytes(4096)), lambda *_: None)
            disk.backend.commit()
            await disk.ended.wait()
            assert disk.lost is not None and "acknowledged nothing" in str(disk.lost)
