"""A mount that a configuration file describes: by --config, by name, after a worker's death."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from tests.fuse.commands import Commands
from tests.mounts import HEALFS


def _configuration(commands: Commands, image: Path, path: Path, *lines: str) -> Path:
    own = [f'source = "{image}"', f'mountpoint = "{commands.mountpoint}"']
    path.write_text("\n".join([*own, *lines, ""]))
    return path


def _origins(commands: Commands) -> dict[str, tuple[object, str]]:
    values = commands.status()["configuration"]["values"]
    return {name: (one["value"], one["from"]) for name, one in values.items()}


def test_a_file_and_options_and_defaults_and_a_change(
    commands: Commands, image: Path, tmp_path: Path
) -> None:
    lines = ('werror = "stop"', 'slow-after = "7s"', 'log-size = "8M"', "allow-uid = [1, 2]")
    file = _configuration(commands, image, tmp_path / "vm1.toml", *lines)
    done = commands.run("mount", "--config", file, "--log-size", "16M")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{commands.file}\n", "")
    policy = ("policy", commands.mountpoint, "--read-retry-timeout", "2m")
    assert commands.run(*policy).returncode == 0
    for _ in range(2):
        came = _origins(commands)
        assert came["werror"] == ("stop", "file")
        assert came["slow_after"] == (7.0, "file") and commands.status()["slow_after"] == 7
        assert came["allow_uid"] == ([1, 2], "file")
        assert came["log_size"] == (16 << 20, "option")
        assert came["read_retry_timeout"] == (120.0, "healfs policy")
        assert came["rerror"] == ("retry", "default")
        assert commands.status()["configuration"]["file"] == str(file)
        text = " ".join(commands.run("status", commands.mountpoint).stdout.split())
        for words in (
            f"werror = stop ({file})",
            f"slow-after = 7s ({file})",
            f"allow-uid = 1, 2 ({file})",
            "log-size = 16 MiB (command line)",
            "read-retry-timeout = 2m (healfs policy)",
        ):
            assert words.replace(" ", "") in text.replace(" ", ""), text  # paths are folded
        assert "rerror = " not in text
        commands.kill_worker()
    # The file is read at the mount; what becomes of it then changes nothing.
    file.unlink()
    assert _origins(commands)["werror"] == ("stop", "file")
    assert commands.run("umount", commands.mountpoint).returncode == 0


def test_a_name_is_a_file_in_etc(commands: Commands, image: Path, tmp_path: Path) -> None:
    """In a mount namespace: the host's own /etc/healfs is left alone."""
    etc = tmp_path / "etc"
    etc.mkdir()
    _configuration(commands, image, etc / "vm-1.toml", "read-only = true", 'name = "vm.raw"')
    copy = tmp_path / "copy"
    copy.mkdir()
    at, healfs = commands.mountpoint, str(HEALFS)
    script = " && ".join(
        [
            # Copied: /etc/healfs need not be there, and is not made in the host's.
            f"cp -a /etc {copy} && mkdir -p {copy}/etc/healfs && mount --bind {copy}/etc /etc",
            f"mount --bind {shlex.quote(str(etc))} /etc/healfs",
            f"{healfs} mount vm-1",
            f"{healfs} status {at} --json",
            f"{healfs} umount {at}",
            # A unit is started again and again: the second mount is as good as the first.
            f"{healfs} mount vm-1",
            f"{healfs} umount {at}",
        ]
    )
    done = commands.run(prefix=["unshare", "--mount", "sh", "-c", script])
    assert done.returncode == 0, done.stderr
    first, rest = done.stdout.split("\n", 1)
    status, _, second = rest.rpartition("}\n")
    assert first + "\n" == second == f"{at}/vm.raw\n"
    configuration = json.loads(status + "}")["configuration"]
    assert configuration["file"] == "/etc/healfs/vm-1.toml"
    assert configuration["values"]["read_only"] == {"value": True, "from": "file"}
    assert configuration["values"]["name"] == {"value": "vm.raw", "from": "file"}
    commands.nothing_left()


def test_a_disk_is_created_on_the_command_line_once(commands: Commands, tmp_path: Path) -> None:
    disk = tmp_path / "new.img"
    file = _configuration(commands, disk, tmp_path / "vm1.toml")
    for options, status in ((("--create", "1M"), 0), ((), 0), (("--create", "1M"), 2)):
        done = commands.run("mount", "--config", file, *options)
        assert done.returncode == status, done.stderr
        if not status:
            assert commands.run("umount", commands.mountpoint).returncode == 0
    assert disk.stat().st_size == 1 << 20
    disk.unlink()
    done = commands.run("mount", "--config", file)
    assert done.returncode == 2 and "no such file" in done.stderr and not disk.exists()
