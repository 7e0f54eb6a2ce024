"""The life of an NBD connection: refused, absent, killed, silent, given up, and come back."""

# Small files on a local disk: the loop may wait for them.
# ruff: noqa: ASYNC240

from __future__ import annotations

import errno
import os
import signal
import socket
from pathlib import Path
from struct import pack

import pytest
import trio
import trio.testing

from healfs.backends.base import Extent, SourceError
from healfs.backends.nbd import NbdBackend
from healfs.core.errors import ErrorClass, classify
from healfs.core.request import Kind, Request
from tests.backends.nbd_disk import DEADLINE, MIB, Disk, connected, pattern, read, req, write
from tests.backends.nbd_servers import free_port, nbdkit, qemu_nbd


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(16 * MIB)
    return path


@pytest.mark.parametrize("tcp", [False, True])
async def test_kill_in_flight_is_lost_and_reconnect_goes_on(image: Path, tcp: bool) -> None:
    with nbdkit("--filter=delay", "file", str(image), "delay-read=60", tcp=tcp) as server:
        backend = NbdBackend(server.uri())
        answered: list[Request] = []
        requests = [read(i * 4096, 4096) for i in range(16)]
        async with connected(backend) as disk:
            await disk.ok(write(0, pattern(4096)))
            for request in requests:
                backend.submit(request, lambda request, *_: answered.append(request))
            backend.commit()
            server.kill()
            await disk.ended.wait()
            assert disk.lost is not None
            assert classify(disk.lost.errno or 0) is ErrorClass.LOST
            assert all(backend.taken(request) for request in requests)
            with pytest.raises(OSError) as away:
                await backend.connect()
            assert not isinstance(away.value, SourceError)
        server.start()
        async with connected(backend) as disk:
            await disk.ok(write(4096, pattern(4096, 2)))
        assert answered == []
    assert image.read_bytes()[:8192] == pattern(4096) + pattern(4096, 2)


async def test_what_the_socket_did_not_take_is_known() -> None:
    """SIGSTOP fills the socket; the rest goes when the server goes on, or never went."""
    # One thread: of several, nbdkit 1.32 may die by an assertion when a client goes amid a reply.
    with nbdkit("--threads=1", "memory", "256M") as server:
        backend = NbdBackend(server.uri())
        async with connected(backend) as disk:
            await disk.ok(write(0, pattern(4096)))
            server.pause()
            writes = [write(i * MIB, pattern(MIB, i)) for i in range(64)]
            for request in writes:
                backend.submit(request, lambda *_: None)
            backend.commit()
            backend.close()
            sent = [write for write in writes if backend.taken(write)]
            assert writes[0] in sent and writes[-1] not in sent
            assert sent == writes[: len(sent)]
            server.resume()
        async with connected(backend) as disk:
            assert not any(backend.taken(write) for write in writes)
            server.pause()
            await trio.lowlevel.checkpoint()
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(disk.ok, *writes)
                    await trio.testing.wait_all_tasks_blocked()
                    assert len(backend._link.protocol.out) > 1  # type: ignore[union-attr]
                    server.resume()
            assert not scope.cancelled_caught
            assert await disk.ok(read(63 * MIB, MIB)) == pattern(MIB, 63)


class Listener:
    """A listener that is no NBD server: it says `greeting` to each that comes, and then holds the
    connection or closes it."""

    def __init__(self, directory: Path, greeting: bytes, *, hold: bool) -> None:
        self.path = directory / "listener.sock"
        self._greeting = greeting
        self._hold = hold

    async def serve(self, task_status: trio.TaskStatus[None]) -> None:
        with trio.socket.socket(socket.AF_UNIX) as listening:
            await listening.bind(str(self.path))
            listening.listen()
            task_status.started()
            while True:
                sock, _ = await listening.accept()
                with sock:
                    await sock.send(self._greeting)
                    if self._hold:
                        await trio.sleep_forever()


async def _refusal(listener: Listener) -> OSError:
    backend = NbdBackend(f"nbd+unix:///?socket={listener.path}")
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            await nursery.start(listener.serve)
            with pytest.raises(OSError) as caught:
                await backend.connect()
            nursery.cancel_scope.cancel()
    return caught.value


GREETING = b"NBDMAGICIHAVEOPT\0\3"


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9.2p1\r\n", b"NBDMAGIC" + bytes(200)])
async def test_garbage_is_a_wrong_source(tmp_path: Path, greeting: bytes) -> None:
    error = await _refusal(Listener(tmp_path, greeting, hold=True))
    assert isinstance(error, SourceError)
    assert "NBD server?" in str(error)


