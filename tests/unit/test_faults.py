"""An internal error ends the worker, where another one takes over."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from healfs.daemon import faults
from healfs.daemon.children import FAULTED


class Ended(BaseException):
    pass


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    def ended(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(os, "_exit", ended)
    told: list[tuple[str, object]] = []
    telling = SimpleNamespace(event=lambda name, data: told.append((name, data)))
    parent = SimpleNamespace(gone=trio.Event())
    return SimpleNamespace(resend=True, parent=parent, telling=telling, told=told)


DATA = {"reason": "a test"}


def test_it_is_told_and_ends(worker: Any) -> None:
    with pytest.raises(Ended) as ended:
        faults.faulted(worker, DATA)
    assert ended.value.args == (FAULTED,) and worker.told == [("HEALFS_FAULTED", DATA)]


def test_it_ends_although_there_is_no_memory_to_tell_it(worker: Any) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    worker.telling.event = no_memory
    with pytest.raises(Ended):
        faults.faulted(worker, DATA)


@pytest.mark.parametrize("without", ["resend", "keeper"])
def test_it_stays_where_nobody_would_take_over(worker: Any, without: str) -> None:
    if without == "resend":
        worker.resend = False
    else:
        worker.parent.gone.set()
    faults.faulted(worker, DATA)
    assert worker.told == [("HEALFS_FAULTED", DATA)]


async def test_a_task_that_fails_before_there_is_a_mount_is_no_fault(worker: Any) -> None:
    async def broken() -> None:
        raise RuntimeError("planted")

    with pytest.raises(ExceptionGroup):
        await faults.guarded(worker, broken)
    worker.channel = object()
    where: list[str] = []
    worker.engine = SimpleNamespace(fault=where.append)
    await faults.guarded(worker, broken)
    assert where == ["broken"]
