"""What the daemon of one mount says of its backend."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from healfs.config import retrying_words, shell_word
from healfs.doctor.finding import Finding, Level

_BOTH = "nbdkit file and qemu-nbd do so by themselves"
# What a backend may lack: what that means, and what mends it at an NBD server, and of a file.
_LACKS = {
    "write_zeroes": (
        "zeroes are written as data: a guest's discard and zeroing are slow",
        f"# serve it by one that writes zeroes: {_BOTH}",
        "# keep it where zeroes cost nothing: ext4, XFS, NFS 4.2, a thin block device",
    ),
    "discard": (
        "discards do nothing: the space a guest frees is not given back",
        "# nbd-server: trim = true; qemu-nbd --discard=unmap; nbdkit file does so by itself",
        "# keep it where holes can be made: ext4, XFS, NFS 4.2, a thin block device",
    ),
    "fua": (
        "a synchronous write is a write and a flush",
        f"# nbd-server: fua = true; {_BOTH}",
        "",  # every file can
    ),
}

_STATES = {
    "stalled": "healfs events {} # since when; healfs reconnect gives up a connection that hangs",
    "connecting": "healfs events {} # it was never there: start the server, or mend the source",
    "replaying": "healfs status {} # it writes what was not flushed; wait until it is ready",
    "paused": "healfs resume {}",
    "mismatch": "healfs status {} # the right disk is waited for; this one: healfs accept --help",
    "faulted": "healfs events {} # please report; healfs umount --force gives up what waits",
}

# How the notes of status begin, and what mends each.
_NOTES = {
    "the write log's": "ulimit -l unlimited # as root, and mount again; in a unit LimitMEMLOCK=",
    "io_uring is not": "healfs doctor # the sysctl; in a container its seccomp profile",
    "no locks": "# keep the file where locks work (NFS: without nolock)",
    "this kernel": "healfs doctor # where to get a newer one",
    "the keeper is gone": "healfs umount {} # it flushes first; then mount it again",
    "who the server is": "# take tls-verify-peer=0 out of the source, and mount it again",
    "any server": "# put tls-hostname=NAME into the source, and mount it again",
    "the last": "# make the disk's size a multiple of the server's block",
}
_OTHER_NOTES = "# healfs-semantics(7), LIMITS: what follows from it"


def examine(status: dict[str, Any]) -> list[Finding]:
    """`status` is the answer to healfs-query-status."""
    return list(_findings(status, shell_word(str(status.get("mountpoint")))))


def _findings(status: dict[str, Any], mountpoint: str) -> Iterator[Finding]:
    state = str(status.get("state"))
    if state == "ready" and (retrying := status.get("retrying")):
        mend = f"healfs policy --help # or mend the storage: see healfs status {mountpoint}"
        yield Finding("state", Level.WARNING, f"ready, but {retrying_words(retrying)}", mend)
    elif state == "ready":
        yield Finding("state", Level.OK, "ready")
    else:
        level = Level.ERROR if state == "faulted" else Level.WARNING
        text = f"{state}: {status.get('reason') or 'no reason given'}"
        mend = _STATES.get(state, "healfs status {}")
        yield Finding("state", level, text, mend.format(mountpoint))
    abilities = status.get("backend")
    if not abilities:
        yield Finding(
            "backend",
            Level.NOTE,
            "not connected since this worker began: not known",
            f"healfs doctor {mountpoint} # again, when it is ready",
        )
    else:
        nbd = bool(re.match(r"nbds?(\+unix)?://", str(status.get("source"))))
        read_only = _is_read_only(status)
        yield from _abilities(abilities, nbd, read_only)
        if not read_only:
            yield from _lacks(abilities, nbd)
    for note in map(str, status.get("notes") or []):
        if not note.startswith("the server cannot flush"):  # an error above
            mend = next((m for begin, m in _NOTES.items() if note.startswith(begin)), _OTHER_NOTES)
            yield Finding("note", Level.WARNING, note, mend.format(mountpoint))
    policy = status.get("policy") or {}
    for direction, key in (("read", "rerror"), ("write", "werror")):
        rules = policy.get(direction) or {}
        error = rules.get(key)
        if error == "retry" and (seconds := rules.get("retry_timeout")):
            yield Finding(
                f"policy, {direction}s",
                Level.NOTE,
                f"an outage is waited out for {seconds:g} s, then: {rules.get('then')}",
                f"healfs policy --{direction}-retry-timeout 0 {mountpoint}",
            )
        elif error not in (None, "retry"):
            yield Finding(
                f"policy, {direction}s",
                Level.NOTE,
                f"{error}: an outage is not waited out",
                f"healfs policy --{key} retry {mountpoint}",
            )


def _abilities(abilities: dict[str, Any], nbd: bool, read_only: bool) -> Iterator[Finding]:
    if read_only:
        yield Finding("backend", Level.OK, "read-only: nothing is to be flushed")
    elif not abilities.get("flush"):
        yield Finding(
            "backend",
            Level.ERROR,
            "it cannot flush: nothing is known to be stable, and there is no write log",
            f"# nbd-server: flush = true; {_BOTH}",
        )
    elif not abilities.get("volatile_cache"):
        yield Finding(
            "backend", Level.OK, "no volatile cache: what is answered is stable; no log is needed"
        )
    else:
        yield Finding("backend", Level.OK, "it flushes; what is not flushed is in the write log")
    if nbd:
        yield Finding("backend", Level.OK, "healfs makes one connection to a server")


def _lacks(abilities: dict[str, Any], nbd: bool) -> Iterator[Finding]:
    for ability, (text, server, file) in _LACKS.items():
        if not abilities.get(ability):
            yield Finding("backend", Level.NOTE, text, server if nbd else file)


def _is_read_only(status: dict[str, Any]) -> bool:
    values = (status.get("configuration") or {}).get("values") or {}
    return bool((values.get("read_only") or {}).get("value"))
