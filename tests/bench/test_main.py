"""`make bench` goes on after what fails, and says what. No speed is asserted."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from tests.bench import __main__ as bench
from tests.bench import disks
from tests.bench.load import DISK_BYTES, LOADS


def image(directory: Path) -> Path:
    path = directory / "image"
    with path.open("wb") as file:
        file.truncate(DISK_BYTES)
    return path


@contextlib.contextmanager
def plain_file(directory: Path) -> Iterator[Path]:
    yield image(directory)


@contextlib.contextmanager
def no_file(directory: Path) -> Iterator[Path]:
    yield directory / "nothing"


@contextlib.contextmanager
def no_disk(directory: Path) -> Iterator[Path]:
    raise RuntimeError("nbdfuse ended at once, with 3")
    yield directory


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[io.StringIO, dict[str, disks.Disk]]]:
    """What is printed, and the disks of the only group."""
    printed, measured = io.StringIO(), dict[str, disks.Disk]()
    group = bench.Group("some", measured, ("4k-randread-qd1", "4k-randread-qd32"))
    monkeypatch.setattr(bench, "console", Console(file=printed, width=200))
    monkeypatch.setattr(bench, "failures", [])
    # Others' dirty pages are not for a test to wait for, nor are its own.
    monkeypatch.setattr(os, "sync", lambda: None)
    monkeypatch.setattr(bench, "WARM", LOADS["4k-randread-qd1"])
    monkeypatch.setattr(bench, "groups", lambda *options: [group])
    monkeypatch.setattr(disks, "backing_file", image)
    monkeypatch.setattr(disks, "why_plain", lambda tree=None: "")
    yield printed, measured


def invoke(rows: str) -> Result:
    options = ["--rows", rows, "--rounds", "2", "--seconds", "0.1"]
    return CliRunner().invoke(bench.main, options, catch_exceptions=False)


def test_all_is_well(run: tuple[io.StringIO, dict[str, disks.Disk]]) -> None:
    printed, measured = run
    measured |= {"healfs": plain_file, "peer": plain_file}
    assert invoke("some/4k-randread").exit_code == 0
    assert "failed" not in printed.getvalue() and "4k-randread-qd1" in printed.getvalue()


def test_what_fails_is_named_and_the_rest_is_measured(
    run: tuple[io.StringIO, dict[str, disks.Disk]], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed, measured = run
    measured |= {"healfs": plain_file, "nbdfuse": no_disk, "gone": no_file}
    monkeypatch.setattr(bench, "print_memory", lambda: 1 / 0)
    assert invoke("some/|memory").exit_code == 1
    lines = [line.strip() for line in printed.getvalue().splitlines()]
    why = {"nbdfuse": "nbdfuse ended at once, with 3", "gone": "fio: file creation disallowed"}
    for load in ("4k-randread-qd1", "4k-randread-qd32"):
        (row,) = [line for line in lines if line.startswith(f"│ {load}")]
        assert row.count("failed") == 2
        for name, reason in why.items():
            line = f"some/{load}, {name}: {reason}"
            assert [one for one in lines if one.startswith(f"failed: {line}")]
            assert [one for one in lines if one.startswith(line)], "and at the end again"
    assert lines[-1] == "memory: ZeroDivisionError: division by zero"


def test_plain_python_is_told_first_and_last(
    run: tuple[io.StringIO, dict[str, disks.Disk]], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed, measured = run
    measured |= {"healfs": plain_file}
    monkeypatch.setattr(disks, "why_plain", lambda tree=None: "HEALFS_PLAIN is set")
    assert invoke("some/4k-randread").exit_code == 0
    lines = printed.getvalue().splitlines()
    assert lines[0] == lines[-1]
    assert lines[0].startswith(
        "healfs runs as plain Python here, not compiled (HEALFS_PLAIN is set)"
    )


def test_why_plain_is_asked_of_the_tree_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEALFS_PLAIN", "1")
    assert disks.why_plain() == "HEALFS_PLAIN is set"
    (tmp_path / "healfs").mkdir()
    (tmp_path / "healfs/__init__.py").touch()
    assert disks.why_plain(tmp_path) == "it has nothing that can be compiled"


def test_rows_that_are_none_are_refused() -> None:
    for rows, why in (("^nothing$", "no row matches"), ("(", "no regex")):
        found = CliRunner().invoke(bench.main, ["--rows", rows])
        assert found.exit_code == 2 and why in found.output
