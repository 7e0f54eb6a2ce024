"""When a worker hangs, and what systemd's watchdog is fed with; what the socket is sent."""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path

import pytest

from healfs.daemon.heartbeat import SILENT_SECONDS, START_SECONDS, Heartbeat
from healfs.daemon.sd_notify import MAXIMUM_STATUS, SdNotify


class Systemd(SdNotify):
    def __init__(self, watchdog: float) -> None:
        self.watchdog = watchdog
        self.fed = 0

    def feed(self) -> None:
        self.fed += 1


def hung_after(heart: Heartbeat, start: float, seconds: float, look: float = 1.0) -> float | None:
    """Looked at once in `look` seconds: when it is said to hang; None: not within `seconds`."""
    now = start
    while now < start + seconds:
        now += look
        if heart.hangs(now):
            return now - start
    return None


@pytest.mark.parametrize(("watchdog", "limit"), [(0, 30), (60, 30), (20, 10), (600, 30)])
def test_silence_is_a_hang_after_half_the_watchdog(watchdog: float, limit: float) -> None:
    heart = Heartbeat(Systemd(watchdog))
    heart.started(100.0)
    heart.beat(101.0)
    assert hung_after(heart, 100.0, 1000) == pytest.approx(limit, abs=1)
    assert hung_after(heart, 1100.0, 1000) is None  # it is told once a worker


def test_the_beats_come_often_enough_for_a_short_watchdog() -> None:
    assert Heartbeat(Systemd(1.0)).period == 0.25
    assert Heartbeat(Systemd(60.0)).period == 1.0


def test_an_idle_disk_may_be_silent_until_something_comes() -> None:
    heart = Heartbeat(Systemd(0.0))
    heart.started(0.0)
    heart.beat(1.0, idle=True)
    assert heart.patience == math.inf
    assert hung_after(heart, 1.0, 1000, look=100) is None
    heart.something_came(2000.0)
    assert heart.patience == 1
    assert hung_after(heart, 2000.0, 100) == SILENT_SECONDS
    heart.started(3000.0)
    heart.beat(3001.0, idle=True)
    heart.something_came(4000.0)
    heart.beat(4001.0)
    assert hung_after(heart, 4001.0, 100) == SILENT_SECONDS - 1  # since it came


def test_a_silent_worker_is_asked_once_before_it_hangs() -> None:
    """It may be idle, and what said so lost."""
    heart = Heartbeat(Systemd(0.0))
    heart.started(0.0)
    heart.hangs(1.0)
    heart.beat(1.0)
    asked = []
    for now in range(2, 40):
        if heart.hangs(now):
            break
        if heart.has_to_ask():
            asked.append(now)
    assert (asked, now) == ([1 + SILENT_SECONDS / 2], 1 + SILENT_SECONDS)
    heart.started(100.0)
    for now in 101, 201:  # each silence
        heart.hangs(now)
        heart.beat(now)
        assert hung_after(heart, now, SILENT_SECONDS / 2 - 1) is None and not heart.has_to_ask()
        assert not heart.hangs(now + SILENT_SECONDS / 2)
        assert heart.has_to_ask()


def test_the_watchdog_of_an_idle_disk_is_fed() -> None:
    systemd = Systemd(24.0)
    heart = Heartbeat(systemd)
    heart.started(0.0)
    heart.beat(1.0, idle=True)
    assert heart.patience == 6
    fed = systemd.fed
    assert hung_after(heart, 1.0, 600, look=heart.patience) is None
    assert systemd.fed == fed + 100
    heart.something_came(700.0)
    assert hung_after(heart, 700.0, 100) == 12


def test_a_worker_that_starts_has_longer_and_the_watchdog_is_fed_meanwhile() -> None:
    systemd = Systemd(60.0)
    heart = Heartbeat(systemd)
    heart.started(0.0)
    assert hung_after(heart, 0.0, 200) == pytest.approx(START_SECONDS, abs=1)
    assert systemd.fed >= START_SECONDS - 1


def test_the_watchdog_starves_in_silence_and_is_fed_again_when_all_is_done_about_it() -> None:
    systemd = Systemd(60.0)
    heart = Heartbeat(systemd)
    heart.started(0.0)
    heart.beat(1.0)
    fed = systemd.fed
    now = 1.0
    while not heart.hangs(now := now + 1):
        assert systemd.fed == fed
    for _ in range(100):  # killed, and it does not go
        heart.hangs(now := now + 1)
    for _ in range(100):  # nor does another one run
        heart.none_runs(now := now + 1)
    assert systemd.fed >= fed + 199


def test_what_passed_while_the_keeper_was_frozen_too_is_no_silence() -> None:
    heart = Heartbeat(Systemd(0))
    heart.started(0.0)
    heart.beat(1.0)
    assert not heart.hangs(2.0)
    assert not heart.hangs(3602.0)
    assert hung_after(heart, 3602.0, 100) == pytest.approx(SILENT_SECONDS - 3, abs=1)


def test_what_the_socket_does_not_take_goes_with_the_next_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "late"))
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid() + 1))
    systemd = SdNotify()
    assert systemd.watchdog == 0  # another process's
    assert "NOTIFY_SOCKET" not in os.environ and "WATCHDOG_USEC" not in os.environ
    systemd.ready()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "late"))
        manager.setblocking(False)
        systemd.status("stalled\nREADY=0 " + "x" * 9999)
        systemd.feed()
        ready, status = manager.recv(65536).decode().split("\n")
        assert ready == "READY=1"
        assert status.startswith("STATUS=stalled READY=0 x") and len(status) < MAXIMUM_STATUS + 20
        systemd.feed()  # nothing is new
        with pytest.raises(BlockingIOError):
            manager.recv(65536)
    assert systemd._socket is not None
    systemd._socket.close()


def test_without_a_socket_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    systemd = SdNotify()
    systemd.ready()
    systemd.status("ready")
    systemd.feed()
    systemd.stopping()
