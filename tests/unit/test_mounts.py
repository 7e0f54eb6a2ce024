"""What the kernel and the run-time directory say of mounts."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest

from healfs.control import mounts
from healfs.fuse import mount

# One mount whose name has a carriage return, which the kernel does not escape, before ours.
TABLE = (
    "90 1 0:50 / /tmp/m\rx rw - tmpfs none rw\n"
    "91 1 0:51 / /mnt/vm\\0401 rw,nosuid - fuse.healfs nbd://nas rw\n"
)


def test_a_name_with_a_carriage_return_hides_no_mount(monkeypatch: pytest.MonkeyPatch) -> None:
    def table(path: str, **options: Any) -> io.StringIO:
        assert path == "/proc/self/mountinfo"
        return io.StringIO(TABLE, newline=options["newline"])

    monkeypatch.setattr(mount, "open", table, raising=False)
    assert mount.connection_of("/mnt/vm 1") == 51
    assert mount.connection_of("/tmp/m") is None
    assert mount.is_mounted("/mnt/vm 1") and not mount.is_mounted("/tmp/m")


def test_a_run_time_directory_that_is_full_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEALFS_RUNTIME_DIR", str(tmp_path / "run"))
    made, private = [], mounts._private

    def full(path: Path) -> Path:
        made.append(path)
        if len(made) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return private(path)

    monkeypatch.setattr(mounts, "_private", full)
    with pytest.raises(mounts.MountsError, match="No space left on device; set HEALFS_RUNTIME_DIR"):
        mounts.claim("/mnt/vm1")


@pytest.mark.parametrize(
    ("uid", "ours", "word"), [(0, "", "HEALFS"), (7, "", "XDG"), (7, "x", "HEALFS")]
)
def test_the_variable_that_is_named_is_the_one_that_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uid: int, ours: str, word: str
) -> None:
    """root's directory, and that of HEALFS_RUNTIME_DIR, is not where XDG_RUNTIME_DIR says."""
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(mounts, "_ROOTS", tmp_path / "x")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("HEALFS_RUNTIME_DIR", ours and str(tmp_path / ours))
    (tmp_path / "x").write_text("")
    (tmp_path / "healfs").write_text("")
    with pytest.raises(mounts.MountsError, match=f"set {word}_RUNTIME_DIR"):
        mounts.claim("/mnt/vm1")


def test_an_empty_runtime_directory_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("HEALFS_RUNTIME_DIR", "")
    assert mounts.events_path("/m").parent == Path("/run/healfs/events")
    assert mounts.log_path("/m").parent == Path("/var/log/healfs")


@pytest.mark.parametrize("home", [None, "", "rel"])
def test_a_log_never_lies_where_one_happens_to_be(
    monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    """Without HOME and passwd(5), or with relative paths, which XDG says are to be ignored."""
    for name in ("HEALFS_RUNTIME_DIR", "HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    if home is not None:
        for name in ("HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR"):
            monkeypatch.setenv(name, home)
    monkeypatch.setattr(os, "geteuid", lambda: 4294960001)
    monkeypatch.setattr(os, "getuid", lambda: 4294960001)  # whom expanduser asks passwd for
    path = mounts.log_path("/mnt/vm1")
    assert path.is_absolute() and "~" not in path.parts
    assert mounts.events_path("/mnt/vm1").is_absolute()


def test_xdg_state_home_is_where_a_user_has_his_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEALFS_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/home/u/state")
    assert str(mounts.log_path("/m").parent) == "/home/u/state/healfs"


@pytest.mark.parametrize(
    "name", ["\U0001f600" * 63, "ä" * 127, os.fsdecode(b"\xff" * 255), "a" * 255]
)
def test_a_long_name_makes_no_file_name_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("HEALFS_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "log").mkdir()
    (tmp_path / "events").mkdir()
    for path in mounts.log_path(f"/mnt/{name}"), mounts.events_path(f"/mnt/{name}"):
        path.with_suffix(".log.1").touch()
        assert name[-1] in path.name
    assert "\udc9f" not in mounts.log_path(f"/mnt/{name}").name


def test_fusermount3_names_mountpoints_that_are_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fusermount = tmp_path / "fusermount3"
    fusermount.write_bytes(b"#!/bin/sh\necho '/mnt/b\xffd: busy' >&2\nexit 1\n")
    fusermount.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert mount._fusermount("x", environment={}) == (1, "/mnt/b\udcffd: busy")
