"""A day of outages leaves nothing behind in the engine: no byte more after each hour."""

from __future__ import annotations

import logging
import tracemalloc
from collections.abc import Iterator

import pytest

from tests.sim.day import OUTAGES, Day

GROWTH = 2048  # bytes: less than a small object for each outage of an hour


@pytest.fixture(autouse=True)
def _traced(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.ERROR, "healfs")  # what pytest keeps of the log is no leak
    tracemalloc.start()
    yield
    tracemalloc.stop()


def _grown(hours: int) -> int:
    day = Day()
    day.hour()  # what is made once, and the sizes that tables have from then on
    first = day.hour()
    for _ in range(hours - 2):
        last = day.hour()
    assert day.outages == hours * OUTAGES and day.answered > hours * 8000
    return last - first


def test_an_hour_of_outages_leaves_nothing() -> None:
    assert _grown(3) < GROWTH


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_a_day_of_outages_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    grown = _grown(24)
    with capsys.disabled():
        print(f"\nfrom hour 2 to hour 24: {grown} bytes")
    assert grown < GROWTH
