"""What people are shown: in 80 columns, without colour when piped, and nothing cut off."""

from __future__ import annotations

import functools
import json
import os
import pty
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from healfs.cli.main import VERBS, main
from healfs.control import mounts
from healfs.core.policy import Policy
from healfs.doctor import host
from healfs.events import History
from tests.mounts import HEALFS
from tests.unit.test_cli import FULL, Daemon, run

LONG = "q" * 150
SOURCE = "nbd://h/" + "x" * 200
VALUES = {
    "configuration": {
        "file": f"/etc/healfs/{LONG}.toml",
        "values": {
            "slow_after": {"value": 7.0, "from": "option"},
            "read_retry_timeout": {"value": 300.0, "from": "healfs policy"},
            "log_size": {"value": 64 << 20, "from": "file"},
            "log_entries": {"value": 16384, "from": "option"},
            "name": {"value": LONG, "from": "option"},
            "read_only": {"value": True, "from": "option"},
        },
    },
    "limits": {
        "payload_overflow_bytes": {"used": 0, "limit": 68718428160},
        "worker_silence_seconds": {"limit": 30.0},
        "failed_retries_per_second": {"limit": 100},
        "in_flight": {"used": 1, "limit": 64},
        "older": {"limit": None},
    },
}


@pytest.fixture(autouse=True)
def mountpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A disk with much to tell, whose names are all too long for a line."""
    monkeypatch.setenv("HEALFS_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("COLUMNS", raising=False)
    directory = tmp_path / LONG
    directory.mkdir()
    daemon = Daemon(str(directory))
    daemon.mount = daemon.claim.record(
        mountpoint=str(directory),
        file=f"{directory}/disk.img",
        source=SOURCE,
        keeper=daemon.process.pid,
        worker=0,
        log=f"/var/log/healfs/{LONG}.log",
    )
    daemon.status |= FULL | VALUES | {"mountpoint": str(directory), "source": SOURCE}
    history = History(mounts.events_path(str(directory)))
    history.add("HEALFS_OUTAGE", {"kind": "away", "reason": LONG}, 0.0)
    changes = {"from": Policy().as_dict(), "to": Policy().change({"retry_timeout": 3600}).as_dict()}
    history.add("HEALFS_POLICY_CHANGED", {"uid": 0, "pid": 7, **changes}, 0.0)
    daemon.start()
    yield str(directory)
    daemon.close()


TABLES = ["list", "status", "status M", "policy M", "events M", "doctor", "doctor M"]
WHOLE = {"list": SOURCE, "status": SOURCE, "status M": SOURCE, "events M": LONG}


@pytest.mark.parametrize("command", TABLES)
def test_a_table_fits_and_nothing_of_it_is_cut(command: str, mountpoint: str) -> None:
    text = run(*command.replace("M", mountpoint).split()).stdout
    # The doctor's lines to paste follow its table.
    table = text.partition("\n\n")[0] if command.startswith("doctor") else text
    assert max(map(len, table.splitlines())) <= 80
    assert "\x1b" not in text and "…" not in text
    for letter in set(WHOLE.get(command, "")) & set("qx"):
        assert text.count(letter) >= WHOLE[command].count(letter)


@pytest.mark.parametrize("verb", VERBS)
def test_a_help_fits(verb: str) -> None:
    context = click.Context(main, info_name="healfs", **main.context_settings)
    command = main.get_command(context, verb)
    assert command is not None
    text = command.get_help(click.Context(command, info_name=verb, parent=context))
    assert max(map(len, text.splitlines())) <= 80 and "\x1b" not in text


def test_each_verb_is_told_in_one_line() -> None:
    lines = run("--help").stdout.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == [*VERBS]
    assert max(map(len, lines)) <= 80 and not any(line.endswith("...") for line in lines)


def test_a_terminal_gets_colour_and_a_pipe_none(mountpoint: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color"}
    for terminal in (True, False):
        outer, inner = pty.openpty() if terminal else os.pipe()
        with subprocess.Popen([HEALFS, "list"], stdout=inner, env=environment) as process:
            os.close(inner)
            assert (b"\x1b[" in os.read(outer, 65536)) is terminal
            process.wait(30)
        os.close(outer)


def test_values_are_written_as_they_would_be_given(mountpoint: str) -> None:
    lines = " ".join(run("status", mountpoint).stdout.split())
    for said in (
        "slow-after = 7s (command line)",
        "read-retry-timeout = 5m (healfs policy)",
        "log-size = 64 MiB",
        "log-entries = 16384",
        "read-only = true",
        "payload overflow: 0 B of 64 GiB",
        "worker silence: 30s",
        "failed retries per second: 100",
        "in flight: 1 of 64",
        "older: ?",
    ):
        assert said in lines
    assert "read retry timeout 0 -> 1h" in " ".join(run("events", mountpoint).stdout.split())


def test_what_the_doctor_has_to_be_pasted_is_not_broken(mountpoint: str) -> None:
    lines = run("doctor", mountpoint).stdout.splitlines()
    mends = [finding["mend"] for finding in json.loads(run("doctor", "--json", mountpoint).stdout)]
    assert {*mends} <= {"", *lines} and max(map(len, mends)) > 80


def test_a_mount_says_itself_whether_its_memory_is_locked(
    mountpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of who asks the doctor is not that of who mounted, nor the log the default."""
    user = functools.partial(host.Host, uid=1000, memlock=8 << 20)
    monkeypatch.setattr(host, "Host", user)
    assert "default --log-size" in run("doctor", "--json").stdout
    assert "default --log-size" not in run("doctor", "--json", mountpoint).stdout


def test_list_leaves_the_file_to_json(mountpoint: str) -> None:
    assert run("list").stdout.split()[:5] == ["MOUNTPOINT", "SOURCE", "KEEPER", "VERSION", "STATE"]
    [row] = json.loads(run("list", "--json").stdout)
    assert row["file"] == f"{mountpoint}/disk.img"


@pytest.mark.parametrize(("charset", "shown"), [("utf-8", b"m\xc3\xa4?"), ("ascii", b"m??")])
@pytest.mark.parametrize("command", ["list", "status", "status M", "policy M", "events M"])
def test_a_name_without_letters_is_no_traceback(
    tmp_path: Path, command: str, charset: str, shown: bytes
) -> None:
    """Not every locale of UTF-8 takes bytes that are no text, nor any other one all letters."""
    directory = tmp_path / os.fsdecode(b"m\xc3\xa4\xff")
    directory.mkdir()
    daemon = Daemon(str(directory))
    daemon.status |= FULL | {"mountpoint": str(directory), "file": str(directory / "disk.img")}
    History(mounts.events_path(str(directory))).add("HEALFS_MOUNTED", {"source": str(directory)}, 0)
    daemon.start()
    try:
        arguments = command.replace("M", str(directory)).split()
        result = CliRunner(charset=charset).invoke(main, arguments, prog_name="healfs")
        assert result.exit_code == 0, result.exception
        printed = b"".join(result.stdout_bytes.split())
        assert (shown in printed) is (command != "policy M")
    finally:
        daemon.close()
