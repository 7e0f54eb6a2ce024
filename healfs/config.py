"""What an operator writes and reads: durations, sizes, lines; the configuration of one mount."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from healfs.core.policy import Policy

_DURATION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)(ms|s|m|h)", re.ASCII)
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_SIZE = re.compile(r"([0-9]{1,19})([KMGTPE]?)", re.ASCII | re.IGNORECASE)
_SIZE_UNITS = "KMGTPE"
_MAXIMUM_SIZE = 2**63 - 1  # off_t
MAXIMUM_UIDS = 256  # of allow_uid
# The keeper greets each worker with one packet of 64 KiB, and this is the most of it.
MAXIMUM_CONFIGURATION = 56 << 10


class ConfigError(ValueError):
    """What the operator wrote cannot be; the text says what is accepted."""


def parse_duration(text: str) -> float:
    """Seconds from "500ms", "5s", "2m", "1h" or "0". Raises ConfigError."""
    if text == "0":
        return 0.0
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not a duration; write 500ms, 5s, 2m, 1h or 0")
    return float(match[1]) * _SECONDS[match[2]]


def format_duration(seconds: float) -> str:
    """For people: "0", "500ms", "5s", "2m 5s", "1h 2m". Tenths only below ten seconds."""
    if seconds <= 0:
        return "0"
    if seconds < 0.9995:
        return f"{max(1, round(seconds * 1000))}ms"
    if seconds < 9.95:
        return f"{seconds:.1f}".removesuffix(".0") + "s"
    whole = round(seconds)
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "m")]
    parts.append((whole % 60, "s"))
    first = next(i for i, (count, _) in enumerate(parts) if count)
    return " ".join(f"{count}{unit}" for count, unit in parts[first : first + 2] if count)


def parse_size(text: str) -> int:
    """Bytes from "512", "64M", "10G" (units of 1024). Raises ConfigError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not a size; write bytes, or 64K, 64M, 10G, 1T")
    power = _SIZE_UNITS.index(match[2].upper()) + 1 if match[2] else 0
    size = int(match[1]) << (10 * power)
    if size > _MAXIMUM_SIZE:
        raise ConfigError(f"{text!r} is too large; the largest file is 8E - 1 bytes")
    return size


def format_size(size: int) -> str:
    """For people, in the units that parse_size reads: "512 B", "64 MiB", "1.5 GiB"."""
    value, unit = float(size), "B"
    for letter in _SIZE_UNITS:
        # Half a tenth early, so that no "1024.0 KiB" is shown.
        if value < 1024 if unit == "B" else value < 1023.95:
            break
        value, unit = value / 1024, f"{letter}iB"
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"


def counted(number: int, one: str, many: str = "") -> str:
    """For people: "1 request waits", "2 requests wait"; `many` is `one` with an s by default."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def os_error_words(error: OSError) -> str:
    """For people: the file, where one is named, and what the system says; no number."""
    said = error.strerror or str(error)
    return f"{error.filename}: {said}" if error.filename else said


def retrying_words(retrying: dict[str, Any]) -> str:
    """For people, of status's `retrying`."""
    number, seconds = int(retrying["requests"]), float(retrying["seconds"])
    failed = counted(number, "request fails", "requests fail")
    tried = "is tried again" if number == 1 else "are tried again"
    return f"{failed}, for {format_duration(seconds)} now, and {tried}: {retrying['reason']}"


def spans(ranges: Iterable[Sequence[int]]) -> list[str]:
    """For people, of (offset, length): "0-4095"."""
    return [f"{offset}-{offset + length - 1}" for offset, length in ranges]


def one_line(text: str) -> str:
    """Without line breaks and without what could steer a terminal: names come from anywhere."""
    lines = (line.strip() for line in text.replace("\t", " ").splitlines())
    spaced = " ".join(line for line in lines if line)
    return "".join("?" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in spaced)


def shell_word(text: str) -> str:
    """For a command that is to be pasted; in $'...', which dash does not know, only where a line of
    text cannot have it."""
    if text.isprintable():
        return shlex.quote(text)
    safe = (" " <= chr(byte) <= "~" and chr(byte) not in "\\'" for byte in os.fsencode(text))
    parts = zip(os.fsencode(text), safe, strict=True)
    return "$'" + "".join(chr(byte) if plain else f"\\{byte:03o}" for byte, plain in parts) + "'"


@dataclass(frozen=True, slots=True)
class MountConfig:
    """One mount, as the CLI hands it to the keeper. Sizes in bytes, times in seconds.

    `mountpoint`, a path as `source`, and `fault` are absolute: the daemon leaves the directory
    it was started in. `create` is the size of the file to create, `size` the disk's size as
    the operator says it (with no_wait, where nobody can be asked). `configuration` is what
    status says of all this: the file, and each value with where it came from.
    """

    source: str
    mountpoint: str
    name: str = "disk.img"
    read_only: bool = False
    create: int | None = None
    policy: Policy = field(default_factory=Policy)
    slow_after: float = 5.0
    device: str = "virtio-blk"
    allow_other: bool = False
    allow_uid: tuple[int, ...] = ()  # who may use the control socket beside the owner and root
    no_wait: bool = False
    size: int | None = None
    foreground: bool = False
    fault: str | None = None
    log_size: int = 64 << 20
    log_entries: int = 16384
    settle: float | None = None  # None: as the backend says
    fence: str | None = None
    configuration: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["policy"] = self.policy.as_dict()
        return json.dumps(values)

    def greeting_bytes(self) -> int:
        """What this takes of a greeting, where it is a text in an object."""
        return len(json.dumps(self.to_json()))

    @classmethod
    def from_json(cls, text: str) -> MountConfig:
        """The inverse of to_json. Raises ConfigError, PolicyError."""
        try:
            values = json.loads(text)
            values["policy"] = Policy.from_dict(values["policy"])
            values["allow_uid"] = tuple(values.get("allow_uid", ()))
            return cls(**values)
        except (KeyError, TypeError, json.JSONDecodeError) as exc:
            raise ConfigError(f"not a mount's configuration: {exc}") from None
