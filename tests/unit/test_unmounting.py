"""The end of a mount that several ask for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from healfs.core.states import State
from healfs.daemon.parent import ParentError, UnmountError
from healfs.daemon.unmounting import Unmounting
from healfs.daemon.worker import Worker


class Ending(Unmounting):
    """The kernel unmounts once."""

    mounted = True

    async def _unmount(self, *, lazy: bool) -> None:
        await trio.sleep(1)
        if not self.mounted:
            raise ParentError(22, "cannot unmount /m: Invalid argument")
        self.mounted = False


@pytest.mark.parametrize("force", [False, True])
async def test_the_second_is_told_that_there_is_a_first(
    autojump_clock: trio.testing.MockClock, force: bool
) -> None:
    told: list[dict[str, Any]] = []
    worker = SimpleNamespace(
        engine=SimpleNamespace(state=State.READY, fail_all=dict, outage_seconds=0),
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
