"""The fence as a command: how it ends, what it may leave behind, and what is killed."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from healfs.daemon import fencing
from tests.backends.nbd_servers import wait_until

DEADLINE = 120.0


async def run(command: str) -> str:
    with trio.fail_after(DEADLINE):
        return await fencing.run(command, "nbd://nas", {"export": "disk", "minimum-block": "1"})


async def test_it_knows_whose_connections_are_to_be_cut() -> None:
    assert await run('test "$HEALFS_SOURCE $HEALFS_IDENTITY_EXPORT" = "nbd://nas disk"') == ""
    assert await run('test "$HEALFS_IDENTITY_MINIMUM_BLOCK" = 1') == ""


async def test_what_it_says_when_it_fails() -> None:
    assert await run("echo no  such switch >&2; exit 3") == "it ended with status 3: no such switch"
    assert await run("exit 4") == "it ended with status 4"
    long = await run("yes no | head -c 1000000 >&2; exit 5")
    assert long.startswith("it ended with status 5: no no no") and len(long) < 300


async def test_what_it_leaves_running_is_not_waited_for(tmp_path: Path) -> None:
    """As ssh with ControlPersist: that one has its standard error to the end of its life."""
    pid = tmp_path / "pid"
    try:
        assert await run(f"sleep 1000 & echo $! > {pid}; exit 0") == ""
        assert await run(f"sleep 1000 & echo $! >> {pid}; echo no >&2; exit 1") == (
            "it ended with status 1: no"
        )
    finally:
        for each in pid.read_text().split():
            await trio.run_process(["kill", each])


async def test_what_takes_too_long_is_killed_with_all_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "pid"
    monkeypatch.setattr(fencing, "FENCE_SECONDS", 5.0)
    assert await run(f"sleep 1000 & echo $! > {pid}; wait") == "it took longer than 5 s"
    child = int(pid.read_text())
    wait_until(lambda: _has_ended(child), "the end of what it has started", DEADLINE)


def _has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].startswith("Z")
    except OSError:
        return True
