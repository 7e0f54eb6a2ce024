"""What will happen in one run: operations and faults, made from a seed before anything runs.

A plan is data, so that a failing one can be shrunk by dropping entries.
"""

from __future__ import annotations

import errno as e
import random
from dataclasses import dataclass, fields, replace

from healfs.core.request import Kind

SECTOR = 512
_MASK = (1 << 64) - 1


def chance(*parts: int) -> float:
    """A number from 0 to 1 that depends on the parts only: dropping another entry of a plan
    does not change it."""
    h = 0x9E3779B97F4A7C15
    for part in parts:
        h = ((h ^ part) * 0xBF58476D1CE4E5B9) & _MASK
        h ^= h >> 29
    h = (h * 0x94D049BB133111EB) & _MASK
    return (h >> 11) / (1 << 53)


@dataclass(frozen=True, slots=True)
class Options:
    """The faults by name. TODAY has those above the line, WITH_LOG all but `inside` and `fail`."""

    errno: bool = True  # a few requests fail: failed, lost and refused errnos
    delay: bool = True  # requests that take up to 8 s
    hang: bool = True  # requests that are never answered while the connection lives
    freeze: bool = True  # the server answers nothing for a while
    disconnect: bool = True  # before and after applying, noticed soon or late
    away: bool = True  # and refuses to be reached for a while
    relapse: bool = True  # a server that dies soon after each connection
    torn: bool = True  # a write with no answer, or an error, is applied in part
    enospc: bool = True  # for a while
    bad_sector: bool = True  # unreadable until it is written
    identity: bool = True  # another disk is there for a while
    policy: bool = True  # live changes
    pause: bool = True
    cancel: bool = True  # the guest gives up
    inside: bool = False  # the backend answers before send returns
    fail: bool = False  # the operator has all that waits answered with an error
    # --- with the write log ---
    cache_loss: bool = False  # a disconnect drops the volatile cache
    session_flush: bool = False  # a flush covers the writes of its own connection only
    flush_loses: bool = False  # after a failed flush a bare second one succeeds and does nothing
    late: bool = False  # an abandoned write is applied within the settle time
    fence: bool = False  # a fence is asked for; it may fail
    reconnect: bool = False  # the operator gives up a connection
    worker: bool = False  # the worker dies; its successor finds the memory
    refused_entry: bool = False  # a write is refused for a while after each connection
    short: bool = False  # requests are carried out in two pieces, with time between
    accept: bool = False  # the operator takes another disk for the right one, or drops the log
    killed: bool = False  # the worker dies between two stores of the log's table
    probe: bool = False  # EIO may mean that the storage is away; a probe tells
    reads_on: bool = False  # an abandoned write reads its payload until there is a connection
    fua_fails: bool = False  # the fsync of a FUA write takes the error of all, and tells it late
    # --- what the disk and the engine are like, in every run: see test_sim ---
    blocks: bool = False  # the backend takes whole blocks of several sectors only
    limits: bool = False  # few in flight at once; silence is noticed sooner, later or never
    evicts: bool = False  # what a failed flush could not write is gone at once
    large: bool = False  # payloads of many pages
    through: bool = False  # on some connections there is no volatile cache

    def only(self, names: set[str]) -> Options:
        return replace(
            self, **{f.name: getattr(self, f.name) and f.name in names for f in fields(self)}
        )


TODAY = Options()
WITH_LOG = replace(
    TODAY,
    cache_loss=True,
    session_flush=True,
    flush_loses=True,
    late=True,
    fence=True,
    reconnect=True,
    refused_entry=True,
    worker=True,
    short=True,
    accept=True,
    killed=True,
    probe=True,
    fua_fails=True,
    reads_on=True,
)


@dataclass(frozen=True, slots=True)
class Op:
    """One request of a guest. `cancel` seconds after it was sent the guest gives up (0: never)."""

    at: float
    id: int
    client: int
    kind: Kind
    sector: int
    count: int
    fua: bool = False
    cancel: float = 0.0

    def __str__(self) -> str:
        where = f" {self.sector}+{self.count}" if self.kind is not Kind.FLUSH else ""
        return f"#{self.id} {self.kind.name}{' FUA' if self.fua else ''}{where}"


@dataclass(frozen=True, slots=True)
class Fault:
    """Something bad at `at`, for `seconds`; `number` chooses among its variants."""

    at: float
    name: str
    seconds: float
    number: int

    def __str__(self) -> str:
        return f"{self.name} for {self.seconds:.3f} s ({self.number})"


@dataclass(frozen=True, slots=True)
class Plan:
    seed: int
    options: Options
    sectors: int
    depth: int
    end: float  # virtual seconds until everything is healed
    entries: tuple[Op | Fault, ...]
    settle: float = 5.0


