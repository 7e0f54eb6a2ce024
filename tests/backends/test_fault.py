"""The fault backend: its rules file, and that it does what the rules say, no more."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from healfs.backends import fault
from healfs.backends.base import SourceError
from healfs.backends.fault import FaultBackend
from healfs.backends.file import FileBackend
from healfs.core.request import Kind
from tests.backends.conftest import DEADLINE, connected, make_request

Rules = Callable[[str], None]


@pytest.fixture
def rules(tmp_path: Path) -> Rules:
    """Replaces the rules at once, as an editor does."""
    path = tmp_path / "rules.toml"

    def write(text: str) -> None:
        new = path.with_suffix(".new")
        new.write_text(text)
        os.replace(new, path)

    write("")
    return write


@pytest.fixture
def faulty(image: Path, tmp_path: Path, rules: Rules) -> FaultBackend:
    return FaultBackend(FileBackend(str(image)), str(tmp_path / "rules.toml"))


async def test_an_errno_for_a_range_and_kind_a_number_of_times(
    faulty: FaultBackend, rules: Rules
) -> None:
    async with connected(faulty) as client:
        rules('[[rule]]\nkinds = ["READ"]\noffset = 4096\nlength = 4096\nerrno = "EIO"\ncount = 2')
        assert (await client.do(make_request(Kind.READ, 0, 4096)))[0] == 0
        assert (await client.do(make_request(Kind.WRITE, 4096, data=b"x")))[0] == 0
        assert (await client.do(make_request(Kind.READ, 4095, 2)))[0] == errno.EIO
        assert (await client.do(make_request(Kind.READ, 8191, 1)))[0] == errno.EIO
        assert await client.read(4096, 1) == b"x"


async def test_a_failed_write_does_not_reach_the_disk(faulty: FaultBackend, rules: Rules) -> None:
    async with connected(faulty) as client:
        rules('[[rule]]\nkinds = ["WRITE", "FLUSH"]\nerrno = "ENOSPC"')
        assert (await client.do(make_request(Kind.WRITE, 0, data=b"x")))[0] == errno.ENOSPC
        assert (await client.do(make_request(Kind.FLUSH)))[0] == errno.ENOSPC
        assert await client.read(0, 1) == b"\0"


async def test_a_delay_delays_only_what_matches(faulty: FaultBackend, rules: Rules) -> None:
    async with connected(faulty) as client:
        rules("[[rule]]\noffset = 4096\ndelay = 200")
        slow = make_request(Kind.READ, 4096, 512)
        start = trio.current_time()
        client.send(slow, make_request(Kind.READ, 0, 512))
        await client.until(lambda: len(client.answers) == 2)
        assert trio.current_time() - start >= 0.2
        assert client.answers[1][0] is slow


async def test_down_loses_the_connection_and_refuses_the_next(
    faulty: FaultBackend, rules: Rules
) -> None:
    async with connected(faulty) as client:
        await client.read(0, 1)
        rules("down = true")
        client.send(make_request(Kind.READ, 0, 1))
        await client.until(lambda: client.lost is not None)
        assert len(client.answers) == 1
    with pytest.raises(ConnectionRefusedError):
        await faulty.connect()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_until_changed, faulty)
        rules("down = false")
    async with connected(faulty) as client:
        await client.read(0, 1)


async def _until_changed(backend: FaultBackend) -> None:
    with trio.fail_after(DEADLINE):
        await backend.wait_changed()


async def test_hang_holds_answers_until_it_is_over(
    faulty: FaultBackend, rules: Rules, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(faulty) as client:
        await client.write(0, b"before")
        rules("hang = true")
        client.send(make_request(Kind.READ, 0, 6), make_request(Kind.WRITE, 6, data=b"+"))
        with trio.move_on_after(0.2):
            await client.until(lambda: len(client.answers) > 1)
        assert len(client.answers) == 1
        rules("")
        await client.until(lambda: len(client.answers) == 3)
        assert await client.read(0, 7) == b"before+"
    rules("hang = true")
    monkeypatch.setattr(fault, "CONNECT_TIMEOUT", 0.1)
    with pytest.raises(TimeoutError):
        await faulty.connect()


async def test_what_was_delayed_dies_with_the_connection(
    faulty: FaultBackend, rules: Rules
) -> None:
    rules('[[rule]]\nkinds = ["WRITE"]\ndelay = 100')
    async with connected(faulty) as client:
        client.send(make_request(Kind.WRITE, 0, data=b"late"))
        faulty.close()
        await client.until(lambda: client.lost is not None)
    async with connected(faulty) as second:
        # Answered after the old one would have been sent: the same delay, begun later.
        await second.write(4096, b"x")
        assert await second.read(0, 4) == bytes(4)
    assert not client.answers


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("down = 1", "wrong type"),
        ("upside = true", "unknown key 'upside'"),
        ("[[rule]]\nkind = 'READ'", "rule 1: unknown key 'kind'"),
        ("[[rule]]\nkinds = ['TRIM']", "known: READ, WRITE"),
        ("[[rule]]\nerrno = 'EWHAT'", "no such errno"),
        ("[[rule]]\ncount = -1", "negative"),
        ("[[rule]]\ncount = true", "wrong type"),
        ("rule = [1]", "no table"),
        ("down =", "rules.toml"),
    ],
)
async def test_bad_rules_are_named(
    faulty: FaultBackend, rules: Rules, text: str, said: str
) -> None:
    rules(text)
    with pytest.raises(SourceError) as caught:
        await faulty.connect()
    assert said in str(caught.value) and "\n" not in str(caught.value)


async def test_bad_rules_later_leave_the_old_ones(
    faulty: FaultBackend, rules: Rules, caplog: pytest.LogCaptureFixture
) -> None:
    rules('[[rule]]\nkinds = ["WRITE"]\nerrno = "EIO"')
    async with connected(faulty) as client:
        with caplog.at_level(logging.WARNING, "healfs.backends.fault"):
            rules("nonsense")
            for _ in range(2):
                assert (await client.do(make_request(Kind.WRITE, 0, data=b"x")))[0] == errno.EIO
    assert [record.message for record in caplog.records if "old rules" in record.message][1:] == []
    assert "the old rules stay" in caplog.text


async def test_missing_rules_are_named(image: Path, tmp_path: Path) -> None:
    backend = FaultBackend(FileBackend(str(image)), str(tmp_path / "none.toml"))
    with pytest.raises(SourceError):
        await backend.connect()


async def test_without_rules_it_is_away_until_there_are_some(
    faulty: FaultBackend, rules: Rules
) -> None:
    """The worker's successor begins so where the file was spoilt while the old rules held."""
    rules("nonsense =")
    faulty.resumed()
    faulty.commit()
    with pytest.raises(SourceError, match="bad fault rules"):
        await faulty.connect()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(faulty.wait_changed)
        await trio.testing.wait_all_tasks_blocked()
        rules("")
    async with connected(faulty) as client:
        assert await client.read(0, 1) == b"\0"
