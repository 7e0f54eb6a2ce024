"""`make install` as an administrator or a packager uses it: what it lays, and that this runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from healfs import __version__
from healfs.cli.main import VERBS
from healfs.control import mounts
from tests.docs.test_man import ALIASES
from tests.fuse.commands import Commands
from tests.mounts import ROOT

SECONDS = 1800  # pip builds the wheels that it has not in its cache
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
        env=os.environ | {"CFLAGS": "-O0"},  # compiling for speed takes most of the time
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
    pages = {page.stem for page in (ROOT / "man").glob("*.scd")} | {*ALIASES}
    assert _laid(stage) == {
        f"{PREFIX}/bin/healfs",
        f"{PREFIX}/lib/systemd/system/healfs@.service",
        f"{PREFIX}/share/bash-completion/completions/healfs",
        f"{PREFIX}/share/zsh/site-functions/_healfs",
        f"{PREFIX}/share/fish/vendor_completions.d/healfs.fish",
        *(f"{PREFIX}/share/man/man{page[-1]}/{page}" for page in pages),
    }
    assert (stage / "etc/healfs").is_dir()
    # Packed up and laid elsewhere, it must run there.
    named = subprocess.run(["grep", "-rlF", stage, stage], capture_output=True, text=True)
    assert named.stdout == ""
    others = [p for p in stage.rglob("*") if not p.is_symlink() and p.stat().st_mode & 0o022]
    assert others == []


@pytest.mark.parametrize("name", [*(f"healfs-{verb}" for verb in VERBS), "healfs@.service"])
def test_man_finds_each_verb(stage: Path, name: str) -> None:
    if shutil.which("man") is None:
        pytest.skip("needs man")
    pages = stage / PREFIX / "share/man"
    done = subprocess.run(
        ["man", "-M", pages, "-P", "cat", name], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0 and "NAME" in done.stdout, done.stderr
    verb = name.removeprefix("healfs-").upper()
    assert f"\nHEALFS {verb}\n" in done.stdout or name == "healfs@.service"


BASH = """
source {share}/bash-completion/completions/healfs
COMP_WORDS=({words} "{typed}") COMP_CWORD={count}
_healfs_completion healfs
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
FISH = 'source {share}/fish/vendor_completions.d/healfs.fish; complete -C "{words} {typed}"'
# zpty: a terminal, for zsh completes where somebody types only. The menu goes to it as well.
ZSH = """
zmodload zsh/zpty
zpty z 'stty -echo columns 200; TERM=dumb zsh -f -i'
zpty -w z 'PS1=; fpath=({share}/zsh/site-functions $fpath); autoload -U compinit; compinit -u -D'
zpty -w z 'LISTMAX=999; print rea""dy'
zpty -r -m z line '*ready*'
zpty -w -n z $'{words} {typed}\\t\\t'
zpty -r -m z line '*{wanted}*' && print -r -- $line
zpty -d z
"""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("words", "typed", "wanted"),
    [
        ("healfs", "recon", "reconnect"),
        ("healfs status", "/", "/srv/vm-one"),
        ("healfs upgrade", "/", "/srv/vm-one"),
    ],
    ids=["verb", "mountpoint", "upgrade"],
)
def test_the_shells_complete(
    stage: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shell: str,
    words: str,
    typed: str,
    wanted: str,
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    monkeypatch.setenv("HEALFS_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    mounts.claim("/srv/vm-one").record(
        mountpoint="/srv/vm-one",
        file="/srv/vm-one/disk.img",
        source="nbd://nas/",
        keeper=1,
        worker=1,
        log="/var/log/healfs/vm-one.log",
    )
    script = {"bash": BASH, "zsh": ZSH, "fish": FISH}[shell].format(
        share=stage / PREFIX / "share",
        words=words,
        typed=typed,
        wanted=wanted,
        count=len(words.split()),
    )
    environment = os.environ | {
        "PATH": f"{stage / PREFIX / 'bin'}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        [shell, "-c", script], env=environment, capture_output=True, text=True, timeout=240
    )
    assert wanted in done.stdout, done


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
            timeout=240,
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
        timeout=240,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_uninstall_leaves_what_the_administrator_wrote(stage: Path, tmp_path: Path) -> None:
    copy = tmp_path / "stage"
    shutil.copytree(stage, copy, symlinks=True)
    (copy / "etc/healfs/vm1.toml").write_text('source = "/dev/null"\n')
    _make("uninstall", copy)
    assert _laid(copy) == {"etc/healfs/vm1.toml"}
    assert not (copy / PREFIX / "lib/healfs").exists()
    os.unlink(copy / "etc/healfs/vm1.toml")
    _make("uninstall", copy)
    assert not (copy / "etc/healfs").exists()
