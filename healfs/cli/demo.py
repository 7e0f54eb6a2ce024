"""healfs demo: a disk whose server is killed and comes back, under a load that checks itself.

Everything runs as a user would run it: the server, `healfs mount` and the load are processes of
their own. This one never touches the mount, so that Ctrl-C always works: it waits in one place
(_until), where signals, the load's reports and the status come in.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import click

from healfs.cli import exit_status
from healfs.cli.daemons import detach
from healfs.cli.demo_load import BLOCK, Report
from healfs.cli.demo_plot import Mark
from healfs.cli.demo_screen import Screen
from healfs.cli.output import CliError
from healfs.fuse.mount import connection_of, is_mounted

DISK_BYTES = 64 << 20
_HEALFS = [sys.executable, "-P", "-m", "healfs.cli.main"]
_STATUS_EVERY = 0.7  # seconds; each is a process of its own
_DEADLINE = 30.0  # seconds for what takes one when all is well
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Seconds(click.IntRange):
    name = "number of seconds"  # click says "'x' is not a valid" and this


@click.command(short_help="Kill a disk's server under load, and compare every byte.")
@click.option(
    "--seconds",
    type=_Seconds(3, 600),
    metavar="SECONDS",
    default=18,
    help="How long the load runs; the server is away in the middle third. [18]",
)
def demo(seconds: int) -> None:
    """Show it: kill a disk's server under load, bring it back, verify every byte.

    Needs nbdkit or qemu-nbd. Leaves nothing behind; Ctrl-C ends it at any moment.
    """
    server = _find_server()
    with _Interruption() as interruption:
        # A directory of its own for everything, the control socket too: no other mount is seen.
        directory = Path(tempfile.mkdtemp(prefix="healfs-demo-"))
        stage = _Stage(directory, server, seconds, interruption)
        try:
            verdict = _play(stage, seconds)
        finally:
            stage.clean_up()
        stage.screen.verdict(verdict)
        if not verdict.startswith("PASS"):
            raise CliError("the demo failed; please report it with the output above")


class _Interruption:
    """Signals as readable bytes: none is lost, and none raises between two lines of cleaning up."""

    def __enter__(self) -> _Interruption:
        self.fd, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._saved = [signal.signal(number, lambda *_: None) for number in _SIGNALS]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        for number, handler in zip(_SIGNALS, self._saved, strict=True):
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self.fd)
        os.close(self._write)


def _play(stage: _Stage, seconds: int) -> str:
    """The whole piece; the verdict, in one line."""
    third = seconds / 3
    screen = stage.screen
    stage.make_disk()
    stage.start_server()
    stage.mount()
    screen.say(f"a load of 8 threads writes and compares blocks of {BLOCK >> 10} KiB")
    with screen:
        stage.start_load()
        stage.play_for(third)
        killed = stage.kill_server()
        stage.until(lambda: screen.parked > 0, _DEADLINE, "status to show parked requests")
        stage.play_for(killed + third - time.monotonic())
        stage.start_server()
        back = time.monotonic()
        before = stage.report.written
        stage.until(lambda: stage.report.written > before + 100, _DEADLINE, "the load to go on")
        stage.play_for(third)
        stage.stop_load()
    screen.plot(
        [
            Mark(killed, f"kill -9, {killed - stage.began:.1f} s"),
            Mark(back, f"server back, {back - stage.began:.1f} s"),
        ]
    )
    stage.umount()
    return _verdict(stage.report)


def _verdict(report: Report) -> str:
    if report.error_count:
        return f"FAILED: {report.error_count} errors seen by the load; first: {report.errors[0]}"
    if report.verified != report.to_verify or not report.verified:
        return f"FAILED: {report.verified} of {report.to_verify} blocks read back"
    return (
        f"PASS: {report.written} blocks written, {report.verified} verified, 0 errors, "
        f"longest wait {report.longest:.1f} s"
    )


class _Stage:
    """The processes and files of one demo, and the one place where it waits."""

    def __init__(
        self, directory: Path, server: str, seconds: float, interruption: _Interruption
    ) -> None:
        self.directory = directory
        self.disk = directory / "disk.raw"
        self.socket = directory / "nbd.sock"
        self.mountpoint = directory / "mnt"
        self.runtime = directory / "run"
        self.environment = os.environ | {"HEALFS_RUNTIME_DIR": str(self.runtime)}
        self.server_command = _server_command(server, self.socket, self.disk)
        self.server: subprocess.Popen[bytes] | None = None
        self.load: subprocess.Popen[bytes] | None = None
        self.status: subprocess.Popen[bytes] | None = None
        self.command: subprocess.Popen[bytes] | None = None
        self.next_status = float("inf")
        self.file = ""
        self.began = 0.0
        self.report = Report()
        self._partial = b""
        self.screen = Screen(seconds)
        self.selector = selectors.DefaultSelector()
        self.selector.register(interruption.fd, selectors.EVENT_READ, self._interrupt)

    # --- acts ---

    def make_disk(self) -> None:
        self.screen.command(f"export HEALFS_RUNTIME_DIR={shlex.quote(str(self.runtime))}")
        self.runtime.mkdir(mode=0o700)
        self._run(["truncate", "-s", f"{DISK_BYTES >> 20}M", str(self.disk)])
        self._run(["mkdir", str(self.mountpoint)])

    def start_server(self) -> None:
        if self.socket.exists():
            # The one that was killed could not remove it.
            self._run(["rm", str(self.socket)])
        self.screen.command(shlex.join(self.server_command) + " &")
        with open(self.directory / "server.log", "ab") as log:
            self.server = self._start(self.server_command, stdout=log, stderr=log)
        self._ask_soon()

    def kill_server(self) -> float:
        assert self.server is not None
        self.screen.command(f"kill -9 {self.server.pid}")
        self.server.kill()
        self.server.wait()
        self.server = None
        self._ask_soon()
        return time.monotonic()

    def mount(self) -> None:
        uri = f"nbd+unix:///?socket={self.socket}"
        self.file = self._run(["healfs", "mount", uri, str(self.mountpoint)])

    def umount(self) -> None:
        self._run(["healfs", "umount", str(self.mountpoint)])

    def start_load(self) -> None:
        self.load = self._start(
            [sys.executable, "-P", "-m", "healfs.cli.demo_load", self.file, str(DISK_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._watch(self.load.stdout, self._load_said)
        self.began = time.monotonic()
        self._ask_soon()
        self.until(lambda: self.report.written > 0, _DEADLINE, "the load's first block")

    def stop_load(self) -> None:
        """Returns when every block that the load wrote was read back."""
        assert self.load is not None and self.load.stdin is not None
        self.load.stdin.close()
        self.until(lambda: self.report.to_verify > 0, _DEADLINE, "the load to stop")
        self.screen.say(f"reading back the {self.report.to_verify} blocks that were written")
        self.next_status = float("inf")
        self.until(lambda: self.report.done, _DEADLINE, "the blocks to be read back")
        assert self.load.stdout is not None
        self.selector.unregister(self.load.stdout)
        self.load.wait()
        self.load = None

    def play_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= end, seconds + _DEADLINE, "the clock")

    # --- waiting ---

    def until(self, holds: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait until `holds`. Raises CliError: interrupted, ended, or it takes too long."""
        deadline = time.monotonic() + seconds
        while not holds():
            for key, _ in self.selector.select(0.05):
                key.data()
            self._check_server()
            self._ask_status()
            self.screen.refresh()
            if time.monotonic() > deadline:
                raise CliError(f"waited {seconds:.0f} s for {what}")

    def _interrupt(self) -> None:
        raise CliError("interrupted; all is cleaned up", exit_status.INTERRUPTED)

    def _check_server(self) -> None:
        if self.server is not None and self.server.poll() is not None:
            said = (self.directory / "server.log").read_text(errors="replace").strip()
            reason = said.splitlines()[-1] if said else f"status {self.server.returncode}"
            self.server = None
            raise CliError(f"{self.server_command[0]} ended: {reason}")

    def _watch(self, pipe: IO[bytes] | None, ready: Callable[[], None]) -> None:
        assert pipe is not None
        os.set_blocking(pipe.fileno(), False)
        self.selector.register(pipe, selectors.EVENT_READ, ready)

    def _load_said(self) -> None:
        assert self.load is not None and self.load.stdout is not None
        data = os.read(self.load.stdout.fileno(), 1 << 16)
        if not data and not self.report.done:
            raise CliError(f"the load ended with status {self.load.wait()}")
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            self.report = Report(**json.loads(line))
            self.screen.load(self.report)

    def _ask_soon(self) -> None:
        if self.load is not None:
            self.next_status = 0.0

    def _ask_status(self) -> None:
        if self.status is not None or time.monotonic() < self.next_status:
            return
        self.next_status = time.monotonic() + _STATUS_EVERY
        command = [*_HEALFS, "status", str(self.mountpoint), "--json"]
        self.status = self._start(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        said = b""

        def answered() -> None:
            nonlocal said
            assert self.status is not None and self.status.stdout is not None
            data = os.read(self.status.stdout.fileno(), 1 << 16)
            if data:
                said += data
                return
            self.selector.unregister(self.status.stdout)
            self.status.stdout.close()
            self.status.wait()
            self.status = None
            if said:
                answer: dict[str, Any] = json.loads(said)
                self.screen.status(answer)

        self._watch(self.status.stdout, answered)

    # --- processes ---

    def _start(self, command: list[str], **streams: Any) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C on the terminal reaches this process only.
        streams.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.Popen(command, env=self.environment, start_new_session=True, **streams)

    def _run(self, words: list[str]) -> str:
        """One command to its end, as a shell shows it; what it printed. Raises CliError."""
        self.screen.command(shlex.join(words))
        command = _HEALFS + words[1:] if words[0] == "healfs" else words
        # Files, not pipes: a daemon that inherited a pipe would hold its end open.
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            running = self.command = self._start(command, stdout=out, stderr=err)
            self.until(lambda: running.poll() is not None, _DEADLINE, words[0])
            self.command = None
            out.seek(0)
            err.seek(0)
            printed = out.read().decode(errors="replace").strip()
            if running.returncode:
                said = err.read().decode(errors="replace").strip().removeprefix("healfs: ")
                raise CliError(said or f"{words[0]} ended with status {running.returncode}")
        if printed:
            self.screen.output(printed)
        return printed

    def clean_up(self) -> None:
        """Whatever the moment: no mount, no process and no file stays. Bounded; signals wait."""
        if self.load is not None:
            self.load.kill()
        for running in (self.command, self.status):
            # `healfs mount` that is told to end takes its keeper with it.
            _end(running)
        if is_mounted(str(self.mountpoint)):
            umount = [*_HEALFS, "umount", "--force", str(self.mountpoint)]
            with contextlib.suppress(subprocess.TimeoutExpired, OSError):
                subprocess.run(
                    umount,
                    env=self.environment,
                    capture_output=True,
                    timeout=20,
                    start_new_session=True,
                )
        for pid in _processes_with(f"HEALFS_RUNTIME_DIR={self.runtime}", but=self.server):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        detach(str(self.mountpoint), connection_of(str(self.mountpoint)))
        _end(self.server)
        if self.load is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.load.wait(5)
        # Never into a mount: what is in there is not ours to remove.
        if is_mounted(str(self.mountpoint)):
            raise CliError(f"{self.mountpoint}: cannot unmount; see healfs umount --force")
        shutil.rmtree(self.directory, ignore_errors=True)


def _end(process: subprocess.Popen[bytes] | None) -> None:
    if process is None:
        return
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _processes_with(entry: str, but: subprocess.Popen[bytes] | None) -> list[int]:
    """The pids of what was started with this environment: the daemon, however far it came."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (directory / "environ").read_bytes().split(b"\0")
            if os.fsencode(entry) in environment:
                found.append(int(directory.name))
    return [pid for pid in found if but is None or pid != but.pid]


def _find_server() -> str:
    for name in ("nbdkit", "qemu-nbd"):
        if shutil.which(name):
            return name
    raise CliError(
        "the demo needs an NBD server; install the package nbdkit (or qemu-utils)",
        exit_status.BAD_INPUT,
    )


def _server_command(name: str, socket: Path, disk: Path) -> list[str]:
    if name == "nbdkit":
        return [name, "--foreground", "--unix", str(socket), "file", str(disk)]
    return [name, "--persistent", "--shared=0", "--format=raw", f"--socket={socket}", str(disk)]
