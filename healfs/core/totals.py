# cython: annotation_typing=False
"""What was done since the mount: counters only."""

from __future__ import annotations

from healfs.core.request import Kind


class Totals:
    """By Kind: requests answered, bytes of those answered with success, errors."""

    def __init__(self) -> None:
        self.requests = [0] * len(Kind)
        self.bytes = [0] * len(Kind)
        self.errors = [0] * len(Kind)
        self.retries = 0
        self.reconnects = 0
        self.ignored_bytes = 0
        self.failed_by_operator = 0  # requests answered with an error on demand

    def count(self, kind: Kind, length: int, errno: int) -> None:
        index: int = kind  # looked up once
        self.requests[index] += 1
        if errno:
            self.errors[index] += 1
        else:
            self.bytes[index] += length

    def uncount(self, kind: Kind, errno: int) -> None:
        """It was no guest's, and had no bytes."""
        self.requests[kind] -= 1
        self.errors[kind] -= bool(errno)

    def as_dict(self) -> dict[str, object]:
        kinds: dict[str, object] = {
            kind.name.lower(): {
                "requests": self.requests[kind],
                "bytes": self.bytes[kind],
                "errors": self.errors[kind],
            }
            for kind in Kind
        }
        return kinds | {
            "retries": self.retries,
            "reconnects": self.reconnects,
            "ignored_bytes": self.ignored_bytes,
            "failed_by_operator": self.failed_by_operator,
        }
