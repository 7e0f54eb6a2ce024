"""`make install` as an administrator or a packager uses it: what it lays, and that this runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from healfs import __version__
from tests.fuse.commands import Commands
from tests.mounts import ROOT

SECONDS = 300  # pip builds the wheels that it has not in its cache
PREFIX = "usr/local"


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    directory = tmp_path_factory.mktemp("stage")
    _make("install", directory)
    yield directory


def _make(target: str, stage: Path) -> None:
    done = subprocess.run(
        ["make", "-s", target, f"DESTDIR={stage}", f"PREFIX=/{PREFIX}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr


def _laid(stage: Path) -> set[str]:
    """The files, without the inside of the virtual environment."""
    files = [path.relative_to(stage) for path in stage.rglob("*") if not path.is_dir()]
    return {str(file) for file in files if not file.is_relative_to(f"{PREFIX}/lib/healfs")}


@pytest.mark.timeout(SECONDS)
def test_what_it_lays(stage: Path) -> None:
    pages = {page.stem for page in (ROOT / "man").glob("*.scd")}
    assert _laid(stage) == {f"{PREFIX}/share/man/man{page[-1]}/{page}" for page in pages} | {
        f"{PREFIX}/bin/healfs",
        f"{PREFIX}/lib/systemd/system/healfs@.service",
    }
    assert (stage / "etc/healfs").is_dir()
    # Packed up and laid elsewhere, it must run there.
    named = subprocess.run(["grep", "-rlF", stage, stage], capture_output=True, text=True)
    assert named.stdout == ""
    others = [p for p in stage.rglob("*") if not p.is_symlink() and p.stat().st_mode & 0o022]
    assert others == []


def test_the_installed_command_mounts(
    stage: Path, commands: Commands, image: Path, tmp_path: Path
) -> None:
    healfs = stage / PREFIX / "bin/healfs"
    other = tmp_path / "healfs/__init__.py"  # of whoever owns the directory that one is in
    other.parent.mkdir()
    other.write_text("raise SystemExit('the wrong healfs')")

    def run(*arguments: str | Path) -> str:
        done = subprocess.run(
            [healfs, *arguments],
            cwd=tmp_path,
            env=commands.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--version") == f"healfs {__version__}\n"
    assert run("mount", image, commands.mountpoint) == f"{commands.file}\n"
    for pid in commands.processes():
        mapped = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]
        assert mapped == str(stage / PREFIX / "lib/healfs/bin/python")
    run("umount", commands.mountpoint)
    commands.nothing_left()


def test_systemd_accepts_the_unit(stage: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    unit = (stage / PREFIX / "lib/systemd/system/healfs@.service").read_text()
    assert f"ExecStart=/{PREFIX}/bin/healfs mount --foreground" in unit
    placed = tmp_path / "healfs@.service"
    placed.write_text(unit.replace(f"/{PREFIX}/bin", f"{stage}/{PREFIX}/bin"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", placed],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_uninstall_leaves_what_the_administrator_wrote(stage: Path, tmp_path: Path) -> None:
    copy = tmp_path / "stage"
    shutil.copytree(stage, copy, symlinks=True)
    (copy / "etc/healfs/vm1.env").write_text("SOURCE=/dev/null\n")
    _make("uninstall", copy)
    assert _laid(copy) == {"etc/healfs/vm1.env"}
    assert not (copy / PREFIX / "lib/healfs").exists()
    os.unlink(copy / "etc/healfs/vm1.env")
    _make("uninstall", copy)
    assert not (copy / "etc/healfs").exists()
