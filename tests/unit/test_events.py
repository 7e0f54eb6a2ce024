"""The history of a mount: what is kept, what is told of a backend that flaps, in which words."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from healfs import events
from healfs.control import mounts
from healfs.core.policy import Policy
from healfs.events import BURST, EVERY, KEPT, History, Throttle, read

NOW = 1_700_000_000.0


def add(history: History, count: int = 1) -> None:
    for _ in range(count):
        history.add("HEALFS_OUTAGE", {"kind": "away", "reason": "gone"}, NOW)


def sequences(path: Path) -> list[int]:
    return [event["sequence"] for event in read(path)]


def test_an_event_is_one_line_of_json(tmp_path: Path):
    path = tmp_path / "new" / "m.jsonl"
    event = History(path).add("RESUME", {"uid": 0, "pid": 7}, NOW + 0.1234)
    assert event == {
        "sequence": 1,
        "time": "2023-11-14T22:13:20.123+00:00",
        "event": "RESUME",
        "data": {"uid": 0, "pid": 7},
    }
    assert json.loads(path.read_text()) == event and read(path) == [event]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("count", [1, KEPT - 1, KEPT, KEPT + 1, 2 * KEPT, 2 * KEPT + 1, 5 * KEPT])
def test_the_last_thousand_are_kept_and_no_more_than_twice_as_many(tmp_path: Path, count: int):
    path = tmp_path / "m.jsonl"
    add(History(path), count)
    assert sequences(path) == list(range(max(1, count - KEPT + 1), count + 1))
    lines = sum(file.read_text().count("\n") for file in tmp_path.iterdir())
    assert lines <= 2 * KEPT


def test_the_next_mount_goes_on_where_the_last_one_ended(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    for _ in range(3):
        add(History(path), KEPT // 2 + 1)
    assert sequences(path) == list(range(3 * (KEPT // 2 + 1) - KEPT + 1, 3 * (KEPT // 2 + 1) + 1))


@pytest.mark.parametrize("torn", [b'{"sequence": 3, "ti', b"\xff\xfe", b'{"sequence": "x"}', b"[]"])
def test_a_line_that_its_writer_did_not_finish_spoils_no_other(tmp_path: Path, torn: bytes):
    path = tmp_path / "m.jsonl"
    add(History(path), 2)
    with path.open("ab") as file:
        file.write(torn)
    add(History(path), 2)
    assert sequences(path) == [1, 2, 3, 4]


def test_the_reader_misses_nothing_when_the_file_is_exchanged_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "m.jsonl"
    history = History(path)
    add(history, KEPT + 10)
    read_bytes = Path.read_bytes
    exchanged = []

    def exchange(self: Path) -> bytes:
        data = read_bytes(self)
        if not exchanged:
            exchanged.append(self)
            add(history, KEPT)  # after the reader's first file, before its second
        return data

    monkeypatch.setattr(Path, "read_bytes", exchange)
    first = sequences(path)
    assert first == list(range(first[0], first[-1] + 1)) and first[-1] >= KEPT + 10


def test_a_long_text_is_cut(tmp_path: Path):
    event = History(tmp_path / "m.jsonl").add(
        "X", {"reason": "x" * 10**6, "to": {"a": "y" * 9999}}, 0
    )
    assert len(event["data"]["reason"]) == len(event["data"]["to"]["a"]) == events.TEXT


def test_where_it_cannot_be_written_it_says_so(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        add(History(tmp_path / "file" / "m.jsonl"))


def test_what_was_written_in_part_is_not_kept_and_spoils_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The file system gets full in the middle of a line."""
    path = tmp_path / "m.jsonl"
    history = History(path)
    add(history)
    with monkeypatch.context() as full:
        full.setattr(events, "os", _FullAfter(20))
        with pytest.raises(OSError) as caught:
            add(history)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    add(history)
    assert [event["sequence"] for event in read(path)] == [1, 3]


