"""The states of a disk and the moves between them, as data.

A move that is not in the table raises: a bug then stops with its name on it instead of
going on in a state nobody thought of. The diagram in the man page is made from this table.
"""

from __future__ import annotations

import enum


class State(enum.StrEnum):
    CONNECTING = "connecting"  # before the first connection; only with --no-wait
    READY = "ready"
    STALLED = "stalled"  # the backend is away, or gives no answer at all
    REPLAYING = "replaying"  # it is back; the write log is written again
    PAUSED = "paused"  # by policy stop or enospc, or by the operator
    MISMATCH = "mismatch"  # what came back is another disk; it is not written to
    FAULTED = "faulted"  # a bug in healfs; requests stay parked, nothing is answered
    CLOSED = "closed"


MOVES: dict[State, dict[State, str]] = {
    State.CONNECTING: {
        State.READY: "connected",
        State.MISMATCH: "connected to a disk that is too small",
        State.PAUSED: "stop",
        State.FAULTED: "an internal error",
        State.CLOSED: "umount",
    },
    State.READY: {
        State.STALLED: "connection lost, or no answer for slow-after",
        State.REPLAYING: "a flush failed, or refused writes are tried again",
        State.PAUSED: "stop",
        State.FAULTED: "an internal error",
        State.CLOSED: "umount",
    },
    State.STALLED: {
        State.READY: "connected, or answers come again; nothing to replay",
        State.REPLAYING: "connected",
        State.MISMATCH: "connected to another disk",
        State.PAUSED: "stop",
        State.FAULTED: "an internal error",
        State.CLOSED: "umount",
    },
    State.REPLAYING: {
        State.READY: "replayed and flushed",
        State.STALLED: "connection lost again",
        State.PAUSED: "stop",
        State.FAULTED: "an internal error",
        State.CLOSED: "umount",
    },
    State.PAUSED: {
        State.READY: "cont",
        State.CONNECTING: "cont before the first connection",
        State.STALLED: "cont while the backend is away",
        State.REPLAYING: "cont with a log to replay",
        State.MISMATCH: "cont with the wrong disk",
        State.FAULTED: "an internal error",
        State.CLOSED: "umount",
    },
    State.MISMATCH: {
        State.READY: "the right disk is back; nothing to replay",
        State.REPLAYING: "the right disk is back, or the operator accepts this one",
        State.STALLED: "the wrong disk went away",
        State.CONNECTING: "the wrong disk went away before the first connection",
        State.PAUSED: "stop",
        State.FAULTED: "an internal error",
        State.CLOSED: "umount",
    },
    State.FAULTED: {
        State.CLOSED: "umount --force",
    },
    State.CLOSED: {},
}


class IllegalMove(RuntimeError):
    """The engine asked for a move that is not in the table."""


def check_move(old: State, new: State) -> None:
    """Raises IllegalMove."""
    if new not in MOVES[old]:
        raise IllegalMove(f"{old} -> {new}")
