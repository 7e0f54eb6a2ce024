"""healfs as its user runs it: the installed command, in processes of its own.

`python -m tests.mounts MOUNTPOINT RUNTIME_DIR SECONDS` is the watchdog that each
mount of a test has: it cleans up when its standard input ends (the test run was
killed) or the time is over.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
HEALFS = ROOT / ".venv/bin/healfs"
CONNECTIONS = Path("/sys/fs/fuse/connections")

ASKING = ("status", "policy")

Status = dict[str, Any]


class HealfsMount:
    """`healfs mount SOURCE`, gone to the background; end it with close().

    Raises subprocess.CalledProcessError when mount fails (its one line is in stderr),
    subprocess.TimeoutExpired when it is not in the background after `timeout` seconds.
    The mount is torn down `limit` seconds after its start, whatever the test does.
    """

    def __init__(
        self,
        source: str | Path,
        *options: str,
        name: str = "disk.img",
        timeout: float = 180,
        limit: float = 2400,  # longer than the longest test may take
    ) -> None:
        # Not pytest's tmp_path: the control socket's path must fit in 108 bytes.
        self._directory = Path(tempfile.mkdtemp(prefix="healfs-"))
        self.mountpoint = self._directory / "mnt"
        self.runtime = self._directory / "run"
        self.mountpoint.mkdir()
        self.runtime.mkdir(mode=0o700)
        self.file = self.mountpoint / name
        self._watchdog = subprocess.Popen(
            [sys.executable, "-m", "tests.mounts", self.mountpoint, self.runtime, str(limit)],
            stdin=subprocess.PIPE,
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            named = () if name == "disk.img" else ("--name", name)
            mounting = ("mount", str(source), str(self.mountpoint), *named, *options)
            self.printed = self.run(*mounting, timeout=timeout).stdout
        except BaseException:
            self.close()
            raise

    def run(
        self, *arguments: str, timeout: float = 120, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """`healfs ARGUMENTS` with this mount's runtime directory."""
        until = time.monotonic() + timeout
        while True:
            done = subprocess.run(
                (HEALFS, *arguments),
                env=os.environ | {"HEALFS_RUNTIME_DIR": str(self.runtime)},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
            # healfs itself waits for five seconds: too few, at times, for a machine that is busy.
            silent = "does not answer; try again" in done.stderr and arguments[0] in ASKING
            if not (check and silent and time.monotonic() < until):
                break
        if check and done.returncode:
            raise subprocess.CalledProcessError(
                done.returncode, f"healfs {' '.join(arguments)}: {done.stderr}", done.stdout
            )
        return done

    def status(self, timeout: float = 120) -> Status:
        """What `healfs status --json` says; `timeout` is the deadline for its answer."""
        printed = self.run("status", str(self.mountpoint), "--json", timeout=timeout).stdout
        answer: Status = json.loads(printed)
        return answer

    def policy(self, *options: str, timeout: float = 120) -> str:
        return self.run("policy", str(self.mountpoint), *options, timeout=timeout).stdout

    def umount(
        self, force: bool = False, timeout: float = 120, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        options = ("--force",) if force else ()
        return self.run("umount", str(self.mountpoint), *options, timeout=timeout, check=check)

    def wait_until(self, holds: Callable[[Status], bool], deadline: float = 120) -> Status:
        """The first status for which `holds`; TimeoutError `deadline` seconds later."""
        until = time.monotonic() + deadline
        while not holds(status := self.status()):
            if time.monotonic() > until:
                raise TimeoutError(f"after {deadline} s the status is still {status}")
            # Each status is a process of its own; the pause leaves the machine to others.
            time.sleep(0.05)
        return status

    def wait_state(self, state: str, deadline: float = 120) -> Status:
        return self.wait_until(lambda status: status["state"] == state, deadline)

    def kill_worker(self, deadline: float = 180) -> None:
        """kill -9, and until another one answers."""
        old = self.status()["pids"]["worker"]
        os.kill(old, signal.SIGKILL)
        until = time.monotonic() + deadline
        while True:
            # Asked in that moment, it dies before it has answered.
            with contextlib.suppress(subprocess.CalledProcessError):
                if self.status()["pids"]["worker"] != old:
                    return
            if time.monotonic() > until:
                raise TimeoutError(f"no other worker after {deadline:g} s")

    def processes(self) -> list[int]:
        """The pids of all processes of this mount."""
        return _processes(self.runtime)

    def close(self) -> None:
        """Leaves no mount, no process and no file behind, in whatever state things are."""
        try:
            if self.mountpoint.is_mount():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.umount(force=True, check=False)
        finally:
            try:
                _clean(self.mountpoint, self.runtime)
            finally:
                assert self._watchdog.stdin is not None
                self._watchdog.stdin.close()
                self._watchdog.wait(120)
            shutil.rmtree(self._directory, ignore_errors=True)


def _processes(runtime: Path) -> list[int]:
    # Known by the environment they were started with: no other mount has this
    # directory, and it holds when mount.json was never written.
    entry = f"HEALFS_RUNTIME_DIR={runtime}".encode()
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if entry in (directory / "environ").read_bytes().split(b"\0"):
                found.append(int(directory.name))
    return found


def mountinfo() -> Iterator[list[str]]:
    """The fields of each mount on the machine: [2] is its device, [4] where it is."""
    # Of other tests beside this one, too: their names hold all that a name can.
    with open("/proc/self/mountinfo", errors="surrogateescape", newline="\n") as table:
        for line in table:
            yield line.split(" ")


def _connection(mountpoint: Path) -> str | None:
    """The mount's number in fusectl: the minor of its device. No call goes to the mount."""
    for fields in mountinfo():
        if fields[4] == str(mountpoint):
            return fields[2].partition(":")[2]
    return None


def connections() -> Path:
    """fusectl, mounted: a directory for each connection that there is."""
    if not any(CONNECTIONS.iterdir()):
        subprocess.run(("mount", "-t", "fusectl", "none", CONNECTIONS), check=False, timeout=60)
    return CONNECTIONS


def _clean(mountpoint: Path, runtime: Path) -> None:
    if (number := _connection(mountpoint)) is not None:
        # Aborted first: what waits in it would hold umount and the processes' end.
        with contextlib.suppress(OSError):
            (connections() / number / "abort").write_text("1")
        lazily = ("umount", "-l") if os.geteuid() == 0 else ("fusermount3", "-u", "-z")
        subprocess.run((*lazily, mountpoint), check=False, timeout=60)
    for pid in _processes(runtime):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _watch(mountpoint: Path, runtime: Path, seconds: float) -> None:
    select.select([sys.stdin], [], [], seconds)
    _clean(mountpoint, runtime)


if __name__ == "__main__":
    _watch(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
