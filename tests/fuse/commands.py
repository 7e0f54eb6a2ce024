"""`healfs` as a command whose end is the subject: what it says, how it ends, what it leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests import mounts
from tests.mounts import HEALFS, ROOT

LIMIT = 1200  # seconds that a mount lives at the most


class Commands:
    """A runtime directory and an empty mountpoint; at the end nothing of them is left."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="healfs-"))
        self.mountpoint = self.directory / "mnt"
        self.runtime = self.directory / "run"
        self.mountpoint.mkdir()
        self.runtime.mkdir(mode=0o700)
        self.file = self.mountpoint / "disk.img"
        self.environment = os.environ | {"HEALFS_RUNTIME_DIR": str(self.runtime)}
        self._started: list[subprocess.Popen[str]] = []
        self._watchdog = subprocess.Popen(
            [sys.executable, "-m", "tests.mounts", self.mountpoint, self.runtime, str(LIMIT)],
            stdin=subprocess.PIPE,
            cwd=ROOT,
            start_new_session=True,
        )

    def run(
        self, *arguments: str | Path, prefix: Sequence[str] = (), seconds: float = 180
    ) -> subprocess.CompletedProcess[str]:
        """`healfs ARGUMENTS` to its end, whatever its status is."""
        return subprocess.run(
            [*prefix, HEALFS, *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )

    def mount(
        self, source: str | Path, *options: str, prefix: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        return self.run("mount", source, self.mountpoint, *options, prefix=prefix)

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """`healfs ARGUMENTS`, running; standard output and error are pipes."""
        self._started.append(
            subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", HEALFS, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return self._started[-1]

    def kill_worker(self, seconds: float = 180) -> None:
        """kill -9, and until another one answers."""
        old = self.status()["pids"]["worker"]
        os.kill(old, signal.SIGKILL)
        until = time.monotonic() + seconds
        while True:
            done = self.run("status", self.mountpoint, "--json")
            if not done.returncode and json.loads(done.stdout)["pids"]["worker"] != old:
                return
            assert time.monotonic() < until, f"no other worker: {done}"

    def status(self) -> dict[str, Any]:
        done = self.run("status", self.mountpoint, "--json")
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    @property
    def is_mounted(self) -> bool:
        return any(fields[4] == str(self.mountpoint) for fields in mounts.mountinfo())

    def processes(self) -> list[int]:
        return mounts._processes(self.runtime)

    def run_files(self) -> list[str]:
        """What is in the runtime directory, but for the logs and the histories, which stay."""
        names = {path.name for path in self.runtime.iterdir()}
        return sorted(names - {"log", "events"})

    def log(self) -> str:
        """What the daemons of this mountpoint logged."""
        return "".join(path.read_text() for path in (self.runtime / "log").glob("*.log"))

    def nothing_left(self, seconds: float = 0) -> None:
        """No mount, no process, no runtime files: now, or within `seconds`."""
        until = time.monotonic() + seconds
        while True:
            left = self.is_mounted, self.processes(), self.run_files()
            if left == (False, [], []):
                return
            assert time.monotonic() < until, f"left (mounted, processes, files): {left}"
            time.sleep(0.02)

    def __enter__(self) -> Commands:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.close()
        self._watchdog.wait(120)
        for process in self._started:
            process.kill()
            process.communicate(timeout=120)
        shutil.rmtree(self.directory, ignore_errors=True)
