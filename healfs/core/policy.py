"""The error policy: an immutable value and a pure function from error to action.

Names and meanings are QEMU's (rerror, werror: report, ignore, enospc, stop), with one more,
retry, as a phase before any other: retry for retry_timeout, then do what `then` says.
"""

from __future__ import annotations

import enum
import errno as e
import math
from dataclasses import dataclass, field, replace

from healfs.core.kind import Kind


class Action(enum.StrEnum):
    """What to do with an error."""

    REPORT = "report"
    IGNORE = "ignore"
    ENOSPC = "enospc"
    STOP = "stop"
    RETRY = "retry"


class PolicyError(ValueError):
    """A policy that cannot be; the text says why and what can."""


@dataclass(frozen=True, slots=True)
class DirectionPolicy:
    """The policy of one direction. Times in seconds; retry_timeout 0: for ever."""

    error: Action = Action.RETRY
    retry_interval: float = 1.0
    retry_timeout: float = 0.0
    then: Action = Action.REPORT

    def __post_init__(self) -> None:
        if self.then is Action.RETRY:
            raise PolicyError("then: retry cannot follow retry; use report, stop, enospc or ignore")
        if not 0.001 <= self.retry_interval <= 86400:
            raise PolicyError("retry-interval: must be from 1ms to 24h")
        if not 0 <= self.retry_timeout <= 10 * 365 * 86400:
            raise PolicyError("retry-timeout: must be 0 (for ever) or up to 10 years")

    @property
    def times_out(self) -> bool:
        return self.error is Action.RETRY and self.retry_timeout > 0

    def ends(self, since: float) -> float:
        """The first time at which `decide` says no more RETRY to an error that began at `since`;
        inf: it never does, or never did."""
        if not self.times_out:
            return math.inf
        end = since + self.retry_timeout
        while end - since < self.retry_timeout:  # rounded down: who looks then would look in vain
            end = math.nextafter(end, math.inf)
        return end

    def decide(self, kind: Kind, errno: int, age: float) -> Action:
        """RETRY, REPORT, IGNORE or STOP, for an error that began `age` seconds ago.

        A FLUSH is never ignored: who is told that data is stable acts on it.
        """
        action = self.error
        if action is Action.RETRY:
            if self.retry_timeout == 0 or age < self.retry_timeout:
                return Action.RETRY
            action = self.then
        if action is Action.ENOSPC:
            return Action.STOP if errno == e.ENOSPC else Action.REPORT
        if action is Action.IGNORE and kind is Kind.FLUSH:
            return Action.REPORT
        return action

    def as_dict(self, direction: str) -> dict[str, object]:
        """As status shows it; times in seconds."""
        return {
            "rerror" if direction == "read" else "werror": str(self.error),
            "retry_interval": self.retry_interval,
            "retry_timeout": self.retry_timeout,
            "then": str(self.then),
        }


@dataclass(frozen=True, slots=True)
class Policy:
    """Both directions: `read` for READ; `write` for WRITE, FLUSH, DISCARD, WRITE_ZEROES."""

    read: DirectionPolicy = field(default_factory=DirectionPolicy)
    write: DirectionPolicy = field(default_factory=DirectionPolicy)

    def __post_init__(self) -> None:
        for name, action in (("rerror", self.read.error), ("read-then", self.read.then)):
            if action is Action.ENOSPC:
                raise PolicyError(f"{name}: enospc is for writes only; use report, ignore or stop")

    def of(self, kind: Kind) -> DirectionPolicy:
        return self.read if kind is Kind.READ else self.write

    def change(
        self,
        read: dict[str, object] | None = None,
        write: dict[str, object] | None = None,
    ) -> Policy:
        """A changed copy; keys are the fields of DirectionPolicy. Raises PolicyError."""

        def changed(old: DirectionPolicy, keys: dict[str, object] | None) -> DirectionPolicy:
            return replace(old, **(keys or {}))  # type: ignore[arg-type]

        return Policy(changed(self.read, read), changed(self.write, write))

    def as_dict(self) -> dict[str, dict[str, object]]:
        return {"read": self.read.as_dict("read"), "write": self.write.as_dict("write")}

    def as_options(self) -> dict[str, object]:
        """By the names of the options of `healfs mount`: rerror, read_then, write_then, ..."""
        options: dict[str, object] = {}
        for direction, keys in self.as_dict().items():
            for key, value in keys.items():
                options[key if key.endswith("error") else f"{direction}_{key}"] = value
        return options

    @classmethod
    def from_dict(cls, data: dict[str, dict[str, object]]) -> Policy:
        """The inverse of as_dict. Raises PolicyError."""

        def direction(keys: dict[str, object], error_key: str) -> DirectionPolicy:
            try:
                return DirectionPolicy(
                    error=Action(str(keys[error_key])),
                    retry_interval=float(keys["retry_interval"]),  # type: ignore[arg-type]
                    retry_timeout=float(keys["retry_timeout"]),  # type: ignore[arg-type]
                    then=Action(str(keys["then"])),
                )
            except (KeyError, TypeError, ValueError) as exc:
                raise PolicyError(f"not a policy: {exc}") from None

        return cls(direction(data["read"], "rerror"), direction(data["write"], "werror"))
