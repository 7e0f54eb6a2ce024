"""The write log's memory is locked where that is allowed, and status says where it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fuse.commands import Commands

# Root without CAP_IPC_LOCK is an ordinary user here.
EIGHT_MEBIBYTES = ("setpriv", "--bounding-set", "-ipc_lock", "prlimit", f"--memlock={8 << 20}")


def _mounted(commands: Commands, image: Path, *options: str, **how: Any) -> tuple[list[str], int]:
    """The notes of status, and how many bytes the worker has locked."""
    done = commands.mount(image, *options, **how)
    assert done.returncode == 0, done.stderr
    status = json.loads(commands.run("status", commands.mountpoint, "--json").stdout)
    fields = Path(f"/proc/{status['pids']['worker']}/status").read_text()
    locked = next(line for line in fields.splitlines() if line.startswith("VmLck:"))
    return status["notes"], int(locked.split()[1]) << 10


def test_root_locks_it(commands: Commands, image: Path) -> None:
    notes, locked = _mounted(commands, image)
    assert locked >= 64 << 20 and not notes


@pytest.mark.parametrize(("size", "fits"), [("64M", False), ("4M", True)])
def test_a_user_locks_what_fits(commands: Commands, image: Path, size: str, fits: bool) -> None:
    notes, locked = _mounted(commands, image, "--log-size", size, prefix=EIGHT_MEBIBYTES)
    if fits:
        assert locked >= 4 << 20 and not notes
        return
    assert locked < 64 << 20
    (note,) = notes
    assert "RLIMIT_MEMLOCK is 8 MiB" in note and "65" in note and "ulimit -l" in note
