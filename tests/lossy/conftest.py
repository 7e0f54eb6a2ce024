"""A disk behind a server that loses its cache, and what the tests of real mounts share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fuse.conftest import Opener as Opener
from tests.fuse.conftest import _needs_fuse as _needs_fuse
from tests.fuse.conftest import agent as agent
from tests.lossy.rig import Checker, LossyServer

SIZE = 16 << 20


@pytest.fixture
def stable(tmp_path: Path) -> Path:
    path = tmp_path / "stable.img"
    with open(path, "xb") as file:
        file.truncate(SIZE)
    return path


@pytest.fixture
def server(stable: Path) -> Iterator[LossyServer]:
    running = LossyServer(stable)
    with running:
        yield running


Check = Callable[..., Checker]


@pytest.fixture
def checker(healfs_mount: object) -> Iterator[Check]:
    """Starts checkers; all of them are killed with the test, before the mounts."""
    checkers: list[Checker] = []

    def start(file: Path, **options: int) -> Checker:
        checkers.append(Checker(file, **options))
        return checkers[-1]

    yield start
    for one in checkers:
        one.close()