ERRNOS = (e.EIO, e.ENODATA, e.EREMOTEIO, e.ENOMEM, e.ESHUTDOWN, e.ESTALE, e.EOPNOTSUPP)

# Options that are no entries of their own but change how others turn out.
_MANNERS = {
    "torn",
    "cancel",
    "inside",
    "cache_loss",
    "session_flush",
    "late",
    "fence",
}
# Chosen last and by a generator of their own, so that older seeds mean what they meant.
_ADDED = {"short", "accept", "killed", "probe", "fua_fails"}
_BY_SEED = {"reads_on"}  # chance has no part in it, so that older seeds mean what they meant
_ALWAYS = {"blocks", "limits", "evicts", "large", "through"}  # nor in these
_KINDS = [Kind.WRITE] * 9 + [Kind.READ] * 7 + [Kind.FLUSH] * 4
_KINDS += [Kind.WRITE_ZEROES, Kind.DISCARD]


def make(seed: int, options: Options = TODAY, operations: int = 300) -> Plan:
    """The plan of a seed. Each run has some of the faults only: all at once hide each other."""
    rng = random.Random(seed)
    allowed = [f.name for f in fields(options) if getattr(options, f.name)]
    allowed = [name for name in allowed if name not in _BY_SEED | _ALWAYS]
    added = [name for name in allowed if name in _ADDED]
    allowed = [name for name in allowed if name not in _ADDED]
    chosen = {name for name in allowed if name in _MANNERS and rng.random() < 0.8}
    faults = [name for name in allowed if name not in _MANNERS]
    chosen |= set(rng.sample(faults, min(len(faults), rng.randint(1, 6))))
    if "disconnect" in allowed and rng.random() < 0.8:
        chosen.add("disconnect")
    used = options.only(chosen | _BY_SEED | _ALWAYS)
    if seed % 3:
        used = replace(used, **dict.fromkeys(_BY_SEED, False))
    sectors = rng.choice((16, 32, 48, 64))
    clients = rng.randint(1, 4)
    end = rng.choice((2.0, 8.0, 30.0, 120.0))
    span = rng.choice((4, 16, sectors))  # a small span makes many overlaps
    faults_at = [rng.uniform(0, end) for _ in range(rng.randint(3, 16))]
    bursts = [at + rng.uniform(-0.01, 0.01) for at in faults_at] if rng.random() < 0.7 else []
    entries: list[Op | Fault] = []
    for number in range(1, operations + 1):
        at = rng.uniform(0, end)
        if bursts and rng.random() < 0.8:  # many outstanding just when something happens
            at = min(end, max(0.0, rng.choice(bursts) + rng.uniform(-0.01, 0.01)))
        entries.append(_operation(rng, at, number, clients, span, sectors, used))
    names = sorted(chosen - _MANNERS)
    for at in faults_at if names else ():
        seconds = rng.uniform(0, rng.choice((0.05, 0.5, 3.0, 10.0)))
        entries.append(Fault(at, rng.choice(names), seconds, rng.getrandbits(16)))
    rng_added = random.Random(~seed)
    for name in added:
        if len(added) < 3 or rng_added.random() < 0.4:
            used = replace(used, **{name: True})
            for _ in range(rng_added.randint(1, 3)):
                at, seconds = rng_added.uniform(0, end), rng_added.uniform(0, 3.0)
                entries.append(Fault(at, name, seconds, rng_added.getrandbits(16)))
    entries.sort(key=lambda entry: entry.at)
    if used.large:
        sectors *= _LARGER
        entries = [_larger(seed, e) if isinstance(e, Op) else e for e in entries]
    return Plan(seed, used, sectors, rng.choice((1, 2, 4, 8, 16)), end, tuple(entries))


_LARGER = 16


def _larger(seed: int, op: Op) -> Op:
    cut = int(chance(seed, op.id) * _LARGER) if op.count else 0
    first = cut // 3
    return replace(op, sector=op.sector * _LARGER + first, count=op.count * _LARGER - cut)


def _operation(
    rng: random.Random,
    at: float,
    number: int,
    clients: int,
    span: int,
    sectors: int,
    used: Options,
) -> Op:
    kind = rng.choice(_KINDS)
    count = 0 if kind is Kind.FLUSH else rng.choice((1, 1, 1, 2, 3, 4, 8))
    sector = 0 if kind is Kind.FLUSH else rng.randrange(max(1, span - count + 1))
    if rng.random() < 0.01 and count:
        sector = sectors - count + 1  # outside the disk
    fua = kind in (Kind.WRITE, Kind.WRITE_ZEROES) and rng.random() < 0.15
    cancel = rng.choice((0.001, 0.01, 1.0)) if used.cancel and rng.random() < 0.05 else 0.0
    return Op(at, number, rng.randrange(clients), kind, sector, count, fua, cancel)
