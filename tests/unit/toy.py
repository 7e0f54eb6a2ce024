"""What the tests of the verbs share: `healfs` in this process, and a daemon that is a toy."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner, Result

from healfs.cli.main import main
from healfs.control import mounts
from healfs.control.server import Argument, CommandError, ControlServer, Peer, Verb
from healfs.core.policy import Action, Policy
from tests.mounts import _processes

DEADLINE = 120


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HEALFS_RUNTIME_DIR", str(tmp_path / "run"))
    yield tmp_path / "run"
    for pid in processes(tmp_path / "run"):
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(pid, signal.SIGKILL)


def processes(runtime: Path) -> set[int]:
    """Those that were started with this runtime directory."""
    return set(_processes(runtime)) - {os.getpid()}


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], prog_name="healfs")


def assert_refused(result: Result, *words: str, status: int = 2) -> None:
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("healfs: ") and result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


class Daemon:
    """A toy in a thread of its own, with a real claim, socket and process to wait for."""

    def __init__(self, mountpoint: str) -> None:
        self.policy = Policy()
        self.status: dict[str, Any] = {"mountpoint": mountpoint, "state": "ready"}
        self.refusal = ""
        self.accepted: bool | None = None
        self.process = subprocess.Popen(["sleep", "1200"])
        self.claim = mounts.claim(mountpoint)
        self.listener = self.claim.listen()
        self.mount = self.claim.record(
            mountpoint=mountpoint,
            file=f"{mountpoint}/disk.img",
            source="/src",
            keeper=self.process.pid,
            worker=0,
            log="/log",
        )
        self._thread: threading.Thread | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()

    def start(self) -> None:
        started = threading.Event()
        commands = {
            "healfs-query-status": Verb(lambda arguments, peer: self.status),
            "healfs-set-policy": Verb(
                self._set_policy,
                {"read": Argument(dict, optional=True), "write": Argument(dict, optional=True)},
            ),
            "healfs-umount": Verb(self._umount, {"force": Argument(bool)}),
            "healfs-reconnect": Verb(lambda arguments, peer: {}),
            "healfs-fail": Verb(lambda arguments, peer: {"failed": 3}),
            "healfs-accept": Verb(self._accept, {"replay": Argument(bool)}),
        }

        async def serve() -> None:
            self._token = trio.lowlevel.current_trio_token()
            started.set()
            with self._scope:
                await ControlServer(commands, version="0").serve(self.listener)

        self._thread = threading.Thread(target=trio.run, args=(serve,), daemon=True)
        self._thread.start()
        assert started.wait(DEADLINE)

    def _set_policy(self, arguments: dict[str, Any], peer: Peer) -> Any:
        self.policy = self.policy.change(
            *(
                {k: Action(v) if k in ("error", "then") else v for k, v in keys.items()}
                for keys in (arguments.get("read", {}), arguments.get("write", {}))
            )
        )
        return self.policy.as_dict()

    def _umount(self, arguments: dict[str, Any], peer: Peer) -> Any:
        if self.refusal and not arguments["force"]:
            raise CommandError(self.refusal)
        self.process.kill()
        return {"given_up": {"write": {"requests": 3, "bytes": 4096}} if self.refusal else {}}

    def _accept(self, arguments: dict[str, Any], peer: Peer) -> Any:
        if self.refusal:
            raise CommandError(self.refusal)
        self.accepted = arguments["replay"]
        if self.accepted:
            self.status["state"] = "replaying"
        return {}

    def stop(self) -> None:
        """The daemon dies; its files stay."""
        if self._thread is not None and self._token is not None:
            self._token.run_sync_soon(self._scope.cancel)
            self._thread.join(DEADLINE)
            self._thread = None
        self.listener.close()

    def close(self) -> None:
        self.stop()
        self.process.kill()
        self.process.wait(DEADLINE)
        self.claim.release()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    (tmp_path / "mnt").mkdir()
    result = Daemon(str(tmp_path / "mnt"))
    yield result
    result.close()
