"""Hostile peers of a real mount: at the control socket, and in the backend's place.

A hostile client changes nothing. A hostile server is an outage that goes on.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path

from tests.backends.nbd_servers import NbdServer
from tests.conftest import Mounter
from tests.fuse.test_verify import _fio

CONNECTIONS = 1000
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
        self._thread.join(30)
        for client in self._open:
            client.close()


def test_a_thousand_hostile_clients_change_nothing(
    server: NbdServer, tmp_path: Path, healfs_mount: Mounter
) -> None:
    with open(tmp_path / "disk.img", "r+b") as file:
        file.truncate(MEGABYTES << 20)
    server.kill()
    server.start()
    mount = healfs_mount(server.uri(), "--werror", "retry", "--retry-timeout", "1h")
    before = mount.status()
    load = _fio(mount.file, MEGABYTES)
    try:
        with Flood(before["control"]) as flood:
            while load.poll() is None or flood.made < 3 * CONNECTIONS:
                now = mount.status()  # an answer, each time, within its five seconds
                assert now["limits"]["control_connections"]["used"] <= 32
                assert now["state"] == "ready"
        said, _ = load.communicate(timeout=60)
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
