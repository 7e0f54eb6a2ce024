"""What the daemon of one mount says of its backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from healfs.doctor.finding import Finding, Level

_LACKS = {
    "write_zeroes": "zeroes are written as data: a guest's discard and zeroing are slow",
    "discard": "discards do nothing: the space a guest frees is not given back",
    "fua": "a synchronous write is a write and a flush",
}


def examine(status: dict[str, Any]) -> list[Finding]:
    """`status` is the answer to healfs-query-status."""
    return list(_findings(status))


def _findings(status: dict[str, Any]) -> Iterator[Finding]:
    mountpoint = status.get("mountpoint")
    state = str(status.get("state"))
    if state == "ready":
        yield Finding("state", Level.OK, "ready")
    else:
        yield Finding(
            "state", Level.WARNING, f"{state}: {status.get('reason') or 'no reason given'}"
        )
    abilities = status.get("backend")
    if not abilities:
        yield Finding("backend", Level.NOTE, "not connected since this worker began: not known")
    else:
        yield from _abilities(abilities, str(status.get("source")))
    for note in status.get("notes") or []:
        yield Finding("note", Level.WARNING, str(note))
    policy = status.get("policy") or {}
    for direction, key in (("read", "rerror"), ("write", "werror")):
        error = (policy.get(direction) or {}).get(key)
        if error not in (None, "retry"):
            yield Finding(
                f"policy, {direction}s",
                Level.NOTE,
                f"{error}: an outage is not waited out",
                f"healfs policy --{key} retry {mountpoint}",
            )


def _abilities(abilities: dict[str, Any], source: str) -> Iterator[Finding]:
    if not abilities.get("flush"):
        yield Finding(
            "backend",
            Level.ERROR,
            "it cannot flush: nothing is known to be stable, and there is no write log",
            "serve it by one that can flush (nbdkit and qemu-nbd do for files)",
        )
    elif not abilities.get("volatile_cache"):
        yield Finding(
            "backend", Level.OK, "no volatile cache: what is answered is stable; no log is needed"
        )
    else:
        yield Finding("backend", Level.OK, "it flushes; what is not flushed is in the write log")
    for ability, text in _LACKS.items():
        if not abilities.get(ability):
            yield Finding("backend", Level.NOTE, text)
    if source.startswith("nbd") and not abilities.get("multi_conn"):
        yield Finding("backend", Level.NOTE, "the server takes one connection (no multi-conn)")
