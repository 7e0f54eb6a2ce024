"""--allow-uid: who may use the control socket beside the owner and root, as real users see it."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.backends.nbd_servers import wait_until
from tests.fuse.commands import Commands
from tests.mounts import HEALFS

ALLOWED, STRANGER = 65533, 65532


def _as(commands: Commands, uid: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    user = ("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--")
    return commands.run(*arguments, prefix=user)


@pytest.fixture
def shared(other_users: None, commands: Commands, image: Path) -> Commands:
    commands.directory.chmod(0o755)
    done = commands.mount(image, "--allow-uid", str(ALLOWED), "--allow-uid", "1")
    assert done.returncode == 0, done.stderr
    return commands


def _events(commands: Commands) -> list[dict[str, object]]:
    said = commands.run("events", commands.mountpoint, "--json").stdout
    return [json.loads(line) for line in said.splitlines()]


def _last(commands: Commands) -> tuple[object, object]:
    event = _events(commands)[-1]
    return event["event"], event["data"].get("uid")  # type: ignore[attr-defined]


def _may(commands: Commands) -> None:
    at = str(commands.mountpoint)
    for path in at, str(commands.file):
        status = _as(commands, ALLOWED, "status", path, "--json")
        assert status.returncode == 0, status.stderr
    assert json.loads(status.stdout)["configuration"]["values"]["allow_uid"] == {
        "value": [ALLOWED, 1],
        "from": "option",
    }
    changed = _as(commands, ALLOWED, "policy", at, "--rerror", "report")
    assert changed.returncode == 0, changed.stderr
    # The keeper writes it down, when it gets to it.
    wait_until(lambda: _last(commands) == ("HEALFS_POLICY_CHANGED", ALLOWED), "the event")
    assert commands.run("policy", at, "--rerror", "retry").returncode == 0


def _may_not(commands: Commands) -> None:
    for arguments in (
        ("status",),
        ("policy", "--rerror", "stop"),
        ("umount",),
        ("umount", "--force"),
    ):
        refused = _as(commands, STRANGER, *arguments, str(commands.mountpoint))
        assert refused.returncode == 1 and refused.stdout == "", refused
        (line,) = refused.stderr.splitlines()
        assert f"uid {STRANGER} may not: only root, the owner, and whom mount --allow-uid" in line
    assert commands.is_mounted


def test_the_allowed_may_and_others_may_not_through_a_death_and_an_upgrade(
    shared: Commands,
) -> None:
    at = str(shared.mountpoint)
    _may(shared)
    _may_not(shared)
    shared.kill_worker()
    _may(shared)
    _may_not(shared)
    assert shared.run("upgrade", at).returncode == 0
    _may(shared)
    _may_not(shared)
    # Whoever may use the socket may replace no program, and read no history.
    refused = _as(shared, ALLOWED, "upgrade", at)
    assert refused.returncode == 1 and "only its owner and root" in refused.stderr
    refused = _as(shared, ALLOWED, "events", at)
    assert refused.returncode == 2 and "only its owner" in refused.stderr
    ended = _as(shared, ALLOWED, "umount", at)
    assert (ended.returncode, ended.stderr) == (0, "")
    shared.nothing_left()
    assert _events(shared)[-1]["data"]["uid"] == ALLOWED  # type: ignore[index]


def test_without_the_option_nobody_else_finds_the_socket(
    other_users: None, commands: Commands, image: Path
) -> None:
    commands.directory.chmod(0o755)
    assert commands.mount(image).returncode == 0
    assert {path.stat().st_mode & 0o777 for path in commands.runtime.glob("*/control")} == {0o600}
    refused = _as(commands, ALLOWED, "status", str(commands.mountpoint))
    assert refused.returncode == 2 and "a healfs mount, but not in" in refused.stderr


@pytest.mark.parametrize("uid", ["-1", "nobody", "4294967295"])
def test_what_is_no_uid(commands: Commands, image: Path, uid: str) -> None:
    done = commands.mount(image, f"--allow-uid={uid}")
    assert done.returncode == 2 and "--allow-uid" in done.stderr


def test_roots_mounts_are_found_without_a_word(
    other_users: None, commands: Commands, image: Path
) -> None:
    """In a mount namespace with a /run of its own: as root's mounts of every day."""
    commands.directory.chmod(0o755)
    words = [str(HEALFS), "mount", str(image), str(commands.mountpoint)]
    script = (
        "mount -t tmpfs none /run && mount -t tmpfs none /var/log && unset HEALFS_RUNTIME_DIR && "
        f"{shlex.join([*words, '--allow-uid', str(ALLOWED)])} && "
        f"setpriv --reuid={ALLOWED} --regid={ALLOWED} --clear-groups "
        f"{HEALFS} status {commands.mountpoint}; {HEALFS} umount {commands.mountpoint}"
    )
    # A pid namespace: with its first process all others end.
    apart = ("unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")
    done = commands.run(prefix=[*apart, "sh", "-c", script])
    assert done.returncode == 0, done.stderr
    assert "ready for" in done.stdout, done