@pytest.mark.parametrize("greeting", [b"", GREETING])
async def test_a_listener_that_closes_is_away(tmp_path: Path, greeting: bytes) -> None:
    """ssh -L, and a server that is killed just now, do so."""
    error = await _refusal(Listener(tmp_path, greeting, hold=False))
    assert not isinstance(error, SourceError)
    assert error.errno in (errno.ECONNRESET, errno.EPIPE)


@pytest.mark.parametrize("greeting", [b"", GREETING[:17], GREETING])
async def test_a_listener_that_stays_silent_is_away(
    tmp_path: Path, greeting: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("healfs.backends.nbd_connect.HANDSHAKE_SECONDS", 0.2)
    error = await _refusal(Listener(tmp_path, greeting, hold=True))
    assert not isinstance(error, SourceError)
    assert error.errno == errno.ETIMEDOUT


async def test_absent_servers_are_away(tmp_path: Path) -> None:
    stale = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(stale))
    sources = {
        f"nbd+unix:///?socket={tmp_path}/none.sock": errno.ENOENT,
        f"nbd+unix:///?socket={tmp_path}/none/none.sock": errno.ENOENT,
        f"nbd+unix:///?socket={stale}": errno.ECONNREFUSED,
        f"nbd://127.0.0.1:{free_port()}/": errno.ECONNREFUSED,
        "nbd://no-such-host.invalid/": errno.EHOSTUNREACH,
    }
    for source, expected in sources.items():
        with pytest.raises(OSError) as caught, trio.fail_after(DEADLINE):
            await NbdBackend(source).connect()
        assert not isinstance(caught.value, SourceError), source
        assert caught.value.errno == expected, source
        assert "\n" not in str(caught.value)


async def test_a_file_that_is_no_socket_is_a_wrong_source(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match="not a socket"):
        await NbdBackend(f"nbd+unix:///?socket={tmp_path}/file").connect()


@pytest.mark.parametrize("old", [False, True])
async def test_a_refused_export_is_wrong_at_first_and_away_later(image: Path, old: bool) -> None:
    """The same backend, the export renamed between: a server that is still starting."""
    right = qemu_nbd(image, export="disk")
    with right:
        backend = NbdBackend(right.uri("disk"))
        with pytest.raises(SourceError, match="'other' refused"):
            await NbdBackend(right.uri("other")).connect()
        async with connected(backend) as disk:
            assert disk.geometry.identity["export"] == "disk"
        right.kill()
        masked = ["--mask-handshake=0"] if old else []
        refuse = nbdkit(*masked, "--filter=exportname", "memory", "1M", "exportname-strict=true")
        right._command, command = refuse._command, right._command
        right.start()
        with pytest.raises(OSError) as caught:
            await backend.connect()
        assert not isinstance(caught.value, SourceError)
        with pytest.raises(SourceError, match="'disk' refused"):
            await NbdBackend(right.uri("disk")).connect()
        right.kill()
        right._command = command
        right.start()
        async with connected(backend) as disk:
            await disk.ok(read(0, 4096))
        refuse.close()


async def test_size_zero_is_a_wrong_source() -> None:
    with nbdkit("memory", "0") as server, pytest.raises(SourceError, match="size 0"):
        await NbdBackend(server.uri()).connect()


async def test_a_server_that_demands_tls_is_named(tmp_path: Path) -> None:
    keys = tmp_path / "psk"
    keys.write_text("user:" + "0" * 64 + "\n")
    secret = ("--tls=require", f"--tls-psk={keys}")
    with nbdkit(*secret, "memory", "1M") as server, pytest.raises(SourceError, match="TLS"):
        await NbdBackend(server.uri()).connect()


async def test_wait_changed_sees_the_server_come_back(image: Path) -> None:
    """A stale socket file is no change; the one of the new server is."""
    with nbdkit("file", str(image)) as server:
        backend = NbdBackend(server.uri())
        async with connected(backend):
            server.kill()
        with pytest.raises(OSError):
            await backend.connect()
        with trio.fail_after(DEADLINE):
            async with trio.open_nursery() as nursery:
                changed = trio.Event()

                async def watch() -> None:
                    await backend.wait_changed()
                    changed.set()

                nursery.start_soon(watch)
                await trio.testing.wait_all_tasks_blocked()
                (server.path.parent / "another file").touch()
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert not changed.is_set()
                server.start()
                await changed.wait()
        # What came between the attempt and the watch is seen too.
        with trio.fail_after(DEADLINE):
            await backend.wait_changed()


