"""The engine in the simulator: a number of seeds, planted bugs, and the simulator itself."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from dataclasses import fields, replace
from typing import cast

import pytest

from healfs.core.engine import Engine
from healfs.core.request import Done, Kind, Request
from tests.sim import plan as plans
from tests.sim.oracle import Violation
from tests.sim.plan import TODAY, WITH_LOG, Fault, Op, Options, Plan
from tests.sim.planted import BUGS, KILLS, Bug
from tests.sim.reference import Reference
from tests.sim.run import Failure, Sum, first_failure, main, run_seed, shrink
from tests.sim.world import World

SEEDS = 800 if "HEALFS_PLAIN" in os.environ else 1600  # make test runs both, of one source
FOUND_WITHIN = 200

# Seeds that failed once, with what was on then and a sum of their plans: what comes to plan.make or
# Options must leave them as they were.
FIRST = replace(
    WITH_LOG, short=False, accept=False, killed=False, probe=False, fua_fails=False, reads_on=False
)
REGRESSIONS: tuple[tuple[int, Options, int], ...] = (
    (6, TODAY, 2618300434),
    (14082, FIRST, 1339332317),
    (13912, FIRST, 1113349256),
    (14169, FIRST, 6442768),
    (14196, FIRST, 1702992510),
    (23, KILLS, 2481264648),
    (123, KILLS, 3036455409),
)


@pytest.mark.parametrize("options", [TODAY, WITH_LOG], ids=["kind", "all"])
@pytest.mark.parametrize("part", range(4))
def test_no_seed_fails(part, options):
    step = SEEDS // 4
    _no_failure(first_failure(range(part * step, (part + 1) * step), options))


@pytest.mark.parametrize("part", range(2))
def test_no_seed_fails_where_the_operator_fails_what_waits(part):
    step = SEEDS // 4
    seeds = range(part * step, (part + 1) * step)
    _no_failure(first_failure(seeds, replace(WITH_LOG, fail=True)))


KINDS_OF_DISKS = ["blocks", "limits", "evicts", "large", "through"]


@pytest.mark.parametrize("name", KINDS_OF_DISKS)
def test_no_seed_fails_on_another_kind_of_disk(name):
    seeds = range(7_000_000, 7_000_000 + SEEDS // 16)
    _no_failure(first_failure(seeds, replace(WITH_LOG, **{name: True})))


def _no_failure(failure: Failure | None) -> None:
    if failure is not None:
        text = "\n".join(["", *shrink(failure).trace(), f"seed {failure.seed}"])
        pytest.fail(text, pytrace=False)


@pytest.mark.parametrize(("seed", "options", "plan"), REGRESSIONS)
def test_seeds_that_once_failed(seed, options, plan):
    entries = [(entry.at, str(entry)) for entry in plans.make(seed, options).entries]
    assert zlib.crc32(repr(entries).encode()) == plan, "it is another plan now"
    assert run_seed(seed, options) is None


@pytest.mark.plain
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_a_planted_bug_is_found(bug: Bug):
    with bug.planted() as make:
        failure = first_failure(range(FOUND_WITHIN), bug.options, make)
        assert failure is not None, "the oracle does not see it"
        assert failure.rule in bug.rules, failure.text


def test_the_oracle_is_fair():
    """Else what it finds proves nothing: a dumb client that waits everything out passes."""

    def make(plan: Plan, trace: list[str] | None) -> World:
        return World(plan, cast(type[Engine], Reference), trace)

    assert (
        first_failure(range(100), replace(WITH_LOG, worker=False, killed=False, inside=True), make)
        is None
    )


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_thousand_seeds(capsys):
    total = Sum()
    for seed in range(10_000):
        failure = run_seed(seed, WITH_LOG, total=total)
        assert failure is None, failure.text
    with capsys.disabled():
        print(f"\n{total}")


@pytest.mark.plain
def test_a_failure_is_reproduced_and_shrunk():
    bug = next(bug for bug in BUGS if bug.name == "overlap ignored")
    with bug.planted() as make:
        failure = first_failure(range(FOUND_WITHIN), bug.options, make)
        assert failure is not None
        again = run_seed(failure.seed, bug.options, make)
        assert again is not None and again.text == failure.text
        short = shrink(failure, make)
        assert len(short.plan.entries) <= 12
        assert short.rule == failure.rule
        assert short.trace(make)[-1].startswith(failure.rule)


@pytest.mark.plain
def test_a_failure_prints_its_seed_and_the_shortest_trace(capsys):
    bug = next(bug for bug in BUGS if bug.name == "overlap ignored")
    with bug.planted() as make:
        assert main(["--seeds", str(FOUND_WITHIN)], make) == 1
    seed, *trace, total = capsys.readouterr().out.splitlines()
    assert seed.startswith("seed ") and seed.split(": ")[1] in bug.rules
    assert trace[-1].split(": ")[0] == seed.split(": ")[1]  # the same rule
    assert sum("guest " in line for line in trace) <= 12
    assert " 1 failed, " in total
    assert main(["--seeds", "2"]) == 0
    assert capsys.readouterr().out.startswith("2 seeds, 0 failed, ")


def test_a_seed_gives_the_same_run_every_time():
    traces = []
    for _ in range(2):
        trace: list[str] = []
        World(plans.make(11), trace=trace).run()
        traces.append(trace)
    assert traces[0] == traces[1] and len(traces[0]) > 1000


BY_CHANCE = {"short", "killed", "probe", "fua_fails"}  # faults that may come to nothing


@pytest.mark.plain
def test_every_fault_and_every_event_occurs():
    """A simulator in which nothing goes wrong proves nothing."""

    seen: Counter[str] = Counter()

    class Counting(World):
        def event(self, name: str, data: dict[str, object]) -> None:
            seen[name] += 1

        def send(self, request: Request, done: Done) -> None:
            if request.internal:
                seen[f"own {request.kind.name}"] += 1
            seen["sent again" if request.attempts > 1 else "sent"] += 1
            super().send(request, done)

        def _answered(self, request: Request, errno: int, data: object) -> None:
            seen[f"{request.kind.name} {'failed' if errno else 'done'}"] += 1
            super()._answered(request, errno, data)

        def accept(self, how: str) -> None:
            seen[f"{how} in {self.engine.state}"] += 1
            super().accept(how)

    for seed in range(100):
        plan = plans.make(seed, WITH_LOG)
        names = {entry.name for entry in plan.entries if isinstance(entry, Fault)}
        seen.update(names - BY_CHANCE)
        world = Counting(plan)
        world.run()
        seen.update(+world.happened)  # not as planned: as it was
    events = {"BLOCK_IO_ERROR", "HEALFS_RECOVERED", "HEALFS_MISMATCH", "STOP", "RESUME"}
    answers = {f"{kind.name} {how}" for kind in Kind for how in ("done", "failed")}
    faults = {f.name for f in fields(WITH_LOG) if getattr(WITH_LOG, f.name)} - {
        "fence",
        "probe",
        "reads_on",
    }
    events |= {"HEALFS_DRAINED", "HEALFS_FENCE_FAILED", "probed away", "probed there"}
    events |= {"replay in mismatch", "drop in mismatch"}
    wanted = events | answers | faults | {"sent again", "own WRITE", "own FLUSH"}
    assert not wanted - set(seen)
    assert seen["sent again"] > 500


# --- the oracle by itself: it must neither be blind nor too strict ------------------------------


def _plan(*entries: Op | Fault, options: Options = WITH_LOG) -> Plan:
    return Plan(1, options, 16, 8, 10.0, entries)


def _op(number: int, kind: Kind, at: float, sector: int = 0, count: int = 1, **more: bool) -> Op:
    return Op(at, number, 0, kind, sector, count, **more)


class Truthful(World):
    """A world in which the tests say what the backend holds."""

    def prepare(self, *ops: Op) -> None:
        for op in ops:
            self.oracle.submitted(op)


def test_a_read_may_see_the_last_done_write_or_any_newer_one():
    world = Truthful(_plan())
    old, new, read = (
        _op(n, kind, 0.0) for n, kind in enumerate((Kind.WRITE, Kind.WRITE, Kind.READ), 1)
    )
    world.prepare(old, new, read)
    world.oracle.read(read, [1 << 8])  # nothing is done yet: anything goes
    world.oracle.done(old)
    world.oracle.read(read, [1 << 8])
    world.oracle.read(read, [2 << 8])
    world.oracle.done(new)
    with pytest.raises(Violation, match="stale read"):
        world.oracle.read(read, [1 << 8])


def test_a_write_asked_for_after_the_read_does_not_bind_it():
    world = Truthful(_plan())
    old, read, new = _op(1, Kind.WRITE, 0.0), _op(2, Kind.READ, 0.0), _op(3, Kind.WRITE, 0.0)
    world.prepare(old, read, new)
    world.oracle.done(old)
    world.oracle.done(new)
    world.oracle.read(read, [1 << 8])
    world.oracle.read(read, [3 << 8])


def test_stable_is_what_was_done_before_the_flush_was_asked_for():
    world = Truthful(_plan())
    first, flush, second = (
        _op(1, Kind.WRITE, 0.0),
        _op(2, Kind.FLUSH, 0.0),
        _op(3, Kind.WRITE, 0.0, 1),
    )
    world.prepare(first)
    world.oracle.done(first)
    world.prepare(flush, second)
    world.oracle.done(second)
    with pytest.raises(Violation, match="stable"):
        world.oracle.done(flush)
    world.prepare(_op(4, Kind.FLUSH, 0.0))
    world.server.disk.write_through(0, 1 << 8)
    with pytest.raises(Violation, match="sector 1"):
        world.oracle.done(_op(4, Kind.FLUSH, 0.0))


def test_stable_storage_never_goes_back():
    world = Truthful(_plan())
    older, newer = _op(1, Kind.WRITE, 0.0), _op(2, Kind.WRITE, 0.0, fua=True)
    world.prepare(older, newer)
    world.server.disk.write_through(0, 2 << 8)
    world.oracle.done(newer)
    with pytest.raises(Violation, match="stable"):
        world.server.disk.write_through(0, 1 << 8)


def test_what_is_in_the_wrong_place_is_garbage():
    world = Truthful(_plan())
    write, read = _op(1, Kind.WRITE, 0.0, 3, 2), _op(2, Kind.READ, 0.0, 3, 2)
    world.prepare(write, read)
    world.oracle.read(read, [1 << 8, 1 << 8 | 1])
    with pytest.raises(Violation, match="garbage"):
        world.oracle.read(read, [1 << 8 | 1, 1 << 8])
