"""The end of a mount that several ask for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from healfs.core.states import State
from healfs.daemon.parent import ParentError, UnmountError
from healfs.daemon.unmounting import FORCED_FLUSH_SECONDS, Unmounting
from healfs.daemon.worker import Worker


class Ending(Unmounting):
    """The kernel unmounts once."""

    mounted = True

    async def _unmount(self, *, lazy: bool) -> None:
        await trio.sleep(1)
        if not self.mounted:
            raise ParentError(22, "cannot unmount /m: Invalid argument")
        self.mounted = False

    async def _is_used_elsewhere(self, patience: float) -> bool:
        return False


@pytest.mark.parametrize("force", [False, True])
async def test_the_second_is_told_that_there_is_a_first(
    autojump_clock: trio.testing.MockClock, force: bool
) -> None:
    told: list[dict[str, Any]] = []
    worker = SimpleNamespace(
        engine=SimpleNamespace(
            state=State.READY, fail_all=dict, outage_seconds=0, log=SimpleNamespace(unflushed=tuple)
        ),
        config=SimpleNamespace(read_only=True, mountpoint="/m"),
        parent=SimpleNamespace(tell=told.append),
        commit=lambda: None,
    )
    ending = Ending(cast(Worker, worker))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: ending.umount(force=False, who={"uid": 1}))
        await trio.sleep(0.5)
        with pytest.raises(UnmountError, match="is being unmounted already"):
            await ending.umount(force=force, who={"uid": 2})
    assert [message["data"] for message in told] == [{"uid": 1}]


class Waiting(Ending):
    """No flush ends."""

    async def flush(self, seconds: float) -> bool:
        with trio.move_on_after(seconds) as self._patience:
            await trio.sleep_forever()
        return False


async def test_a_forced_one_waits_for_the_patience_of_none_of_several(
    autojump_clock: trio.testing.MockClock,
) -> None:
    engine = SimpleNamespace(
        state=State.READY,
        fail_all=dict,
        outage_seconds=0,
        log=SimpleNamespace(unflushed=tuple),
        status=lambda: {"requests": {"parked": 0, "in_flight": 1}, "reason": "", "state": "ready"},
        link_up=True,
    )
    worker = SimpleNamespace(
        engine=engine,
        config=SimpleNamespace(mountpoint="/m"),
        parent=SimpleNamespace(tell=lambda message: None),
        commit=lambda: None,
    )
    ending = Waiting(cast(Worker, worker))
    refused: list[str] = []

    async def plain() -> None:
        with pytest.raises(UnmountError) as caught:
            await ending.umount(force=False)
        refused.append(str(caught.value))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(plain)
        await trio.sleep(1)
        with trio.fail_after(FORCED_FLUSH_SECONDS + 1.5):
            await ending.umount(force=True)
    assert len(refused) == 3


class Writers:
    """An engine whose disk is written to until it is held; each look finds one more answered."""

    state = State.READY
    outage_seconds = 0

    def __init__(self) -> None:
        self.log = SimpleNamespace(unflushed=self._unflushed)
        self.is_held = False
        self._answered = 0

    def _unflushed(self) -> list[SimpleNamespace]:
        self._answered += not self.is_held
        return [SimpleNamespace(offset=n * 512, length=512) for n in range(self._answered)]

    def hold(self) -> None:
        self._answered += 1  # since the flush
        self.is_held = True

    def fail_all(self) -> dict[str, dict[str, int]]:
        return {"write": {"requests": 1, "bytes": 512}}


class Busy(Ending):
    """Somebody has it open, and the backend flushes."""

    async def _unmount(self, *, lazy: bool) -> None:
        if not lazy:
            raise ParentError(16, "cannot unmount /m: Device or resource busy")

    async def flush(self, seconds: float) -> bool:
        return True


async def test_what_is_answered_in_a_disk_that_is_taken_away_in_use_is_told() -> None:
    told: list[dict[str, Any]] = []
    engine = Writers()
    worker = SimpleNamespace(
        engine=engine,
        config=SimpleNamespace(mountpoint="/m"),
        parent=SimpleNamespace(tell=told.append),
        commit=lambda: None,
    )
    given_up = await Busy(cast(Worker, worker)).umount(force=True)
    assert engine.is_held
    assert given_up["write"] == {"requests": 2, "bytes": 1024}
    assert given_up["unflushed"] == {"requests": 1, "bytes": 512, "ranges": [[0, 512]]}
    assert told[0]["data"]["given_up"]["unflushed"] == {"requests": 1, "bytes": 512}
