"""`healfs events` on a real mount: what happened, through the worker's death and the unmount."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.backends.nbd_servers import NbdServer, wait_until
from tests.conftest import Mounter
from tests.fuse.commands import Commands
from tests.fuse.conftest import SIZE, Opener
from tests.fuse.control import control
from tests.mounts import HEALFS, HealfsMount

BLOCK = b"x" * 4096
TRIES = 1000


def _lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def _events(mount: HealfsMount) -> list[dict[str, Any]]:
    return _lines(mount.run("events", str(mount.mountpoint), "--json").stdout)


def _names(events: list[dict[str, Any]]) -> list[str]:
    return [event["event"] for event in events]


def _until(mount: HealfsMount, name: str, count: int = 1) -> list[dict[str, Any]]:
    """The events, once there are so many of this name."""
    found: list[dict[str, Any]] = []

    def there() -> bool:
        found[:] = _events(mount)
        return _names(found).count(name) >= count

    wait_until(there, f"{count} {name}")
    return found


def _follow(mount: HealfsMount) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *("setpriv", "--pdeathsig", "KILL"),
            *(HEALFS, "events", mount.mountpoint, "--follow", "--json"),
        ],
        env=os.environ | {"HEALFS_RUNTIME_DIR": str(mount.runtime)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_life_of_a_mount(
    server: NbdServer, image: Path, healfs_mount: Mounter, agent: Opener
) -> None:
    mount = healfs_mount(server.uri(), "--settle", "0", "--slow-after", "1h")
    follower = _follow(mount)
    assert follower.stdout is not None
    first = json.loads(follower.stdout.readline())
    assert (first["event"], first["data"]) == ("HEALFS_MOUNTED", {"source": server.uri()})
    writers = [agent(mount.file) for _ in range(3)]
    server.kill()
    mount.wait_state("stalled")
    for number, writer in enumerate(writers):
        writer.ask("pwrite", number * 4096, BLOCK)
    mount.wait_until(lambda status: status["requests"]["parked"] == 3)
    os.truncate(image, SIZE // 2)  # another disk comes back
    server.start()
    mount.wait_state("mismatch")
    server.kill()
    mount.wait_state("stalled")
    os.truncate(image, SIZE)
    server.start()
    assert [writer.answer().value for writer in writers] == [len(BLOCK)] * 3
    _until(mount, "HEALFS_RECOVERED")
    mount.policy("--werror", "report")
    mount.run("pause", str(mount.mountpoint))
    mount.run("resume", str(mount.mountpoint))
    mount.kill_worker()
    mount.wait_state("ready")
    _until(mount, "HEALFS_RECOVERED", 2)
    for writer in writers:
        writer.kill()
        writer.ended()
    mount.umount()
    said, errors = follower.communicate(timeout=120)
    assert (follower.returncode, errors) == (0, "")
    followed = [first, *_lines(said)]
    assert _names(followed) == [
        "HEALFS_MOUNTED",
        "HEALFS_OUTAGE",
        "HEALFS_MISMATCH",
        "HEALFS_OUTAGE_CHANGED",
        "HEALFS_RECOVERED",
        "HEALFS_POLICY_CHANGED",
        "STOP",
        "HEALFS_DRAINED",
        "RESUME",
        "HEALFS_WORKER_RESTARTED",
        "HEALFS_OUTAGE",
        "HEALFS_RECOVERED",
        "HEALFS_UNMOUNTED",
    ]
    data = [event["data"] for event in followed]
    assert data[1]["kind"] == data[3]["kind"] == "away" and data[10]["kind"] == "worker"
    assert data[4]["requests_waited"] == 3 and 0 < data[4]["longest_wait"] <= data[4]["seconds"]
    assert data[5]["uid"] == os.geteuid() and data[5]["pid"] > 1
    assert data[5]["from"]["write"]["werror"] == "retry"
    assert data[5]["to"]["write"]["werror"] == "report"
    assert data[6]["uid"] == data[8]["uid"] == os.geteuid() and data[7] == {"unflushed": 0}
    assert data[9] == {"reason": "ended with signal 9", "restarts": 1}
    assert data[12].keys() == {"uid", "pid"} and data[12]["uid"] == os.geteuid()
    assert [event["sequence"] for event in followed] == list(range(1, len(followed) + 1))
    # It is unmounted, and still there to be asked for.
    assert _events(mount) == followed
    _words(mount)


def _words(mount: HealfsMount) -> None:
    """Of the same history, for people; it is piped here."""
    said = mount.run("events", str(mount.mountpoint)).stdout
    assert "\x1b" not in said and max(map(len, said.splitlines())) <= 80
    text = " ".join(said.split())
    for words in ("outage: the backend is away: ", "another disk came back", "3 requests waited"):
        assert words in text
    assert f"paused by uid {os.geteuid()} (pid " in text
    assert f"unmounted by uid {os.geteuid()} (pid " in text
    refused = mount.run("events", str(mount.mountpoint), "--follow", check=False)
    assert refused.returncode == 2 and "nothing to follow" in refused.stderr


def test_a_mountpoint_that_never_was_one(commands: Commands) -> None:
    done = commands.run("events", commands.mountpoint)
    assert done.returncode == 2 and "not a healfs mount" in done.stderr


class _Refuser:
    """A server that hangs up on everybody, and counts them."""

    def __init__(self, path: Path) -> None:
        self.count = 0
        self._listener = socket.socket(socket.AF_UNIX)
        path.unlink(missing_ok=True)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.close()
            self.count += 1

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(120)


def test_a_thousand_tries_are_no_events(
    server: NbdServer, healfs_mount: Mounter, agent: Opener
) -> None:
    mount = healfs_mount(server.uri(), "--retry-interval", "1ms", "--slow-after", "1h")
    writer = agent(mount.file)
    with control(mount) as disk:
        server.kill()
        disk.state("stalled")
        refuser = _Refuser(server.path)
        writer.ask("pwrite", 0, BLOCK)
        wait_until(lambda: refuser.count >= TRIES, f"{TRIES} tries", 240)
        refuser.close()
        server.start()
        assert writer.answer().value == len(BLOCK)
    assert _names(_until(mount, "HEALFS_RECOVERED")) == [
        "HEALFS_MOUNTED",
        "HEALFS_OUTAGE",
        "HEALFS_RECOVERED",
    ]


def test_the_keepers_death_ends_following_and_is_told_by_who_clears_up(
    image: Path, healfs_mount: Mounter
) -> None:
    mount = healfs_mount(image)
    follower = _follow(mount)
    assert follower.stdout is not None and "HEALFS_MOUNTED" in follower.stdout.readline()
    pids = mount.status()["pids"]
    for pid in pids["keeper"], pids["worker"]:
        os.kill(pid, signal.SIGKILL)
    said, errors = follower.communicate(timeout=120)
    assert (follower.returncode, said) == (1, "") and "the daemon is gone" in errors
    mount.umount()
    last = _events(mount)[-1]
    assert (last["event"], last["data"]) == ("HEALFS_UNMOUNTED", {"reason": "the daemon was gone"})
    # The next mount goes on in the same history.
    remount = mount.run("mount", str(image), str(mount.mountpoint))
    assert remount.stdout
    assert _names(_events(mount))[-2:] == ["HEALFS_UNMOUNTED", "HEALFS_MOUNTED"]
    assert [event["sequence"] for event in _events(mount)] == [1, 2, 3]


IN_A_SYSTEM = """
mount -t tmpfs none /run && mkdir -p /run/systemd/journal &&
mount --bind "$1" /run/systemd/journal && shift && exec "$@"
"""
JOURNALD = Path("/lib/systemd/systemd-journald")
# Nothing of the host's: its sockets, its journal, its kernel's messages and audit stay as they are.
START_JOURNALD = f"""
mount -t tmpfs none /run &&
mkdir -p /run/systemd/journal /run/systemd/journald.conf.d /run/log/journal &&
printf '[Journal]\\nReadKMsg=no\\nAudit=no\\n' >/run/systemd/journald.conf.d/healfs.conf &&
mount --bind "$1" /run/systemd/journal && mount --bind "$2" /run/log/journal && exec {JOURNALD}
"""


@contextlib.contextmanager
def journald(sockets: Path, journal: Path) -> Iterator[None]:
    """The system's own, with its sockets and its journal in these directories."""
    process = subprocess.Popen(
        [
            *("unshare", "--mount", "setpriv", "--pdeathsig", "KILL"),
            *("sh", "-c", START_JOURNALD, "sh", sockets, journal),
        ]
    )
    try:
        wait_until(lambda: (sockets / "socket").exists(), "journald's socket", 120)
        yield
    finally:
        process.terminate()
        process.wait(120)


