from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tests.mounts import HealfsMount
from tests.vm.guest import Bus, Guest


class Boot(Protocol):
    def __call__(self, disk: HealfsMount | Path, bus: Bus = "virtio-blk") -> Guest: ...


@pytest.fixture
def boot() -> Iterator[Boot]:
    """Starts guests that have reached their command loop, and ends them with the test."""
    guests: list[Guest] = []

    def start(disk: HealfsMount | Path, bus: Bus = "virtio-blk") -> Guest:
        guests.append(Guest(disk, bus))
        guests[-1].wait_line(r"READY .*", 400)
        return guests[-1]

    yield start
    for guest in guests:
        guest.stop()
