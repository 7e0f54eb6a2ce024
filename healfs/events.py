"""What happened to a mount: the last events, in a file that outlives its processes.

The keeper writes, the worker tells it; whoever may read the run-time files reads. The names are
those of QMP's events. The file is in the run-time directory, which is memory: writing to it waits
for no disk. Standard library only, but for healfs.config: the keeper uses it.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from healfs.config import counted, format_duration, format_size

KEPT = 1000
TEXT = 500  # characters of a text in an event: a server's own words may be long
BURST, EVERY = 20, 30.0  # events of one mount told at once; then one in so many seconds
JOURNAL = "/run/systemd/journal/socket"

# Of each request, or of a try: the log has them, and QMP, but they are no history.
UNKEPT = frozenset({"BLOCK_IO_ERROR"})

CRITICAL, ERROR, WARNING, NOTICE, INFO = range(2, 7)  # as in syslog(3)
PRIORITIES = {
    "HEALFS_FAULTED": CRITICAL,
    "HEALFS_MISMATCH": ERROR,
    "HEALFS_FENCE_FAILED": ERROR,
    "HEALFS_UPGRADE_FAILED": ERROR,
    "HEALFS_OUTAGE": WARNING,
    "HEALFS_OUTAGE_CHANGED": WARNING,
    "HEALFS_WORKER_RESTARTED": WARNING,
    "HEALFS_MOUNTED": INFO,
    "HEALFS_UNMOUNTED": INFO,
    "HEALFS_DRAINED": INFO,
}
KINDS = {
    "away": "the backend is away",
    "silent": "the backend does not answer",
    "worker": "the worker died",
}

Event = dict[str, Any]  # sequence, time (ISO 8601), event (its name), data


class History:
    """The events of one mountpoint, of one mount after the other. One writer at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        events = read(path)
        self._sequence = events[-1]["sequence"] if events else 0
        self._lines = 0
        try:
            text = path.read_bytes()
            self._lines = text.count(b"\n")
            self._whole = not text or text.endswith(b"\n")
        except OSError:
            self._whole = True

    def add(self, name: str, data: dict[str, Any], when: float) -> Event:
        """`when`: seconds since the epoch. Raises OSError: it is not kept then."""
        self._sequence += 1
        event = {
            "sequence": self._sequence,
            "time": datetime.fromtimestamp(when, UTC).isoformat(timespec="milliseconds"),
            "event": name,
            "data": _bounded(data),
        }
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._lines >= KEPT:
            self._path.replace(_older(self._path))
            self._lines = 0
        line = json.dumps(event).encode() + b"\n"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self._path, flags, 0o600)
        try:
            # One write: killed in it, the keeper leaves a line that is whole, or the last.
            line = line if self._whole else b"\n" + line
            self._whole = os.write(fd, line) == len(line)
            if not self._whole:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        finally:
            os.close(fd)
        self._lines += 1
        return event


def _older(path: Path) -> Path:
    return path.with_suffix(".old")


def _bounded(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _bounded(value) for key, value in data.items()}
    return data[:TEXT] if isinstance(data, str) else data


def read(path: Path) -> list[Event]:
    """The last KEPT events, oldest first; what cannot be read is not among them."""
    found: dict[int, Event] = {}
    # The newer file first: when the writer begins another one in between, nothing is missed.
    for file in path, _older(path):
        for event in _events(file):
            found[event["sequence"]] = event
    return [found[sequence] for sequence in sorted(found)][-KEPT:]


def _events(path: Path) -> Iterator[Event]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            event = json.loads(line)
            if isinstance(event["sequence"], int) and isinstance(event["data"], dict):
                yield event
        except (ValueError, KeyError, TypeError):
            continue  # its writer was killed


class Throttle:
    """A backend that flaps must not push everything else out of the history.

    BURST events are told at once; what comes faster is held back but for the newest, which is
    told when there is room, with the number of those `untold`: so the last word is always true.
    What a person did is told always, and the end of the worker by an internal error.
    """

    def __init__(self) -> None:
        self._room, self._at = float(BURST), 0.0
        self._last: tuple[str, dict[str, Any]] | None = None
        self._held: tuple[str, dict[str, Any], float] | None = None
        self._untold = 0

    def offer(self, name: str, data: dict[str, Any], now: float) -> list[tuple[str, Any, float]]:
        """What to tell now: (name, data, when it happened), oldest first."""
        if self._held is None and self._last == (name, data):
            return []  # the same fence has failed once more
        self._last = name, data
        if "uid" in data or name == "HEALFS_FAULTED":
            return [*self._release(), (name, data, now)]
        if self._held is not None or not self._has_room(now):
            self._untold += self._held is not None
            self._held = name, data, now
            return []
        self._room -= 1
        return [(name, data, now)]

    def _has_room(self, now: float) -> bool:
        self._room = min(BURST, self._room + max(0.0, now - self._at) / EVERY)
        self._at = now
        return self._room >= 1

    def _release(self) -> list[tuple[str, Any, float]]:
        held, self._held = self._held, None
        if held is None:
            return []
        untold, self._untold = self._untold, 0
        return [(held[0], held[1] | ({"untold": untold} if untold else {}), held[2])]

    @property
    def pause(self) -> float | None:
        """Seconds until `due` has something; None: nothing is held back."""
        return None if self._held is None else max(0.0, (1 - self._room) * EVERY)

    def due(self, now: float) -> list[tuple[str, Any, float]]:
        """What was held back and may be told now."""
        if self._held is None or not self._has_room(now):
            return []
        self._room -= 1
        return self._release()


# --- for people ---------------------------------------------------------------------------------


def priority(event: Event) -> int:
    return PRIORITIES.get(event["event"], NOTICE)