def _entries(journal: Path, *matches: str) -> list[dict[str, str]]:
    """What journalctl finds."""
    command = ["journalctl", "-q", "--directory", journal, "--output", "json", *matches]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("there_is_one", [True, False])
def test_the_journal_gets_the_events_with_fields(
    image: Path, commands: Commands, tmp_path: Path, there_is_one: bool
) -> None:
    """As a unit's process: standard error is the journal's stream, /run/systemd is there."""
    if not JOURNALD.exists() or os.geteuid() != 0:
        pytest.skip(f"needs {JOURNALD}, and root for a mount namespace")
    sockets, journal = commands.directory / "sockets", tmp_path / "journal"
    sockets.mkdir()
    journal.mkdir()
    read, write = os.pipe()
    stream = os.fstat(write)
    with contextlib.ExitStack() as stack:
        stderr = stack.enter_context(open(read))
        if there_is_one:
            stack.enter_context(journald(sockets, journal))
        daemon = subprocess.Popen(
            [
                *("unshare", "--mount", "setpriv", "--pdeathsig", "KILL"),
                *("sh", "-c", IN_A_SYSTEM, "sh", sockets, sys.executable, HEALFS),
                *("mount", "--foreground", image, commands.mountpoint),
            ],
            env=commands.environment | {"JOURNAL_STREAM": f"{stream.st_dev}:{stream.st_ino}"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=write,
            text=True,
        )
        os.close(write)
        try:
            assert daemon.stdout is not None
            assert daemon.stdout.readline() == f"{commands.file}\n"
            policy = commands.run("policy", commands.mountpoint, "--rerror", "report")
            assert policy.returncode == 0, policy.stderr
            daemon.terminate()
            daemon.wait(120)
        finally:
            daemon.kill()
            daemon.communicate(timeout=120)
        plain = stderr.read()
        if not there_is_one:
            assert f"mounted {image}" in plain and "policy changed by uid" in plain
            return
        assert "policy changed" not in plain and "POLICY" not in plain
        unmounted = "HEALFS_EVENT=HEALFS_UNMOUNTED"
        wait_until(lambda: _entries(journal, unmounted), "journald to write it down", 120)
    names = ["HEALFS_MOUNTED", "HEALFS_POLICY_CHANGED", "HEALFS_UNMOUNTED"]
    told = _entries(journal, f"HEALFS_MOUNTPOINT={commands.mountpoint}")
    assert [one["HEALFS_EVENT"] for one in told] == names
    assert told[0]["MESSAGE"] == f"{commands.mountpoint}: mounted {image}"
    [changed] = _entries(journal, "HEALFS_EVENT=HEALFS_POLICY_CHANGED")
    assert changed["PRIORITY"] == "5" and changed["HEALFS_UID"] == str(os.geteuid())
    assert json.loads(changed["HEALFS_TO"])["read"]["rerror"] == "report"
    assert changed["SYSLOG_IDENTIFIER"] == "healfs" and changed["_TRANSPORT"] == "journal"
