"""The configuration file: what it sets, what goes before what, and what is refused, by line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from healfs.cli import config_file
from healfs.cli import mount as mount_module
from healfs.cli.main import main
from healfs.config import MountConfig
from healfs.core.policy import Action

PAGE = Path(__file__).parents[2] / "man/healfs.toml.5.scd"

Mount = Callable[..., tuple[Result, list[MountConfig]]]


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mount:
    """`healfs mount` as far as the keeper's start: the result, and what would be mounted."""
    monkeypatch.setattr(config_file, "DIRECTORY", tmp_path)
    (tmp_path / "mnt").mkdir()

    def run(*arguments: str) -> tuple[Result, list[MountConfig]]:
        started: list[MountConfig] = []
        with monkeypatch.context() as patched:
            patched.setattr(mount_module, "_run", started.append)
            patched.setattr(mount_module, "_check_host", lambda config: None)
            result = CliRunner().invoke(main, ["mount", *arguments], prog_name="healfs")
        return result, started

    return run


def write(tmp_path: Path, *lines: str, name: str = "vm1") -> Path:
    path = tmp_path / f"{name}.toml"
    own = ['source = "nbd://nas/vm1"', f'mountpoint = "{tmp_path}/mnt"']
    path.write_text("\n".join([*own, *lines, ""]))
    return path


def test_every_kind_of_value(tmp_path: Path, mount: Mount) -> None:
    write(
        tmp_path,
        'retry-interval = "200ms"',
        "retry-timeout = 0",
        'werror = "stop"',
        "allow-other = true",
        'log-size = "128M"',
        "log-entries = 2048",
        "settle = '7s'",
        "allow-uid = [107, 1000]",
    )
    result, (config,) = mount("vm1")
    assert result.exit_code == 0, result.output
    assert (config.source, config.mountpoint) == ("nbd://nas/vm1", f"{tmp_path}/mnt")
    assert config.policy.read.retry_interval == 0.2
    assert config.policy.write.error is Action.STOP
    assert config.allow_uid == (107, 1000)
    assert (config.allow_other, config.read_only) == (True, False)
    assert (config.log_size, config.log_entries, config.settle) == (128 << 20, 2048, 7.0)


def test_option_before_file_before_default(tmp_path: Path, mount: Mount) -> None:
    path = write(tmp_path, 'retry-interval = "3s"', 'name = "file.img"', 'read-retry-timeout="9s"')
    result, (config,) = mount("--config", str(path), "--name", "option.img", "--retry-timeout=1m")
    assert result.exit_code == 0, result.output
    assert config.name == "option.img"
    # The command line's --retry-timeout is for both directions.
    assert config.policy.read.retry_timeout == config.policy.write.retry_timeout == 60
    assert config.configuration["file"] == str(path)
    came = {name: value["from"] for name, value in config.configuration["values"].items()}
    assert came["name"] == "option"
    assert came["read_retry_interval"] == came["write_retry_interval"] == "file"
    assert came["read_retry_timeout"] == came["write_retry_timeout"] == "option"
    assert came["werror"] == came["log_size"] == "default"
    assert config.configuration["values"]["read_retry_interval"]["value"] == 3.0


def test_source_and_mountpoint_need_no_file(tmp_path: Path, mount: Mount) -> None:
    _, (config,) = mount("nbd://nas/", str(tmp_path / "mnt"), "--werror", "report")
    assert config.configuration["file"] is None
    assert config.configuration["values"]["werror"] == {"value": "report", "from": "option"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["", "retry_interval = '1s'"], "4: retry_interval: unknown key; did you mean retry-inter"),
        (["[policy]", "rerror = 'stop'"], "3: policy: unknown key; healfs.toml(5) has the keys"),
        (["policy.rerror = 'stop'"], "3: policy: unknown key"),
        (["config = 'x'"], "3: config: not in a file"),
        (["create = '16M'"], "3: create: not in a file, which is read at each mount; create the"),
        (["settle = '3x'"], "3: settle: '3x' is not a duration"),
        (["settle = 3"], "3: settle: '3' is not a duration"),
        (["read-only = 'yes'"], "3: read-only: true or false is expected"),
        (["rerror = true"], "3: rerror: no bool is expected"),
        (["rerror = 'enospc'"], "3: rerror: 'enospc' is not one of"),
        (["werror = ['stop']"], "3: werror: write a string or a number"),
        (["log-entries = 1.5"], "3: log-entries: write a string or a number"),
        (["fault = 'drill.toml'"], "3: fault: drill.toml: write an absolute path"),
        (["fault = 'file://drill.toml'"], "3: fault: file://drill.toml: write an absolute path"),
        (["fence = 'a\\u0000b'".replace("'", '"')], "3: fence: a NUL character is in it"),
        (["allow-uid = 7"], "3: allow-uid: write a list, such as [107]"),
        (["allow-uid = [true]"], "3: allow-uid: no bool is expected"),
        (["allow-uid = ['x']"], "3: allow-uid: 'x' is not a valid number of a user"),
        (["allow-uid = [-1]"], "3: allow-uid: -1 is not in the range"),
        (["log-entries = " + "1" * 5000], "vm1.toml: Exceeds the limit"),
        (["log-entries = 0x" + "1" * 5000], "3: log-entries: the number is too large"),
        (["allow-uid = [0x" + "1" * 5000 + "]"], "3: allow-uid: the number is too large"),
        (["x = "], "Invalid value (at line 3, column 5)"),
        (["a" * (1 << 20)], "longer than 1048576 bytes"),
        (["[" * 100_000], "vm1.toml:"),
    ],
)
def test_what_is_refused_names_the_line(
    tmp_path: Path, mount: Mount, lines: list[str], message: str
) -> None:
    path = write(tmp_path, *lines)
    result, started = mount("vm1")
    assert (result.exit_code, started) == (2, []), result.output
    assert str(path) in result.stderr and message in result.stderr
    assert result.stderr.startswith("healfs: ") and result.stderr.count("\n") == 1


def test_what_is_missing_or_too_much(tmp_path: Path, mount: Mount) -> None:
    path = write(tmp_path)
    (tmp_path / "bare.toml").write_text('source = "/dev/sdx"\n')
    (tmp_path / "latin.toml").write_bytes(b'source = "\xe4"\n')
    for arguments, words in (
        ([], "give SOURCE and MOUNTPOINT, or the NAME"),
        (["vm2"], "vm2.toml: no such file"),
        (["../vm1"], "no MOUNTPOINT is given"),
        (["bare"], "no mountpoint; add a line"),
        (["latin"], "not UTF-8"),
        (["--config", str(tmp_path)], "Is a directory"),
        (["--config", str(path), "more"], "give no more than options"),
    ):
        result, started = mount(*arguments)
        assert (result.exit_code, started) == (2, []), arguments
        assert words in result.stderr and result.stderr.count("\n") == 1


def test_the_page_has_every_key_and_no_other() -> None:
    keys = dict(config_file.keys(mount_module.mount))
    text = PAGE.read_text().split("# KEYS")[1].split("# EXAMPLE")[0]
    assert set(re.findall(r"\*([a-z-]+)\*", text)) == set(keys)
    assert all(isinstance(key, click.Parameter) for key in keys.values())


def test_the_pages_example_is_one(tmp_path: Path, mount: Mount) -> None:
    example = PAGE.read_text().split("```")[1].replace("/srv/healfs/vm1", f"{tmp_path}/mnt")
    (tmp_path / "example.toml").write_text(example)
    result, (config,) = mount("example")
    assert result.exit_code == 0, result.output
    assert config.policy.write.then is Action.STOP and config.policy.read.retry_timeout == 600
