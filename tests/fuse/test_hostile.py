"""Hostile peers of a real mount: at the control socket, and in the backend's place.

A hostile client changes nothing. A hostile server is an outage that goes on.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from struct import Struct, pack

import pytest

from healfs.backends import nbd_frames
from healfs.backends import nbd_protocol as proto
from healfs.backends import nbd_transmission as wire
from tests.backends.nbd_servers import NbdServer, nbdkit, wait_until
from tests.conftest import Mounter
from tests.fuse.conftest import Opener
from tests.fuse.test_verify import _fio
from tests.mounts import HealfsMount

CONNECTIONS = 1000
DESCRIPTORS = 4096  # that is, of a process; 1024 are usual
MEGABYTES = 64
CAPABILITIES = b'{"execute":"qmp_capabilities"}\n'


# --- at the control socket ----------------------------------------------------------------------

SAID = (
    b"",  # nothing, for ever
    b'{"execute": "qmp_cap',  # half a message
    os.urandom(4096),
    b'{"execute": "' + b"x" * (1 << 20),  # a line that does not end
    b"[" * 10_000,
    b'{"execute": "healfs-umount", "arguments": {"force": true}}\n',  # before the negotiation
    CAPABILITIES,  # and idle from then on
    CAPABILITIES + b'{"execute": "healfs-set-policy", "arguments": {"read": {"error": 5}}}\n',
    CAPABILITIES + b'{"execute": "healfs-query-status"}\n' * 500,  # and reads nothing
)


class Flood:
    """Connects again and again, has many open at once, and never does what it should."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._open: list[socket.socket] = []
        self._stop = threading.Event()
        self.made = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._one(SAID[self.made % len(SAID)])
            self.made += 1
            if len(self._open) >= CONNECTIONS:
                self._open.pop(0).close()

    def _one(self, said: bytes) -> None:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(1)
        with contextlib.suppress(OSError):
            client.connect(self._path)
        client.setblocking(False)
        with contextlib.suppress(OSError):
            client.send(said)
        self._open.append(client)

    def __enter__(self) -> Flood:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(120)
        for client in self._open:
            client.close()


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(DESCRIPTORS, hard)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_thousand_hostile_clients_change_nothing(
    server: NbdServer, tmp_path: Path, healfs_mount: Mounter, many_descriptors: None
) -> None:
    with open(tmp_path / "disk.img", "r+b") as file:
        file.truncate(MEGABYTES << 20)
    server.kill()
    server.start()
    policy = ("--werror", "retry", "--retry-timeout", "1h")
    mount = healfs_mount(server.uri(), *policy, "--slow-after", "1h")
    before = mount.status()
    load = _fio(mount.file, MEGABYTES)
    try:
        with Flood(before["control"]) as flood:
            while load.poll() is None or flood.made < 3 * CONNECTIONS:
                now = mount.status()  # an answer, each time, within its five seconds
                assert now["limits"]["control_connections"]["used"] <= 32
                assert now["state"] == "ready"
        said, _ = load.communicate(timeout=240)
        assert load.returncode == 0, said
    finally:
        load.kill()
        load.communicate()
    after = mount.status()
    for key in ("policy", "pids", "outages", "size", "worker_restarts"):
        assert after[key] == before[key], key
    assert after["state"] == "ready"
    assert not any(after["totals"][kind]["errors"] for kind in ("read", "write", "flush"))
    log = Path(after["log"]).read_text()
    assert log.count("control: ") < 300  # of thousands


def test_idle_clients_lock_nobody_out(image: Path, healfs_mount: Mounter) -> None:
    mount = healfs_mount(image)
    with contextlib.ExitStack() as stack:
        path = mount.status()["control"]
        for number in range(40):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(path)
            if number % 2:
                client.sendall(CAPABILITIES)
        assert mount.status()["state"] == "ready"
        ended = mount.umount(force=True)  # asked, it ends by itself: it is not killed
        assert (ended.returncode, ended.stderr) == (0, "")


# --- in the backend's place ---------------------------------------------------------------------

REQUEST = Struct(">IHHQQI")
ENOUGH = 64 << 20  # bytes, of a server that does not end
TRIES = 4  # connections, of a server that is found out at once
GROWTH = 48 << 10  # KiB: by what the worker may grow meanwhile


def _garbage(server: HostileServer, client: socket.socket) -> None:
    server.send_for_ever(client, os.urandom(1 << 16))


def _options(server: HostileServer, client: socket.socket, reply: bytes) -> None:
    client.sendall(pack(">QQH", proto.NBDMAGIC, proto.IHAVEOPT, 3))
    client.recv(4)
    header = client.recv(16, socket.MSG_WAITALL)
    if len(header) < 16:
        return  # the client has given up, or has ended
    _, option, _ = Struct(">QII").unpack(header)
    server.send_for_ever(client, pack(">QI", proto.OPTION_REPLY, option) + reply)


def _endless_options(server: HostileServer, client: socket.socket) -> None:
    _options(server, client, pack(">II", proto.REP_INFO, 2) + b"\0\x63")


def _a_lie_about_the_length_of_an_option(server: HostileServer, client: socket.socket) -> None:
    _options(server, client, pack(">II", proto.REP_ACK, 0xFFFFFFFF) + bytes(1 << 16))


def _chunk(flags: int, kind: int, cookie: int, length: int) -> bytes:
    return pack(">IHHQI", wire.STRUCTURED_REPLY, flags, kind, cookie, length)


def _wrong_cookie(cookie: int, offset: int, length: int) -> bytes:
    return _chunk(wire.CHUNK_DONE, wire.CHUNK_NONE, cookie ^ 0xFFFF, 0)


