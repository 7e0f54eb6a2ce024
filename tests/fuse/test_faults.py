"""An internal error of the worker is one more outage, as its death by a signal is."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.backends.nbd_servers import wait_until
from tests.conftest import Mounter
from tests.fuse.agent import Agent
from tests.fuse.commands import Commands
from tests.fuse.conftest import Opener
from tests.fuse.test_upgrade import Version
from tests.fuse.test_worker_kills import BACKENDS, Kills, Load, _mounted
from tests.fuse.test_worker_kills import large as large
from tests.killpoints import ELSEWHERE, IN_FLIGHT, KillPoints
from tests.killpoints import kill_points as kill_points
from tests.mounts import ROOT, HealfsMount

BLOCK = b"x" * 4096
GENEROUS = 120.0
BY_ERROR = "ended by an internal error"


def _events(mount: HealfsMount, name: str) -> list[dict[str, Any]]:
    printed = mount.run("events", str(mount.mountpoint), "--json").stdout
    events = [json.loads(line) for line in printed.splitlines()]
    return [event["data"] for event in events if event["event"] == name]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "manner", "where"),
    [
        ("completed-entry", "raise", "completed"),  # the log has it, nobody is answered
        ("log-entry", "memory", "submit"),
        ("received", "memory", "the channel"),
        ("beat", "raise", "beat"),
        ("reply", "SIGSEGV", None),
    ],
)
def test_fio_verifies_through_a_fault(
    large: Path,
    healfs_mount: Mounter,
    kill_points: KillPoints,
    backend: str,
    name: str,
    manner: str,
    where: str | None,
) -> None:
    with _mounted(backend, large, healfs_mount) as (mount, _):
        load = Load(mount.file, "libaio", kill_points.directory)
        try:
            kills = Kills(mount, load, kill_points)
            kills.at(name, (IN_FLIGHT | ELSEWHERE)[name], manner=manner)
            kills.answered(1)
            assert load.end() == 0, load.said.read_text()
        finally:
            load.kill()
        status = mount.status()
        assert (status["state"], status["worker_restarts"]) == ("ready", 1)
        reasons = [data["reason"] for data in _events(mount, "HEALFS_FAULTED")]
        (restarted,) = _events(mount, "HEALFS_WORKER_RESTARTED")
        if where is None:
            assert reasons == [] and restarted["reason"] == "ended with signal 11"
        else:
            assert reasons == [f"internal error in {where}; see the log"]
            assert restarted["reason"] == BY_ERROR
            log = Path(status["log"]).read_text()
            assert re.search(r"(RuntimeError|MemoryError): planted$", log, re.MULTILINE)
        assert [data["kind"] for data in _events(mount, "HEALFS_OUTAGE")] == ["worker"]
        assert len(_events(mount, "HEALFS_RECOVERED")) == 1


def test_one_that_faults_again_and_again_is_not_hammered(
    large: Path, healfs_mount: Mounter, kill_points: KillPoints
) -> None:
    """Each has answered something before, as with one request that it cannot stand."""
    mount = healfs_mount(large)
    load = Load(mount.file, "libaio", kill_points.directory)
    try:
        kills = Kills(mount, load, kill_points)
        kills.answered(1)
        kill_points.arm(*[("replied", 500)] * 4, manner="raise")
        for _ in range(4):
            kills.dead.add(kill_points.reached("replied")["pid"])
        kills.answered(1)
        assert load.end() == 0, load.said.read_text()
    finally:
        load.kill()
    status = mount.status()
    assert (status["state"], status["worker_restarts"]) == ("ready", 4)
    said = Path(status["log"]).read_text()
    deaths = re.findall(
        f"no worker runs: ([1-9]) in a row {BY_ERROR} soon after its start;"
        r" the next one is started ([0-9.]+) s after the last",
        said,
    )
    assert deaths == [("1", "0.1"), ("2", "0.2"), ("3", "0.4"), ("4", "0.8")]
    assert len(_events(mount, "HEALFS_FAULTED")) == 2  # they do not push out the rest
    assert len(_events(mount, "HEALFS_WORKER_RESTARTED")) == 1


# --- without a successor ------------------------------------------------------------------------


def _plant(directory: Path) -> Version:
    """A version whose channel cannot stand a fallocate."""
    version = Version(directory, "1.0")
    first = "        punch = bool(mode & wire.FALLOC_PUNCH_HOLE)\n"
    version.change("fuse/channel.py", first, f"        raise RuntimeError('planted')\n{first}")
    return version


def _status(commands: Commands) -> dict[str, Any]:
    done = commands.run("status", commands.mountpoint, "--json", seconds=GENEROUS)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_on_an_old_kernel_the_disk_is_faulted_and_the_mount_stays(
    commands: Commands, image: Path, tmp_path: Path
) -> None:
    version = _plant(tmp_path / "version")
    path = f"{ROOT / 'tests/fuse/old_kernel'}:{version.directory}"
    commands.environment["PYTHONPATH"] = path
    assert commands.mount(image).returncode == 0
    del commands.environment["PYTHONPATH"]
    worker = _status(commands)["pids"]["worker"]
    caller, writer = Agent(commands.file), Agent(commands.file)
    try:
        caller.ask("fallocate", 3, 0, 4096)
        wait_until(lambda: _status(commands)["state"] == "faulted", "the fault")
        status = _status(commands)
        assert status["reason"] == "internal error in the channel; see the log"
        assert status["pids"]["worker"] == worker and status["worker_restarts"] == 0
        writer.ask("pread", 0, 512)
        wait_until(lambda: _status(commands)["requests"]["parked"] == 1, "the read")
        assert not writer.answered and not caller.answered
        assert commands.run("umount", commands.mountpoint, "--force").returncode == 0
        assert writer.answer().errno == errno.EIO
        assert caller.answer().errno in (errno.ECONNABORTED, errno.ENOTCONN, errno.EIO)
    finally:
        for one in caller, writer:
            one.kill()
        for one in caller, writer:
            one.ended()
    commands.nothing_left(GENEROUS)


def test_a_request_that_no_version_stands_but_the_next(
    image: Path,
    healfs_mount: Mounter,
    agent: Opener,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It comes again to each worker; an upgrade mends it."""
    monkeypatch.setenv("PYTHONPATH", str(_plant(tmp_path / "bad").directory))
    mount = healfs_mount(image)
    monkeypatch.delenv("PYTHONPATH")
    log = Path(mount.status()["log"])
    writer = agent(mount.file)
    assert writer.ok("pwrite", 0, BLOCK * 2) == 8192
    writer.ask("fallocate", 3, 0, 4096)
    wait_until(lambda: f"no worker runs: 3 in a row {BY_ERROR}" in log.read_text(), "three")
    Version(tmp_path / "good", "1.1").upgrade(mount)
    assert not writer.answer().errno
    assert writer.ok("pread", 0, 8192) == bytes(4096) + BLOCK
    assert mount.status()["state"] == "ready"
