"""One thing that was looked at."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Level(enum.StrEnum):
    OK = "ok"
    NOTE = "note"  # worth knowing
    WARNING = "warning"  # an outage is worse than it need be
    ERROR = "error"  # a promise does not hold


@dataclass(frozen=True, slots=True)
class Finding:
    """`mend` is a line for a shell: a command that mends it, or leads to it, or as a comment what
    to do where no command does. Only what is OK has none."""

    check: str
    level: Level
    text: str
    mend: str = ""