def _endless_chunks(cookie: int, offset: int, length: int) -> bytes:
    return (_chunk(0, wire.CHUNK_ERROR, cookie, 6) + pack(">IH", 5, 0)) * 1000


def _an_endless_chunk(cookie: int, offset: int, length: int) -> bytes:
    return _chunk(0, wire.CHUNK_ERROR, cookie, 0xFFFFFFFF) + bytes(1 << 16)


def _more_data_than_asked_for(cookie: int, offset: int, length: int) -> bytes:
    data = bytes(length + 4096)
    return _chunk(0, wire.CHUNK_OFFSET_DATA, cookie, 8 + len(data)) + pack(">Q", offset) + data


def _data_twice(cookie: int, offset: int, length: int) -> bytes:
    chunks = [
        _chunk(flags, wire.CHUNK_OFFSET_DATA, cookie, 8 + length) + pack(">Q", offset)
        for flags in (0, wire.CHUNK_DONE)
    ]
    return b"".join(chunk + b"?" * length for chunk in chunks)


AS_IT_GREETS = (_garbage, _endless_options, _a_lie_about_the_length_of_an_option)
AS_IT_ANSWERS = (
    *(_wrong_cookie, _endless_chunks, _an_endless_chunk),
    *(_more_data_than_asked_for, _data_twice),
)


class HostileServer:
    """At `path`. Where its answers are what is wrong, its greeting is that of the honest one."""

    def __init__(
        self,
        path: Path,
        honest: Path,
        greet: Callable[[HostileServer, socket.socket], None] | None,
        answer: Callable[[int, int, int], bytes] | None,
    ) -> None:
        self._honest, self._greet, self._answer = honest, greet, answer
        self.connections = 0
        self.sent = 0
        self._clients: list[socket.socket] = []
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            client.settimeout(30)
            self._clients.append(client)
            self._threads.append(threading.Thread(target=self._serve, args=(client,), daemon=True))
            self._threads[-1].start()
            self.connections += 1

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            if self._greet is not None:
                self._greet(self, client)
            elif (request := self._pass_on(client)) is not None:
                assert self._answer is not None
                _, _, _, cookie, offset, length = REQUEST.unpack(request[: REQUEST.size])
                self.send_for_ever(client, self._answer(cookie, offset, length))

    def _pass_on(self, client: socket.socket) -> bytes | None:
        """The handshake, until the client's first request: that."""
        with socket.socket(socket.AF_UNIX) as honest:
            honest.connect(str(self._honest))
            while True:
                for ready in select.select([client, honest], [], [], 30)[0]:
                    data = ready.recv(65536)
                    if not data:
                        return None
                    if ready is client and data.startswith(pack(">I", nbd_frames.REQUEST)):
                        return data
                    (honest if ready is client else client).sendall(data)

    def send_for_ever(self, client: socket.socket, data: bytes) -> None:
        """Until it hangs up."""
        while True:
            client.sendall(data)
            self.sent += len(data)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for client in self._clients:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(60)


def _memory(mount: HealfsMount) -> int:
    """KiB that the worker has resident."""
    status = Path(f"/proc/{mount.status()['pids']['worker']}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


@pytest.fixture
def honest(image: Path) -> Iterator[NbdServer]:
    """A second server of the same image, which the hostile one hides behind."""
    with nbdkit("file", str(image)) as running:
        yield running


@pytest.mark.parametrize(
    ("behaviour", "unflushed"),
    [
        *((one, True) for one in AS_IT_GREETS),
        # With a write log it comes no further than the replay.
        *((one, log) for one in AS_IT_ANSWERS for log in (False, True)),
    ],
)
def test_a_hostile_server_is_an_outage_that_goes_on(
    server: NbdServer,
    honest: NbdServer,
    image: Path,
    healfs_mount: Mounter,
    agent: Opener,
    behaviour: Callable[..., bytes],
    unflushed: bool,
) -> None:
    mount = healfs_mount(server.uri(), "--retry-interval", "50ms", "--slow-after", "1s")
    writer, reader, earlier = agent(mount.file), agent(mount.file), agent(mount.file)
    earlier.ok("pwrite", 0, b"E" * 8192)
    if not unflushed:
        earlier.ok("fsync")
    status = mount.status()
    worker, outages = status["pids"]["worker"], status["outages"]["count"]  # of a slow disk, say
    before = _memory(mount)
    server.kill()
    writer.ask("pwrite", 1 << 20, b"W" * 65536)
    reader.ask("pread", 4096, 8192)
    mount.wait_until(lambda status: status["requests"]["parked"] == 2)
    greet, answer = (behaviour, None) if behaviour in AS_IT_GREETS else (None, behaviour)
    hostile = HostileServer(server.path, honest.path, greet, answer)  # type: ignore[arg-type]
    try:
        grown = []

        def enough() -> bool:
            grown.append(_memory(mount) - before)
            return hostile.connections >= TRIES or hostile.sent >= ENOUGH

        wait_until(enough, "the hostile server to do its worst", 240)
        now = mount.wait_state("stalled")
        assert max(grown) < GROWTH, grown
        assert not writer.answered and not reader.answered
        assert now["outages"]["count"] == outages + 1 and now["outages"]["current_seconds"] > 0
        assert now["pids"]["worker"] == worker and now["worker_restarts"] == 0
    finally:
        hostile.close()
    server.start()
    assert writer.answer().value == 65536
    assert reader.answer().value == b"E" * 4096 + bytes(4096)
    earlier.ok("fsync")
    data = image.read_bytes()
    assert data[:8192] == b"E" * 8192 and data[1 << 20 :][:65536] == b"W" * 65536
    assert data.count(0) == len(data) - 8192 - 65536
