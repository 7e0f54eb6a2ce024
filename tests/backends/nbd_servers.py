"""Real NBD servers for tests: nbdkit and qemu-nbd, that die and come back where they were."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

NBDMAGIC = b"NBDMAGIC"
READY_SECONDS = 120.0


def wait_until(condition: Callable[[], object], what: str, seconds: float = READY_SECONDS) -> None:
    """Return when `condition()` is true; AssertionError after the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.005)


# Not of those that the kernel gives to clients (ip_local_port_range): a server that is away would
# find its own taken. Each process of pytest has a thousand, and gives none away twice.
_ports = itertools.cycle(range(10_000 + os.getpid() % 22 * 1000, 11_000 + os.getpid() % 22 * 1000))


def free_port() -> int:
    for port in itertools.islice(_ports, 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


class NbdServer:
    """A server on one address, Unix (`path`) or TCP (`port`), for as many lives as wanted.

    `command` makes the argument vector from the address; `tls`, the directory of a client's
    certificates, makes its URI one with TLS. The process dies with the test's
    process (PR_SET_PDEATHSIG), and after `limit` seconds of CPU time at the latest.
    """

    def __init__(
        self,
        command: Callable[[NbdServer], Sequence[str]],
        *,
        tcp: bool = False,
        limit: int = 300,
        tls: Path | None = None,
    ) -> None:
        self._command = command
        self._tls = tls
        self._limit = limit
        self._directory = tempfile.TemporaryDirectory(prefix="healfs-nbd-")
        self.host = "127.0.0.1"
        self.port = free_port() if tcp else None
        self.path = Path(self._directory.name, "nbd.sock")
        self.log = Path(self._directory.name, "log")
        self.process: subprocess.Popen[bytes] | None = None

    def uri(self, export: str = "") -> str:
        name, tls = quote(export, safe=""), "" if self._tls is None else "s"
        query = [] if self._tls is None else [f"tls-certificates={self._tls}"]
        if self.port is not None:
            return f"nbd{tls}://{self.host}:{self.port}/{name}" + "".join(
                f"?{one}" for one in query
            )
        return f"nbd{tls}+unix:///{name}?" + "&".join([f"socket={self.path}", *query])

    def spawn(self) -> None:
        """Start it; it need not be ready when this returns."""
        assert self.process is None, "it runs already"
        self.path.unlink(missing_ok=True)
        bounded = ["setpriv", "--pdeathsig", "KILL", "prlimit", f"--cpu={self._limit}"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*bounded, *self._command(self)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def start(self) -> NbdServer:
        """Start it and wait until it greets."""
        self.spawn()
        try:
            wait_until(self._greets, f"a greeting of {self._command(self)}")
        except BaseException:
            self.close()
            raise
        return self

    def _greets(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"it ended: {self.log.read_text()}"
        address = str(self.path) if self.port is None else (self.host, self.port)
        family = socket.AF_UNIX if self.port is None else socket.AF_INET
        with socket.socket(family) as sock:
            sock.settimeout(READY_SECONDS)
            try:
                sock.connect(address)
                return sock.recv(8) == NBDMAGIC
            except OSError:
                return False

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def kill(self, number: int = signal.SIGKILL) -> None:
        """kill -9, and reap. The socket file stays, as it does in life."""
        if self.process is None:
            return
        self.process.send_signal(number)
        try:
            self.process.wait(READY_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def pause(self) -> None:
        """SIGSTOP: it holds its connections and answers nothing, once each thread has stopped."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.process.pid}/task")

        def stopped() -> bool:
            stats = [stat.read_text() for stat in tasks.glob("*/stat")]
            return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)

        wait_until(stopped, "the server to stop")

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        self._directory.cleanup()

    def __enter__(self) -> NbdServer:
        return self if self.process is not None else self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


def nbdkit(
    *arguments: str, tcp: bool = False, limit: int = 300, tls: Path | None = None
) -> NbdServer:
    """nbdkit, not started yet: nbdkit("memory", "16M"), nbdkit("--filter=delay", "file", ...)."""

    def command(server: NbdServer) -> Sequence[str]:
        if server.port is None:
            where = ["-U", str(server.path)]
        else:
            where = ["-i", server.host, "-p", str(server.port)]
        return ["nbdkit", "-f", *where, *arguments]

    return NbdServer(command, tcp=tcp, limit=limit, tls=tls)


def qemu_nbd(
    image: Path,
    *arguments: str,
    export: str = "",
    tcp: bool = False,
    limit: int = 300,
    tls: Path | None = None,
) -> NbdServer:
    """qemu-nbd on a raw image, not started yet."""

    def command(server: NbdServer) -> Sequence[str]:
        if server.port is None:
            where = ["-k", str(server.path)]
        else:
            where = ["-b", "127.0.0.1", "-p", str(server.port)]
        common = ["qemu-nbd", "-f", "raw", "-t", "-e", "16", "-x", export]
        return [*common, *where, *arguments, str(image)]

    return NbdServer(command, tcp=tcp, limit=limit, tls=tls)
