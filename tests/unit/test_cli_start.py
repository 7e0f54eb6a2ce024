"""`healfs mount` and the daemon that it starts: what it says, what ends it, what is left."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from healfs.cli import mount as mount_module
from healfs.control import mounts
from tests.unit.toy import DEADLINE, assert_refused, processes, run
from tests.unit.toy import runtime as runtime


def start_mount(tmp_path: Path, *options: str, source: str = "") -> subprocess.Popen[str]:
    (tmp_path / "m").mkdir()
    source = source or f"nbd+unix:///?socket={tmp_path}/absent"
    command = [sys.executable, "-m", "healfs.cli.main", "mount"]
    return subprocess.Popen(
        [*command, source, str(tmp_path / "m"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_while_modules_are_read_is_no_traceback(tmp_path: Path, ignored: bool) -> None:
    (tmp_path / "click.py").write_text("import os\nos.kill(os.getpid(), 2)\nraise SystemExit(7)")
    command = [sys.executable, "-c", "from healfs.cli.start import main; main()", "mount", "x"]
    done = subprocess.run(
        ["/bin/sh", "-c", "trap '' INT; exec \"$@\"", "sh", *command] if ignored else command,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (7 if ignored else -signal.SIGINT, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("options", [(), ("--foreground",)])
def test_what_ends_the_waiting_leaves_nothing(
    tmp_path: Path, runtime: Path, number: signal.Signals, options: tuple[str, ...]
) -> None:
    with start_mount(tmp_path, *options) as process:
        watchdog = threading.Timer(DEADLINE, process.kill)
        watchdog.start()
        assert process.stderr is not None
        line = process.stderr.readline()
        while not line.startswith("healfs: ") and line:  # the daemon's log, in the foreground
            line = process.stderr.readline()
        assert "Ctrl-C ends it" in line
        process.send_signal(number)
        output, errors = process.communicate(timeout=DEADLINE)
        watchdog.cancel()
    assert (process.returncode, output) == (130, "")
    assert "healfs: interrupted; nothing is mounted\n" in errors
    logs = "".join(path.read_text() for path in runtime.glob("log/*"))
    assert "Traceback" not in errors + logs
    nobody_left(runtime)


def nobody_left(runtime: Path) -> None:
    """No process with this runtime directory, but this one, within the deadline; no files."""
    until = time.monotonic() + DEADLINE
    while left := processes(runtime):
        assert time.monotonic() < until, left
        time.sleep(0.02)
    assert [entry.name for entry in runtime.iterdir() if entry.name != "log"] == []


def test_a_daemon_for_which_nobody_waits_ends(tmp_path: Path, runtime: Path) -> None:
    with start_mount(tmp_path) as process:
        assert process.stderr is not None and "Ctrl-C ends it" in process.stderr.readline()
        process.kill()
    nobody_left(runtime)


def test_what_it_waits_for_is_said_in_the_words_of_the_system(tmp_path: Path) -> None:
    with start_mount(tmp_path, source="nbd://127.0.0.1:1/") as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        process.kill()
    assert line == ("healfs: waiting for nbd://127.0.0.1:1/: Connection refused (Ctrl-C ends it)\n")


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_terminal_is_told_what_is_waited_for(tmp_path: Path, runtime: Path, term: str) -> None:
    """Under every name: rich reads markup where it can."""
    (tmp_path / "m").mkdir()
    source = f"nbd+unix:///?socket={tmp_path}/a\\[/b][red]"
    outer, inner = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "healfs.cli.main", "mount", source, str(tmp_path / "m")],
        stdout=inner,
        stderr=inner,
        env={**os.environ, "TERM": term, "COLUMNS": "1000"},
    )
    os.close(inner)
    watchdog = threading.Timer(DEADLINE, process.kill)
    watchdog.start()
    shown = b""
    try:
        while b"Ctrl-C ends it" not in shown:
            shown += os.read(outer, 65536)  # EIO when it has ended
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 130
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        os.close(outer)
    assert f"waiting for {source}".encode() in shown
    nobody_left(runtime)


def test_a_mount_that_waits_is_shown_and_umount_ends_it(tmp_path: Path, runtime: Path) -> None:
    at = str(tmp_path / "m")
    with start_mount(tmp_path) as process:
        try:
            assert process.stderr is not None and "Ctrl-C ends it" in process.stderr.readline()
            (row,) = json.loads(run("list", "--json").stdout)
            assert (row["mountpoint"], row["state"]) == (at, "waiting")
            for verb in "list", "status":
                assert "waiting" in run(verb).stdout
                assert "not mounted yet, it waits for nbd+unix:" in run(verb).stderr
            assert_refused(run("policy", at), "not mounted yet, it waits for", status=1)
            ended = run("umount", at)
            assert (ended.exit_code, ended.output) == (0, "")
            assert process.wait(DEADLINE) == 130
        finally:
            process.kill()
    nobody_left(runtime)


def a_daemon_that_says(monkeypatch: pytest.MonkeyPatch, script: str) -> list[Any]:
    """Returns the processes that `healfs mount` starts as its keeper."""
    start, keepers = subprocess.Popen, []

    def popen(command: list[str], **options: Any) -> Any:
        if command[0] != sys.executable:
            return start(command, **options)
        text = f"import sys; sys.stdin.read(); f = open({command[-1]}, 'w')\n{script}"
        keepers.append(start([sys.executable, "-c", text], **options))
        return keepers[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    return keepers


def test_a_second_signal_does_not_break_off_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes when the first was noticed, and before the end of the keeper has begun."""
    script = f"import os, signal, time; os.kill({os.getpid()}, {signal.SIGINT}); time.sleep(60)"
    keepers = a_daemon_that_says(monkeypatch, script)
    end = mount_module._end

    def interrupted(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        end(*arguments)

    monkeypatch.setattr(mount_module, "_end", interrupted)
    (tmp_path / "m").mkdir()
    try:
        result = run("mount", "a", tmp_path / "m")
        assert_refused(result, "interrupted; nothing is mounted", status=130)
        assert keepers[0].poll() == -signal.SIGTERM
    finally:
        keepers[0].kill()
        keepers[0].wait(DEADLINE)


READY = {"event": "ready", "file": "/m/disk.img", "notes": ["no\nlocks"], "write_log_off": "why"}


def test_what_the_backend_cannot_promise_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keepers = a_daemon_that_says(monkeypatch, f"print({json.dumps(READY)!r}, file=f)")
    (tmp_path / "m").mkdir()
    result = run("mount", "a", tmp_path / "m")
    keepers[0].wait(DEADLINE)
    assert (result.exit_code, result.stdout) == (0, "/m/disk.img\n")
    assert result.stderr == "healfs: no locks\nhealfs: no write log: why\n"


def test_the_path_that_is_printed_is_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = READY | {"file": os.fsdecode(b"/m\xff/disk.img"), "notes": []}
    keepers = a_daemon_that_says(monkeypatch, f"print({json.dumps(ready)!r}, file=f)")
    (tmp_path / "m").mkdir()
    result = run("mount", "a", tmp_path / "m")
    keepers[0].wait(DEADLINE)
    assert (result.exit_code, result.stdout_bytes) == (0, b"/m\xff/disk.img\n")


REFUSAL = {"event": "error", "message": "no\nway", "status": 2}


@pytest.mark.parametrize(
    ("script", "words", "status"),
    [
        (f"print({json.dumps(REFUSAL)!r}, file=f)", "no way", 2),
        ("raise SystemExit(3)", "the daemon died; see ", 1),
        ("print('garbage', file=f)", "the daemon died; see ", 1),
    ],
)
def test_a_daemon_that_does_not_come_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str, status: int
) -> None:
    (tmp_path / "m").mkdir()
    a_daemon_that_says(monkeypatch, script)
    assert_refused(run("mount", "a", tmp_path / "m"), words, status=status)


def test_the_socket_module_is_what_limits_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = tmp_path / ("x" * 100)
    monkeypatch.setenv("HEALFS_RUNTIME_DIR", str(longest))
    with pytest.raises(mounts.MountsError, match="too long"):
        mounts.claim("/mnt")
    with socket.socket(socket.AF_UNIX) as probe, pytest.raises(OSError, match="too long"):
        probe.bind(str(longest / "control"))
