"""The QEMU Machine Protocol's wire format, without I/O.

https://www.qemu.org/docs/master/interop/qmp-spec.html. Errors are worded as QEMU words them.
Two differences: strings are in double quotes only, and input beyond a limit ends the connection.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

MAXIMUM_MESSAGE = 65536  # bytes of one message in the input
MAXIMUM_NESTING = 32

_BLANK = b" \t\r\n"
_OPEN, _CLOSE = b"{[", b"}]"
_QUOTE, _BACKSLASH = ord('"'), ord("\\")
# What ends a bare word on the top level. Only objects are welcome there, so a word is an error.
_WORD_END = _BLANK + _OPEN + b'"'


class ProtocolError(Exception):
    """Input that is no command: the error to send. `fatal`: the connection is of no more use."""

    def __init__(self, desc: str, *, fatal: bool = False, id: Any = None, has_id: bool = False):
        super().__init__(desc)
        self.desc = desc
        self.fatal = fatal
        self.id = id
        self.has_id = has_id


@dataclass(frozen=True, slots=True)
class Command:
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    id: Any = None
    has_id: bool = False  # null is an id too


class Splitter:
    """Cuts a stream of JSON into messages, with or without newlines between them."""

    def __init__(self) -> None:
        self._message = bytearray()
        self._nesting = 0
        self._in_string = False
        self._escaped = False

    def feed(self, data: bytes) -> Iterator[bytes | ProtocolError]:
        """The messages that end in `data`. After a fatal error, feed no more."""
        for byte in data:
            result = self._step(byte)
            if result is not None:
                yield result
                if isinstance(result, ProtocolError) and result.fatal:
                    return

    def _take(self) -> bytes:
        message = bytes(self._message)
        self._message.clear()
        self._nesting, self._in_string, self._escaped = 0, False, False
        return message

    def _fail(self, desc: str, *, fatal: bool = False) -> ProtocolError:
        self._take()
        return ProtocolError(desc, fatal=fatal)

    def _step(self, byte: int) -> bytes | ProtocolError | None:
        if not self._message and byte in _BLANK:
            return None
        if len(self._message) >= MAXIMUM_MESSAGE:
            return self._fail("JSON token size limit exceeded", fatal=True)
        if self._in_string:
            return self._step_in_string(byte)
        if byte == 0xFF or (byte < 0x20 and byte not in _BLANK):
            # Never valid in UTF-8 JSON: a client sends it to make the parser start afresh.
            return self._fail("JSON parse error, stray control character")
        if self._nesting == 0 and self._message and byte in _WORD_END:
            word = self._take()
            self._step(byte)  # a blank, or the first byte of the next message: never a result
            return word
        self._message.append(byte)
        if byte == _QUOTE:
            self._in_string = True
        elif byte in _OPEN:
            self._nesting += 1
            if self._nesting > MAXIMUM_NESTING:
                return self._fail("JSON nesting depth limit exceeded", fatal=True)
        elif byte in _CLOSE:
            self._nesting -= 1
            if self._nesting <= 0:
                return self._take()
        return None

    def _step_in_string(self, byte: int) -> bytes | ProtocolError | None:
        if byte < 0x20 or byte == 0xFF:
            return self._fail("JSON parse error, control character in a string")
        self._message.append(byte)
        if self._escaped:
            self._escaped = False
        elif byte == _BACKSLASH:
            self._escaped = True
        elif byte == _QUOTE:
            self._in_string = False
            if self._nesting == 0:
                return self._take()
        return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"invalid keyword '{text}'")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("number out of range")
    return value


def parse(message: bytes) -> Any:
    """One JSON value; duplicate keys and infinite numbers refused. Raises ProtocolError."""
    try:
        return json.loads(
            message.decode(),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except json.JSONDecodeError as exc:
        raise ProtocolError(f"JSON parse error, {exc.msg.lower()} at byte {exc.pos}") from None
    except ValueError as exc:  # UnicodeDecodeError is one
        raise ProtocolError(f"JSON parse error, {exc}") from None


def parse_command(message: bytes) -> Command:
    """Raises ProtocolError, with the id where there was one."""
    value = parse(message)
    if not isinstance(value, dict):
        raise ProtocolError("QMP input must be a JSON object")

    def refuse(desc: str) -> NoReturn:
        raise ProtocolError(desc, id=value.get("id"), has_id="id" in value)

    for key in value:
        if key not in ("execute", "arguments", "id"):
            refuse(f"QMP input member '{key[:100]}' is unexpected")
    if "execute" not in value:
        refuse("QMP input lacks member 'execute'")
    if not isinstance(value["execute"], str):
        refuse("QMP input member 'execute' must be a string")
    if not isinstance(value.get("arguments", {}), dict):
        refuse("QMP input member 'arguments' must be an object")
    return Command(value["execute"], value.get("arguments", {}), value.get("id"), "id" in value)


def version(text: str) -> dict[str, Any]:
    """query-version's answer. QEMU's place for the numbers holds healfs's own."""
    numbers = [int(part) for part in text.split(".")[:3] if part.isdigit()] + [0, 0, 0]
    return {
        "qemu": {"major": numbers[0], "minor": numbers[1], "micro": numbers[2]},
        "package": f"healfs {text}",
    }


def greeting(text: str) -> dict[str, Any]:
    return {"QMP": {"version": version(text), "capabilities": []}}


def success(value: Any, command: Command) -> dict[str, Any]:
    return {"return": value} | ({"id": command.id} if command.has_id else {})


def failure(
    desc: str, cls: str = "GenericError", of: Command | ProtocolError | None = None
) -> dict[str, Any]:
    error: dict[str, Any] = {"error": {"class": cls, "desc": desc}}
    return error | ({"id": of.id} if of is not None and of.has_id else {})


def event(name: str, data: dict[str, Any], now: float) -> dict[str, Any]:
    """`now`: seconds since the epoch, when it happened."""
    micro = round(now * 1_000_000)
    stamp = {"seconds": micro // 1_000_000, "microseconds": micro % 1_000_000}
    return {"event": name, "timestamp": stamp} | ({"data": data} if data else {})


def encode(message: dict[str, Any]) -> bytes:
    """One line. Raises ValueError and TypeError for what JSON has no word for."""
    return json.dumps(message, allow_nan=False).encode() + b"\r\n"
