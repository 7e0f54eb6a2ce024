"""Fixtures that tests of several directories share."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Protocol

import pytest
from hypothesis import HealthCheck, settings

from healfs import compiled
from tests.backends.certificates import Authority
from tests.mounts import HealfsMount

# What no machine of CI can promise; every other skip fails there (HEALFS_NO_SKIPS, .ci/run).
MAY_SKIP = ("other users cannot run healfs from here", "this machine is too busy")

# What whoever calls pytest has set is no matter of the tests': a terminal's width and colours, a
# unit's sockets, a shell that ignores SIGINT for what it starts in the background.
for _name in (
    "COLUMNS",
    "FORCE_COLOR",
    "NO_COLOR",
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "JOURNAL_STREAM",
    "HEALFS_RUNTIME_DIR",
):
    os.environ.pop(_name, None)
os.umask(0o022)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A machine that is slow, or stands still for a moment, is no failure.
settings.register_profile(
    "any machine", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

LONGEST = ("tests/fuse/test_install", "tests/vm", "tests/lossy", "tests/sim", "tests/fuse", "")


class Mounter(Protocol):
    def __call__(self, source: str | Path, *options: str, name: str = ...) -> HealfsMount: ...


def pytest_report_header() -> str:
    return (
        f"healfs: plain Python: {compiled.why_plain}" if compiled.why_plain else "healfs: compiled"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Some tests reach into what is compiled: make test runs them with HEALFS_PLAIN.

    The longest come first: side by side, one that begins last would be waited for alone.
    """
    items.sort(key=lambda item: next(at for at, part in enumerate(LONGEST) if part in item.nodeid))
    if compiled.why_plain:
        return
    plain = [item for item in items if item.get_closest_marker("plain")]
    config.hook.pytest_deselected(items=plain)
    items[:] = [item for item in items if item not in plain]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and "HEALFS_NO_SKIPS" in os.environ and not hasattr(report, "wasxfail"):
        assert isinstance(report.longrepr, tuple)
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not reason.startswith(MAY_SKIP):
            report.outcome, report.longrepr = "failed", f"what CI can run must not skip: {reason}"
    return report


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The CA of a test's servers and clients."""
    return Authority(tmp_path_factory.mktemp("tls") / "authority")


@pytest.fixture
def healfs_mount() -> Iterator[Mounter]:
    """Mounts healfs as often as it is called; all is torn down with the test."""
    mounts: list[HealfsMount] = []

    def mount(source: str | Path, *options: str, name: str = "disk.img") -> HealfsMount:
        mounts.append(HealfsMount(source, *options, name=name))
        return mounts[-1]

    yield mount
    for mounted in reversed(mounts):
        mounted.close()
