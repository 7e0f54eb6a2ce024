"""What the tests hold in their hands: the lossy server, the checker, a healfs that is broken."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from healfs.compiled import PLAIN
from tests.backends.nbd_servers import NbdServer, wait_until
from tests.lossy import server as lossy
from tests.mounts import ROOT

SECONDS = 180.0  # for what ought to take a moment


class LossyServer(NbdServer):
    """server.py on `stable`, for as many lives as wanted; kill() drops its cache."""

    def __init__(self, stable: Path, late_delay: float | None = None) -> None:
        super().__init__(self._arguments, limit=600)
        self.stable = stable
        self.late_delay = late_delay
        self.initial: dict[str, Any] = {}  # settings of its next lives
        self.journal = stable.with_suffix(".journal")
        self.handover = stable.with_suffix(".held")

    def _arguments(self, server: NbdServer) -> Sequence[str]:
        late = [] if self.late_delay is None else [str(self.late_delay)]
        files = [str(path) for path in (self.path, self.stable, self.journal, self.handover)]
        return [sys.executable, "-S", "-E", lossy.__file__, *files, json.dumps(self.initial), *late]

    def set(self, **settings: Any) -> dict[str, Any]:
        """Change settings, or with none: the state."""
        with socket.socket(socket.AF_UNIX) as conn:
            conn.settimeout(SECONDS)
            conn.connect(f"{self.path}.control")
            conn.sendall(json.dumps(settings).encode() + b"\n")
            answer: dict[str, Any] = json.loads(conn.makefile("r").readline())
            return answer

    def until(self, name: str, at_least: int) -> None:
        """Until this counter of the state is so high."""
        wait_until(lambda: self.set()[name] >= at_least, f"{name} of {at_least}", SECONDS)

    def records(self) -> list[lossy.Record]:
        return list(lossy.read_journal(self.journal)) if self.journal.exists() else []

    def dropped(self) -> list[lossy.Record]:
        """Answered, unflushed writes whose bytes the stable file does not have. To be asked
        between kill() and start()."""
        assert self.process is None
        newest: dict[tuple[int, int], lossy.Record] = {}
        for record in self.records():
            if record.what in (lossy.FLUSHED, lossy.CONNECTED):
                newest.clear()
            else:
                newest[record.offset, record.length] = record
        with open(self.stable, "rb") as file:
            return [
                record
                for record in newest.values()
                if zlib.crc32(os.pread(file.fileno(), record.length, record.offset)) != record.crc
            ]

    def landed_late(self) -> list[lossy.Record]:
        return [record for record in self.records() if record.what == lossy.LATE]

    def late_until(self, deadline: float) -> None:
        """Nothing of what is held lands after this (time.monotonic). To be told before kill():
        a test on a slow machine must not outlast the settle time."""
        if self.handover.exists():
            with open(self.handover, "r+b") as file:
                file.write(struct.pack("<d", deadline))


class FailingStore:
    """failing_store.py, and a loop device on its file."""

    def __init__(self, directory: Path, size: int) -> None:
        self.mountpoint = directory / "failing"
        self.mountpoint.mkdir()
        self.commands = directory / "commands"
        self.tell("")
        self.process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", sys.executable),
                *(Path(__file__).with_name("failing_store.py"), self.mountpoint),
                *(self.commands, str(size)),
            ]
        )
        self.device = ""
        try:
            wait_until(self.mountpoint.is_mount, "the failing store's mount")
            words = ["losetup", "--find", "--show", str(self.mountpoint / "disk.img")]
            done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
            if done.returncode:
                pytest.skip(f"no loop device: {done.stderr.strip()}")
            self.device = done.stdout.strip()
        except BaseException:
            self.close()
            raise

    def tell(self, words: str) -> None:
        new = self.commands.with_suffix(".new")
        new.write_text(words)
        new.replace(self.commands)

    def said(self, word: str) -> list[str]:
        """The lines of its log that begin with the word."""
        lines = Path(f"{self.commands}.log").read_text().splitlines()
        return [line for line in lines if line.split()[0] == word]

    @property
    def medium(self) -> Path:
        return Path(f"{self.commands}.stable")

    def close(self) -> None:
        self.tell("")
        if self.device:
            subprocess.run(["losetup", "--detach", self.device], check=False, timeout=SECONDS)
        subprocess.run(["umount", "--lazy", self.mountpoint], check=False, timeout=SECONDS)
        self.process.terminate()
        self.process.wait(SECONDS)


class Checker:
    """checker.py on `file`, in a process of its own."""

    def __init__(self, file: Path, *, blocks: int, threads: int = 8, seed: int = 0) -> None:
        self.process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "tests.lossy.checker"),
                *(str(file), str(blocks), str(threads), str(seed)),
            ],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )

    def ask(self, *command: str, seconds: float = SECONDS) -> dict[str, Any]:
        """progress; check; flush; stop; stable PATH: see checker.py."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        line = b""
        until = time.monotonic() + seconds
        while not line.endswith(b"\n"):
            left = max(0.0, until - time.monotonic())
            ready = select.select([self.process.stdout], [], [], left)[0]
            assert ready, f"{command}: no answer within {seconds} s"
            chunk = os.read(self.process.stdout.fileno(), 1 << 20)
            assert chunk, f"the checker ended with status {self.process.wait(SECONDS)}"
            line += chunk
        answer: dict[str, Any] = json.loads(line)
        return answer

    def until(self, name: str, at_least: int) -> None:
        def reached() -> bool:
            progress = self.ask("progress")
            assert not progress["errors"], progress
            return bool(progress[name] >= at_least)

        wait_until(reached, f"{at_least} {name}", SECONDS)

    def close(self) -> None:
        self.process.kill()
        for pipe in self.process.stdin, self.process.stdout:
            assert pipe is not None
            pipe.close()
        self.process.wait(SECONDS)


@contextlib.contextmanager
def broken(tmp_path: Path, patch: str) -> Iterator[None]:
    """Workers that are started meanwhile run `patch` (Python) before anything else.

    By PYTHONPATH and sitecustomize: nothing in healfs knows of it.
    """
    where = tmp_path / "broken"
    where.mkdir()
    guard = 'import sys\nif "healfs.daemon.worker" in sys.orig_argv:\n'
    body = "".join(f"    {line}\n" for line in patch.strip().splitlines())
    (where / "sitecustomize.py").write_text(guard + body)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(where))
        environment.setenv(PLAIN, "1")  # what is compiled cannot be patched
        yield


# Writes leave the log when they are answered, so there is nothing to replay.
NO_REPLAY = """
from healfs.core.writelog import WriteLog
WriteLog.keep = property(lambda self: False, lambda self, value: None)
"""
