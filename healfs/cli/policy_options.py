"""The policy's options, shared by mount and policy."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from healfs.config import ConfigError, parse_duration, parse_size
from healfs.core.policy import Action

_F = TypeVar("_F", bound=Callable[..., Any])
_THEN = [str(action) for action in Action if action is not Action.RETRY]
_READ_ERROR = [str(action) for action in Action if action is not Action.ENOSPC]
_WRITE_ERROR = [str(action) for action in Action]


class Duration(click.ParamType[float]):
    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        try:
            return value if isinstance(value, float) else parse_duration(value)
        except ConfigError as exc:
            self.fail(str(exc), param, ctx)


class Size(click.ParamType[int]):
    name = "size"

    def __init__(self, zero: str = "") -> None:
        self._zero = zero  # why 0 cannot be; "": it can

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            size = value if isinstance(value, int) else parse_size(value)
        except ConfigError as exc:
            self.fail(str(exc), param, ctx)
        if size == 0 and self._zero:
            self.fail(self._zero, param, ctx)
        return size


DURATION = Duration()
SIZE = Size("a disk of 0 bytes is none")
BYTES = Size()

_OPTIONS = [
    click.option(
        "--rerror", type=click.Choice(_READ_ERROR), help="What to do with a failed read. [retry]"
    ),
    click.option(
        "--werror",
        type=click.Choice(_WRITE_ERROR),
        help="What to do with a failed write, flush, discard or write-zeroes. [retry]",
    ),
    click.option(
        "--retry-interval", type=DURATION, help="The longest pause between two tries. [1s]"
    ),
    click.option("--read-retry-interval", type=DURATION, help="The same, for reads only."),
    click.option("--write-retry-interval", type=DURATION, help="The same, for writes only."),
    click.option("--retry-timeout", type=DURATION, help="Retry for so long; 0: for ever. [0]"),
    click.option("--read-retry-timeout", type=DURATION, help="The same, for reads only."),
    click.option("--write-retry-timeout", type=DURATION, help="The same, for writes only."),
    click.option(
        "--then",
        type=click.Choice(_THEN),
        help="What to do after --retry-timeout; enospc is set for writes only. [report]",
    ),
    click.option("--read-then", type=click.Choice(_THEN), help="The same, for reads only."),
    click.option("--write-then", type=click.Choice(_THEN), help="The same, for writes only."),
]


def policy_options(function: _F) -> _F:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def without_defaults(command: click.Command) -> click.Command:
    """What is not given stays as it is."""
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.help:
            parameter.help = re.sub(r" \[\w+\]$", "", parameter.help)
    return command


def changes(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of core.policy.DirectionPolicy that the options name, for reads and for writes.

    An option with a direction wins over the one without. `--then enospc` leaves reads as they
    are: there is no such policy for them, and the wish is clear.
    """
    read: dict[str, Any] = {}
    write: dict[str, Any] = {}
    for direction, keys in (("read", read), ("write", write)):
        for key in ("retry_interval", "retry_timeout", "then"):
            value = options.get(f"{direction}_{key}")
            both = options.get(key)
            if value is None and not (direction == "read" and both == Action.ENOSPC):
                value = both
            if value is not None:
                keys[key] = Action(value) if key == "then" else value
    if options.get("rerror") is not None:
        read["error"] = Action(options["rerror"])
    if options.get("werror") is not None:
        write["error"] = Action(options["werror"])
    return read, write
