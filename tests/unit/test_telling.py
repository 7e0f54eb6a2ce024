"""The worker's events on their way: QMP gets all of them, the history those that are one."""

from __future__ import annotations

from typing import Any

import trio
import trio.testing

from healfs.daemon.telling import Telling
from healfs.events import BURST, EVERY


class Ends:
    """The keeper's end and the control clients'."""

    def __init__(self) -> None:
        self.greeting = {"log": "stderr"}
        self.kept: list[tuple[str, dict[str, Any], float]] = []
        self.emitted: list[str] = []

    def tell(self, message: dict[str, Any]) -> None:
        assert message["do"] == "event"
        self.kept.append((message["event"], message["data"], message["time"]))

    def emit(self, name: str, data: dict[str, Any]) -> None:
        self.emitted.append(name)


async def test_a_backend_that_flaps_is_told_in_a_few_events_and_truly_at_the_end(
    autojump_clock: trio.testing.MockClock,
) -> None:
    ends = Ends()
    telling = Telling(ends, ends, trio.current_time)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(telling.run)
        begun = trio.current_time()
        for number in range(1000):
            telling.event("HEALFS_OUTAGE", {"number": number})
            await trio.sleep(0.1)
            telling.event("BLOCK_IO_ERROR", {"errno": 5})
            telling.event("HEALFS_RECOVERED", {"number": number})
            await trio.sleep(0.1)
        last = trio.current_time()
        await trio.sleep(EVERY * 2)
        nursery.cancel_scope.cancel()
    assert len(ends.emitted) == 3000
    assert len(ends.kept) <= BURST + (last - begun) / EVERY + 2
    name, data, when = ends.kept[-1]
    assert (name, data["number"]) == ("HEALFS_RECOVERED", 999) and when < last
    assert len(ends.kept) + sum(data.get("untold", 0) for _, data, _ in ends.kept) == 2000
    assert "BLOCK_IO_ERROR" not in {name for name, _, _ in ends.kept}
