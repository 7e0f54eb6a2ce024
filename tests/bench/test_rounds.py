"""What the bench makes of figures and failures. No speed is asserted."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from tests.bench import load, rounds
from tests.bench.load import DISK_BYTES, FioFailed, Load

READ = Load("randread", "4k", 4)


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others' dirty pages are not for a test to wait for."""
    monkeypatch.setattr(os, "sync", lambda: None)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_each_is_first_in_its_turn_and_runs_once_a_round(count: int) -> None:
    names = [str(number) for number in range(count)]
    order = [rounds.turns(names, number) for number in range(2 * count)]
    assert [each[0] for each in order] == names * 2
    assert all(sorted(each) == names for each in order)


def test_nobody_runs_always_behind_the_same_one() -> None:
    order = [rounds.turns("abc", number) for number in range(6)]
    assert sorted(order) == [list(each) for each in itertools.permutations("abc")]


def measure(
    script: dict[str, list[float | FioFailed]], gone: dict[str, str], count: int = 3
) -> rounds.Row:
    """Of figures and failures, one for each run."""

    def run(file: Path) -> float:
        given = script[str(file)].pop(0)
        if isinstance(given, FioFailed):
            raise given
        return given

    files = {name: Path(name) for name in script}
    return rounds.measure(run, files, count, gone, lambda number, name: None)


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    row = measure({"healfs": [10, 90, 40], "peer": [5, 30, 40]}, {})
    assert row.cells() == ["40", "30", "2.00 (1.00 to 3.00)"]


def test_one_that_fails_is_named_and_the_others_go_on() -> None:
    failure = FioFailed("Input/output error")
    gone: dict[str, str] = {}
    row = measure({"healfs": [3, 3, 3], "peer": [1, failure], "limit": [4, 4, 4]}, gone)
    assert row.cells() == ["3", "failed", "4", "-", "0.75 (0.75 to 0.75)"]
    assert row.failed == {"peer": "fio: Input/output error"}
    assert not gone, "it may do the next load"


def test_one_that_hangs_is_asked_no_more() -> None:
    hung = FioFailed("no end after 60 s", hung=True)
    gone: dict[str, str] = {}
    row = measure({"healfs": [hung], "peer": [1, 1, 1]}, gone)
    assert row.cells() == ["failed", "1", "-"]
    row = measure({"healfs": [], "peer": [1, 1, 1]}, gone)
    assert row.failed == {"healfs": "hung before: fio: no end after 60 s"}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(DISK_BYTES)
    return path


def test_a_run_is_as_long_as_it_was_told(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fio takes --runtime=0.5 for 50 ms."""
    found: list[dict[str, Any]] = []
    real = load._fio

    def kept(*arguments: str, timeout: float) -> dict[str, Any]:
        found.append(real(*arguments, timeout=timeout))
        return found[-1]

    monkeypatch.setattr(load, "_fio", kept)
    assert READ.run(image, 0.5) > 0
    assert found[0]["jobs"][0]["read"]["runtime"] >= 450


def test_why_fio_failed(image: Path) -> None:
    with pytest.raises(FioFailed, match="file creation disallowed"):
        READ.run(image.parent / "nothing", 0.1)


def test_fio_that_does_not_end(image: Path) -> None:
    with pytest.raises(FioFailed, match=r"no end after 0\.2 s") as failed:
        load._fio(
            *("--name=long", f"--filename={image}", "--rw=read", "--size=4k"),
            *("--time_based", "--runtime=60s"),
            timeout=0.2,
        )
    assert failed.value.hung
