"""When the keeper starts the next worker."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from healfs.control import mounts
from healfs.daemon import keeper
from healfs.daemon.children import FAULTED, Child
from healfs.daemon.keeper import Keeper


class Ended:
    """A worker that has ended."""

    pid = 1

    def __init__(self, status: int) -> None:
        self.reap = lambda: status


@pytest.fixture
def kept(capsys: pytest.CaptureFixture[str]) -> Keeper:
    """Of a mount that a successor can have."""
    one = Keeper({"mountpoint": "/nowhere", "source": "disk", "name": "disk.img"}, "{}", -1)
    one.fuse, one.init, one.resend = 1000, "00", True
    one.happened = lambda *_: None  # type: ignore[method-assign]
    one._record = lambda: None  # type: ignore[method-assign]
    one.died = 0.0
    return one


def _ends(one: Keeper, status: int, *, answered: bool, lived: float) -> float:
    """A worker ends; the seconds until the next one is started."""
    one.worker = Ended(status)  # type: ignore[assignment]
    now = time.monotonic()
    one.alive, one.started = answered, now - lived
    assert one._worker_ended(now) is None
    return max(0.0, one.start_at - now)


def _pauses(one: Keeper, *ends: dict[str, Any]) -> list[float]:
    return [round(_ends(one, **end), 1) for end in ends]


@pytest.mark.parametrize("status", [FAULTED, 1, -signal.SIGSEGV])
@pytest.mark.parametrize("answered", [False, True])
def test_who_fails_again_and_again_by_itself_is_not_hammered(
    kept: Keeper, status: int, answered: bool
) -> None:
    end = {"status": status, "answered": answered, "lived": 1.0}
    assert _pauses(kept, *[end] * 9) == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10]
    assert "9 in a row" in kept.problem
    assert ("soon after its start" in kept.problem) is answered
    assert ("before anything was answered" in kept.problem) is not answered


def test_who_is_killed_is_replaced_at_once_if_it_had_answered_something(kept: Keeper) -> None:
    end = {"status": -signal.SIGKILL, "lived": 1.0}
    assert _pauses(kept, *[{**end, "answered": True}] * 3) == [0, 0, 0]
    assert _pauses(kept, *[{**end, "answered": False}] * 3) == [0.1, 0.2, 0.4]
    assert _pauses(kept, {**end, "answered": True}) == [0]


@pytest.mark.parametrize("status", [FAULTED, -signal.SIGKILL])
@pytest.mark.parametrize("answered", [False, True])
def test_who_has_lived_for_long_is_replaced_at_once(
    kept: Keeper, status: int, answered: bool
) -> None:
    _pauses(kept, *[{"status": FAULTED, "answered": True, "lived": 1.0}] * 4)
    end = {"status": status, "answered": answered, "lived": keeper.LONGEST_PAUSE + 1}
    assert _pauses(kept, end, end) == [0, 0]


def test_an_interpreter_that_is_gone_is_not_hammered(
    kept: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As amid an update; the last worker had answered something."""
    assert _pauses(kept, {"status": -signal.SIGKILL, "answered": True, "lived": 60.0}) == [0]
    kept.greeting = kept.descriptors = dict  # type: ignore[method-assign, assignment]

    def gone(*_: object) -> Child:
        raise FileNotFoundError(2, "No such file or directory", "/opt/python")

    monkeypatch.setattr(keeper, "Child", gone)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pauses = []
    for _ in range(4):
        kept._start_worker()
        pauses.append(round(kept.start_at - now, 1))
    assert pauses == [0.1, 0.2, 0.4, 0.8]
    assert "could not be started (/opt/python: No such file or directory)" in kept.problem


def test_no_process_for_the_first_worker_is_one_line(
    kept: Keeper, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept.greeting = kept.descriptors = dict  # type: ignore[method-assign, assignment]
    kept.fuse = -1

    def full(*_: object) -> Child:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(keeper, "Child", full)
    assert kept._start_worker() == 1
    said = "healfs: no process for the disk can be started: Resource temporarily unavailable\n"
    assert capsys.readouterr().err == said


def test_faults_in_a_row_are_told_twice(kept: Keeper) -> None:
    told: list[str] = []
    kept.happened = lambda name, *_: told.append(name)  # type: ignore[method-assign]
    fault = {"do": "event", "event": "HEALFS_FAULTED", "data": {}, "time": 0.0}
    for _ in range(5):
        kept._heard(fault)
        _ends(kept, FAULTED, answered=True, lived=1.0)
    assert told.count("HEALFS_FAULTED") == 2 and told.count("HEALFS_WORKER_RESTARTED") == 1
    kept._heard(fault | {"event": "HEALFS_RECOVERED"})
    assert told[-1] == "HEALFS_RECOVERED"


def test_where_a_daemon_still_is_another_time_may_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line and status 1: after its end, which systemd cannot see, there is room."""
    monkeypatch.setenv("HEALFS_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(Keeper, "_catch_signals", lambda self: None)
    claimed = mounts.claim("/a\nb")
    try:
        one = Keeper({"mountpoint": "/a\nb", "source": "disk", "name": "disk.img"}, "{}", -1)
        assert one.run() == 1
    finally:
        claimed.release()
    said = capsys.readouterr().err
    assert (
        said.startswith("healfs: /a b: a healfs daemon serves it already") and said.count("\n") == 1
    )
    tmp_path.chmod(0o777)
    assert one.run() == 2 and "others may write there" in capsys.readouterr().err


def test_of_a_mounts_end_the_first_word_counts(kept: Keeper) -> None:
    """The worker that was asked for it may die before its end, and its successor knows less."""
    kept._heard({"do": "unmounted", "data": {"uid": 7, "outage_seconds": 1.5}})
    kept._heard({"do": "unmounted", "data": {"outage_seconds": 2.5}})
    assert kept.unmounted == {"uid": 7, "outage_seconds": 1.5}


def test_what_is_not_understood_is_answered(
    kept: Keeper, capsys: pytest.CaptureFixture[str]
) -> None:
    """The worker waits for the answer, and shields that."""
    heard: list[dict[str, Any]] = []
    kept.worker = Ended(0)  # type: ignore[assignment]
    kept.worker.tell = lambda message, fds=(): heard.append(message)  # type: ignore[union-attr, method-assign]
    kept._unmount = lambda lazy: int("no number")  # type: ignore[method-assign, assignment, return-value]
    kept._obey({"do": "umount", "lazy": False})
    kept._obey({"do": "init"})  # nobody waits
    assert [list(message) for message in heard] == [["error", "errno"]]
    assert "not understood: umount: ValueError" in heard[0]["error"]
    assert capsys.readouterr().err.count("not understood") == 2


def test_what_was_idle_may_be_taken_away(kept: Keeper) -> None:
    """By force: its worker has not stirred."""
    kept.heartbeat.beat(0.0, idle=True)
    kept.fuse, kept.record_at = -1, 0.0
    reader, writer = os.pipe()
    with socket.socket() as door, open(reader), open(writer, "w"):
        kept.wake, kept.door, kept.listener = reader, door, door
        kept._wait()


def test_a_relative_environment_is_what_it_was_when_the_daemon_has_gone_to_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEALFS_RUNTIME_DIR", "run")
    monkeypatch.setenv("PYTHONPATH", "src::/opt")
    keeper._be_anywhere()
    assert os.environ["HEALFS_RUNTIME_DIR"] == str(tmp_path / "run")
    assert os.environ["PYTHONPATH"] == f"{tmp_path}/src:/opt"