async def test_wait_changed_without_a_directory_is_patient(tmp_path: Path) -> None:
    for source in (f"nbd+unix:///?socket={tmp_path}/no/s.sock", "nbd://127.0.0.1/"):
        with trio.move_on_after(0.05) as scope:
            await NbdBackend(source).wait_changed()
        assert scope.cancelled_caught


async def test_tcp_notices_a_silent_peer() -> None:
    with nbdkit("memory", "1M", tcp=True) as server:
        backend = NbdBackend(server.uri())
        async with connected(backend):
            assert backend._link is not None
            sock = backend._link.sock

            def option(name: int) -> int:
                return sock.getsockopt(socket.IPPROTO_TCP, name)

            assert option(socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            probes = option(socket.TCP_KEEPINTVL) * option(socket.TCP_KEEPCNT)
            assert option(socket.TCP_KEEPIDLE) + probes <= 10
            assert not option(socket.TCP_USER_TIMEOUT)  # see nbd_peer


async def test_each_part_of_an_answer_is_heard(tmp_path: Path) -> None:
    """Over a slow link a long answer takes longer than any silence may be."""
    with trio.socket.socket(socket.AF_UNIX) as listening:
        await listening.bind(str(tmp_path / "nbd.sock"))
        listening.listen()
        parts = [b"\x67\x44\x66\x98", bytes(8) + b"\0\0\0\1", *4 * [bytes(1024)]]
        heard: list[float] = []
        all_heard = trio.Event()

        async def serve() -> None:
            sock, _ = await listening.accept()
            with sock:
                await sock.send(GREETING[:-1] + b"\0")
                await sock.recv(4 + 16, socket.MSG_WAITALL)
                await sock.send(pack(">QH", MIB, 1) + bytes(124))
                await sock.recv(28)
                for part in parts:
                    await sock.send(part)
                    await trio.testing.wait_all_tasks_blocked(0.01)
                    heard.append(backend.heard)
                all_heard.set()
                await trio.sleep_forever()

        backend = NbdBackend(f"nbd+unix:///?socket={tmp_path}/nbd.sock")
        assert backend.heard == 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            async with connected(backend) as disk:
                assert await disk.ok(read(0, 4096)) == bytes(4096)
                await all_heard.wait()
                assert backend.heard == heard[-1]
            nursery.cancel_scope.cancel()
    assert len(heard) == len(set(heard)) == len(parts) and sorted(heard) == heard
    assert backend.heard == 0


async def test_close_ends_serve_and_extents_and_answers_nothing(image: Path) -> None:
    with nbdkit("file", str(image)) as server:
        backend = NbdBackend(server.uri())
        async with connected(backend) as disk:
            server.pause()
            answered: list[Request] = []
            for request in (read(0, 4096), write(0, bytes(4096)), req(Kind.FLUSH)):
                backend.submit(request, lambda request, *_: answered.append(request))
            backend.commit()
            extents: list[list[Extent] | None] = []

            async def ask() -> None:
                extents.append(await backend.extents(0, MIB))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                await trio.testing.wait_all_tasks_blocked()
                backend.close()
                backend.close()
            await disk.ended.wait()
            server.resume()
        assert disk.lost is not None and answered == [] and extents == [None]
        assert await backend.extents(0, MIB) is None
        late = await Disk(backend, disk.geometry).do(read(0, 4096))
        assert late == [(errno.ENOTCONN, None)]


async def test_close_from_inside_a_completion(image: Path) -> None:
    with nbdkit("file", str(image)) as server:
        backend = NbdBackend(server.uri())
        answered: list[Request] = []

        def done(request: Request, *_: object) -> None:
            answered.append(request)
            backend.close()

        async with connected(backend) as disk:
            for i in range(32):
                backend.submit(read(i * 4096, 4096), done)
            backend.commit()
            await disk.ended.wait()
        assert len(answered) == 1


async def test_a_server_that_leaves_in_order_is_lost(image: Path) -> None:
    with qemu_nbd(image) as server:  # nbdkit waits for its clients to go
        async with connected(server.uri()) as disk:
            os.kill(server.pid, signal.SIGTERM)
            await disk.ended.wait()
            assert disk.lost is not None and disk.lost.errno == errno.ECONNRESET