def sentence(event: Event) -> str:
    """One event in words."""
    data: dict[str, Any] = event["data"]
    try:
        text = _sentence(event["event"], data)
    except (KeyError, TypeError, ValueError, AttributeError):  # another version's: other keys
        text = _plainly(event["event"], data)
    if untold := data.get("untold"):
        text += f" (events came too fast: {untold} before this one are not told)"
    return text


def _sentence(name: str, data: dict[str, Any]) -> str:
    reason = str(data.get("reason", ""))
    match name:
        case "HEALFS_MOUNTED":
            return f"mounted {data.get('source')}"
        case "HEALFS_UNMOUNTED":
            return _unmounted(data)
        case "HEALFS_OUTAGE":
            return _with(f"outage: {KINDS.get(data['kind'], data['kind'])}", reason)
        case "HEALFS_OUTAGE_CHANGED":
            return _with(f"still an outage: {KINDS.get(data['kind'], data['kind'])}", reason)
        case "HEALFS_MISMATCH":
            return _with("another disk came back, it is not written to", reason)
        case "HEALFS_RECOVERED":
            return _recovered(data)
        case "HEALFS_WORKER_RESTARTED":
            return f"the worker {reason}: another one is started"
        case "HEALFS_UPGRADED":
            return f"upgraded from version {data.get('from')} to {data.get('to')}"
        case "HEALFS_UPGRADE_FAILED":
            return _with("upgrade given up", reason)
        case "HEALFS_FENCE_FAILED":
            return _with("the fence failed", reason)
        case "HEALFS_POLICY_CHANGED":
            return f"policy changed by {_who(data)}: {_changes(data)}"
        case "HEALFS_ACCEPTED":
            writes = counted(data["unflushed"], "unflushed write")
            return f"the other disk was accepted by {_who(data)}: {writes} {data['log']}"
        case "HEALFS_RECONNECT":
            return f"a new connection was asked for by {_who(data)}"
        case "HEALFS_FAILED":
            count = sum(kind["requests"] for kind in data["requests"].values())
            text = counted(count, "request that waited was", "requests that waited were")
            return f"{text} failed by {_who(data)}"
        case "STOP":
            return f"paused by {_who(data)}" if "uid" in data else _with("paused", reason)
        case "RESUME":
            return f"resumed by {_who(data)}" if "uid" in data else "resumed: the policy changed"
        case "HEALFS_DRAINED":
            if unflushed := data.get("unflushed"):
                return f"drained, {counted(unflushed, 'answered write')} not flushed"
            return "drained"
        case "HEALFS_FAULTED":
            return _with("faulted", reason)
    return _plainly(name, data)


def _plainly(name: str, data: dict[str, Any]) -> str:
    rest = ", ".join(f"{key} {value}" for key, value in data.items() if key != "untold")
    return _with(name.removeprefix("HEALFS_").lower().replace("_", " "), rest)


def _with(text: str, reason: str) -> str:
    return f"{text}: {reason}" if reason else text


def _who(data: dict[str, Any]) -> str:
    return f"uid {data['uid']} (pid {data.get('pid')})"


def _unmounted(data: dict[str, Any]) -> str:
    text = f"unmounted by {_who(data)}" if "uid" in data else "unmounted"
    text = _with(text, str(data.get("reason", "")))
    if seconds := data.get("outage_seconds"):
        text += f", in an outage of {format_duration(float(seconds))}"
    lost = [
        f"{given['requests']} {kind.replace('_', ' ')} ({format_size(given['bytes'])})"
        for kind, given in data.get("given_up", {}).items()
    ]
    return f"{text}; given up: {', '.join(lost)}" if lost else text


def _recovered(data: dict[str, Any]) -> str:
    text = f"outage over after {format_duration(float(data['seconds']))}"
    if not (waited := data.get("requests_waited")):
        return f"{text}: no request waited"
    longest = format_duration(float(data.get("longest_wait", 0)))
    return f"{text}: {counted(waited, 'request')} waited, the longest {longest}"


def _changes(data: dict[str, Any]) -> str:
    changes = []
    for direction, new in data["to"].items():
        for key, value in new.items():
            if (old := data["from"].get(direction, {}).get(key)) != value:
                word = key if key in ("rerror", "werror") else f"{direction} {key}"
                changes.append(f"{word.replace('_', ' ')} {_setting(old)} -> {_setting(value)}")
    return ", ".join(changes) or "nothing"


def _setting(value: object) -> str:
    """A word of the policy, or a time."""
    return format_duration(value) if isinstance(value, int | float) else str(value)


# --- for systemd's journal ----------------------------------------------------------------------


def to_journal(event: Event, mountpoint: str, path: str = JOURNAL) -> bool:
    """Send it with fields of its own; False when nobody takes it. Never waits.

    https://systemd.io/JOURNAL_NATIVE_PROTOCOL/
    """
    fields = {
        "MESSAGE": f"{mountpoint}: {sentence(event)}",
        "PRIORITY": str(priority(event)),
        "SYSLOG_IDENTIFIER": "healfs",
        "HEALFS_MOUNTPOINT": mountpoint,
        "HEALFS_EVENT": event["event"],
        "HEALFS_SEQUENCE": str(event["sequence"]),
    }
    for key, value in event["data"].items():
        text = value if isinstance(value, str) else json.dumps(value)
        fields[f"HEALFS_{key.upper()}"] = text
    datagram = b"".join(_field(name, text) for name, text in fields.items())
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto(datagram, socket.MSG_DONTWAIT, path)
    except OSError:
        return False
    return True


def _field(name: str, text: str) -> bytes:
    value = text.encode(errors="surrogateescape")
    if b"\n" not in value:
        return name.encode() + b"=" + value + b"\n"
    return name.encode() + b"\n" + len(value).to_bytes(8, "little") + value + b"\n"