class _FullAfter:
    """The module os on a file system with room for so many bytes more."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, fd: int, data: bytes) -> int:
        return os.write(fd, data[: self.room])


def test_histories_of_what_is_mounted_no_more_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HEALFS_RUNTIME_DIR", str(tmp_path))
    claim = mounts.claim("/live")
    claim.record(mountpoint="/live", file="/live/f", source="s", keeper=1, worker=1, log="")
    names = ["/live", *(f"/old{number}" for number in range(mounts.HISTORIES + 5))]
    for number, name in enumerate(names):
        add(History(mounts.events_path(name)))
        os.utime(mounts.events_path(name), (number, number))
    mounts.drop_histories()
    left = [name for name in names if mounts.events_path(name).exists()]
    assert left == ["/live", *names[6:]]
    claim.release()


# --- what is told of a backend that flaps -------------------------------------------------------


def flap(throttle: Throttle, count: int, start: float, step: float) -> list[tuple[str, Any, float]]:
    told = []
    for number in range(count):
        now = start + number * step
        told += throttle.due(now)
        name = "HEALFS_RECOVERED" if number % 2 else "HEALFS_OUTAGE"
        told += throttle.offer(name, {"number": number}, now)
    return told


def test_a_thousand_flaps_are_a_few_events_and_the_last_word_is_true():
    throttle = Throttle()
    told = flap(throttle, 2000, NOW, 0.5)
    assert len(told) <= BURST + 1000 / EVERY + 1
    assert [data["number"] for _, data, _ in told[:BURST]] == list(range(BURST))
    assert throttle.pause is not None and throttle.pause <= EVERY
    [(name, data, when)] = throttle.due(NOW + 1000 + EVERY)
    assert (name, data["number"], when) == ("HEALFS_RECOVERED", 1999, NOW + 999.5)
    told.append((name, data, when))
    assert len(told) + sum(data.get("untold", 0) for _, data, _ in told) == 2000
    assert throttle.pause is None and throttle.due(NOW + 9999) == []


def test_slow_outages_are_all_told_at_once():
    assert len(flap(Throttle(), 500, NOW, EVERY)) == 500


def test_what_a_person_did_is_told_at_once_and_in_order():
    throttle = Throttle()
    flap(throttle, BURST + 3, NOW, 0)
    told = throttle.offer("STOP", {"uid": 0}, NOW)
    assert [name for name, _, _ in told] == ["HEALFS_OUTAGE", "STOP"]
    assert told[0][1] == {"number": BURST + 2, "untold": 2}
    assert throttle.pause is None


def test_the_workers_end_by_an_internal_error_is_told_at_once():
    throttle = Throttle()
    flap(throttle, BURST + 3, NOW, 0)
    told = throttle.offer("HEALFS_FAULTED", {"reason": "internal error"}, NOW)
    assert [name for name, _, _ in told] == ["HEALFS_OUTAGE", "HEALFS_FAULTED"]


def test_the_same_again_is_not_told():
    throttle = Throttle()
    failed = "HEALFS_FENCE_FAILED", {"reason": "status 1"}
    told = [throttle.offer(*failed, NOW + number) for number in range(1000)]
    assert [len(one) for one in told] == [1] + [0] * 999
    assert len(throttle.offer("HEALFS_RECOVERED", {}, NOW)) == 1
    assert len(throttle.offer(*failed, NOW)) == 1


# --- words --------------------------------------------------------------------------------------

POLICIES = {
    "from": Policy().as_dict(),
    "to": Policy().change({"retry_timeout": 5.0}, {"error": "report"}).as_dict(),
}
WORDS: list[tuple[str, dict[str, Any], str]] = [
    ("HEALFS_MOUNTED", {"source": "/srv/vm1.img"}, "mounted /srv/vm1.img"),
    ("HEALFS_UNMOUNTED", {}, "unmounted"),
    ("HEALFS_UNMOUNTED", {"reason": "signal 9"}, "unmounted: signal 9"),
    (
        "HEALFS_UNMOUNTED",
        {
            "uid": 0,
            "pid": 7,
            "outage_seconds": 12.0,
            "given_up": {"unflushed": {"requests": 2, "bytes": 8192}},
        },
        "unmounted by uid 0 (pid 7), in an outage of 12s; given up: 2 unflushed (8 KiB)",
    ),
    (
        "HEALFS_ACCEPTED",
        {"uid": 0, "pid": 7, "log": "dropped", "unflushed": 1},
        "the other disk was accepted by uid 0 (pid 7): 1 unflushed write dropped",
    ),
    (
        "HEALFS_RECONNECT",
        {"uid": 0, "pid": 7},
        "a new connection was asked for by uid 0 (pid 7)",
    ),
    ("HEALFS_OUTAGE", {"kind": "away", "reason": "r"}, "outage: the backend is away: r"),
    ("HEALFS_OUTAGE", {"kind": "worker", "reason": ""}, "outage: the worker died"),
    (
        "HEALFS_OUTAGE_CHANGED",
        {"kind": "silent", "reason": "no answer for 5 s"},
        "still an outage: the backend does not answer: no answer for 5 s",
    ),
    (
        "HEALFS_MISMATCH",
        {"reason": "it is disk B"},
        "another disk came back, it is not written to: it is disk B",
    ),
    (
        "HEALFS_RECOVERED",
        {"seconds": 125, "requests_waited": 12, "longest_wait": 65.0},
        "outage over after 2m 5s: 12 requests waited, the longest 1m 5s",
    ),
    (
        "HEALFS_RECOVERED",
        {"seconds": 0.5, "requests_waited": 1, "longest_wait": 0.5, "untold": 3},
        "outage over after 500ms: 1 request waited, the longest 500ms"
        " (events came too fast: 3 before this one are not told)",
    ),
    (
        "HEALFS_RECOVERED",
        {"seconds": 2, "requests_waited": 0, "longest_wait": 0},
        "outage over after 2s: no request waited",
    ),
    (
        "HEALFS_WORKER_RESTARTED",
        {"reason": "ended with signal 9", "restarts": 1},
        "the worker ended with signal 9: another one is started",
    ),
    (
        "HEALFS_UPGRADED",
        {"from": "0.1", "to": "0.2"},
        "upgraded from version 0.1 to 0.2",
    ),
    ("HEALFS_UPGRADE_FAILED", {"reason": "unfit"}, "upgrade given up: unfit"),
    ("HEALFS_FENCE_FAILED", {"reason": "status 1"}, "the fence failed: status 1"),
    (
        "HEALFS_POLICY_CHANGED",
        {"uid": 0, "pid": 7, **POLICIES},
        "policy changed by uid 0 (pid 7): read retry timeout 0 -> 5s, werror retry -> report",
    ),
    (
        "HEALFS_FAILED",
        {
            "uid": 0,
            "pid": 7,
            "requests": {k: {"requests": 2, "bytes": 0} for k in ("read", "write")},
        },
        "4 requests that waited were failed by uid 0 (pid 7)",
    ),
    (
        "HEALFS_FAILED",
        {"uid": 0, "pid": 7, "requests": {"read": {"requests": 1, "bytes": 0}}},
        "1 request that waited was failed by uid 0 (pid 7)",
    ),
    ("STOP", {"by": "operator", "uid": 0, "pid": 7}, "paused by uid 0 (pid 7)"),
    ("STOP", {"by": "policy", "reason": "no space"}, "paused: no space"),
    ("HEALFS_DRAINED", {"unflushed": 0}, "drained"),
    ("HEALFS_DRAINED", {"unflushed": 1}, "drained, 1 answered write not flushed"),
    ("HEALFS_DRAINED", {"unflushed": 4}, "drained, 4 answered writes not flushed"),
    ("RESUME", {"uid": 0, "pid": 7}, "resumed by uid 0 (pid 7)"),
    ("RESUME", {}, "resumed: the policy changed"),
    ("HEALFS_FAULTED", {"reason": "internal error"}, "faulted: internal error"),
    ("HEALFS_NEWS", {"a": 1, "untold": 2}, "news: a 1 (events came too fast: 2 before this one"),
]


@pytest.mark.parametrize(("name", "data", "words"), WORDS)
def test_words(name: str, data: dict[str, Any], words: str):
    said = events.sentence({"sequence": 1, "time": "", "event": name, "data": data})
    assert said == words or (name == "HEALFS_NEWS" and said.startswith(words))


def test_every_event_that_the_code_tells_has_words():
    told = set()
    for path in Path(events.__file__).parent.rglob("*.py"):
        told |= set(re.findall(r'(?:event|happened)\(\s*"([A-Z_]+)"', path.read_text()))
    assert told >= {"STOP", "HEALFS_OUTAGE", "HEALFS_MOUNTED", "HEALFS_WORKER_RESTARTED"}
    assert told - events.UNKEPT <= {name for name, _, _ in WORDS}


# --- the journal --------------------------------------------------------------------------------


def fields(datagram: bytes) -> dict[str, str]:
    """As journald parses it."""
    found = {}
    while datagram:
        line, _, datagram = datagram.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            length = int.from_bytes(datagram[:8], "little")
            value, datagram = datagram[8 : 8 + length], datagram[9 + length :]
        found[name.decode()] = value.decode()
    return found


def test_the_journal_gets_fields(tmp_path: Path):
    path = str(tmp_path / "socket")
    data = {"kind": "away", "reason": "two\nlines", "to": {"a": 1}, "seconds": 1.5}
    event = {"sequence": 5, "time": "", "event": "HEALFS_OUTAGE", "data": data}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(path)
        assert events.to_journal(event, "/mnt/vm1", path)
        assert fields(journal.recv(65536)) == {
            "MESSAGE": "/mnt/vm1: outage: the backend is away: two\nlines",
            "PRIORITY": "4",
            "SYSLOG_IDENTIFIER": "healfs",
            "HEALFS_MOUNTPOINT": "/mnt/vm1",
            "HEALFS_EVENT": "HEALFS_OUTAGE",
            "HEALFS_SEQUENCE": "5",
            "HEALFS_KIND": "away",
            "HEALFS_REASON": "two\nlines",
            "HEALFS_TO": '{"a": 1}',
            "HEALFS_SECONDS": "1.5",
        }
        # One that does not read is not waited for.
        while events.to_journal(event, "/mnt/vm1", path):
            pass
    assert not events.to_journal(event, "/mnt/vm1", str(tmp_path / "none"))


@pytest.mark.parametrize("data", [{}, {"kind": None, "uid": 0, "requests": 3, "to": [1]}])
@pytest.mark.parametrize(
    "name",
    [
        *("HEALFS_MOUNTED", "HEALFS_UNMOUNTED", "HEALFS_OUTAGE", "HEALFS_OUTAGE_CHANGED"),
        *("HEALFS_RECOVERED", "HEALFS_POLICY_CHANGED", "HEALFS_ACCEPTED", "HEALFS_FAILED"),
        *("HEALFS_DRAINED", "STOP", "RESUME", "HEALFS_NEW_IN_THE_NEXT"),
    ],
)
def test_an_event_of_another_version_is_told_as_far_as_it_is_known(
    name: str, data: dict[str, Any]
) -> None:
    """The keeper, of one version, tells what a worker of another one says."""
    assert events.sentence({"sequence": 1, "time": "", "event": name, "data": data})
