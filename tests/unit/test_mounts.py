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
    with pytest.raises(mounts.MountsError, match="No space left on device; set XDG_RUNTIME_DIR"):
        mounts.claim("/mnt/vm1")
