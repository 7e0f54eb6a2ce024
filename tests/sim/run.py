"""Run seeds: `python -m tests.sim.run --seeds 100 [--seed 7] [--trace] [--log | --today]`.

A failure prints its seed, the rule that was broken and the shortest trace found.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from tests.sim import plan as plans
from tests.sim.oracle import Violation
from tests.sim.plan import Options, Plan
from tests.sim.world import World

MakeWorld = Callable[[Plan, list[str] | None], World]


def make_world(plan: Plan, trace: list[str] | None) -> World:
    return World(plan, trace=trace)


@dataclass(slots=True)
class Failure:
    seed: int
    rule: str
    text: str
    plan: Plan

    def trace(self, make: MakeWorld = make_world) -> list[str]:
        lines: list[str] = []
        verdict = _violation(self.plan, make, lines)
        return [*lines, str(verdict)]


@dataclass(slots=True)
class Sum:
    seeds: int = 0
    requests: int = 0
    events: int = 0
    virtual_seconds: float = 0.0


def run_seed(
    seed: int,
    options: Options = plans.TODAY,
    make: MakeWorld = make_world,
    total: Sum | None = None,
) -> Failure | None:
    """None: nothing found. The failure's plan is the whole one: see shrink."""
    plan = plans.make(seed, options)
    violation = _violation(plan, make, None, total)
    if violation is None:
        return None
    return Failure(seed, violation.rule, str(violation), plan)


def _violation(
    plan: Plan, make: MakeWorld, trace: list[str] | None, total: Sum | None = None
) -> Violation | None:
    world = make(plan, trace)
    try:
        world.run()
    except Violation as violation:
        return violation
    finally:
        if total is not None:
            total.seeds += 1
            total.requests += world.requests
            total.events += world.events
            total.virtual_seconds += world.virtual_seconds
    return None


def shrink(failure: Failure, make: MakeWorld = make_world, runs: int = 600) -> Failure:
    """Drop entries of the plan, ever smaller pieces, while the same rule is broken."""
    entries, best = list(failure.plan.entries), failure
    size = max(1, len(entries) // 2)
    while runs > 0:
        at, dropped = 0, False
        while at < len(entries) and runs > 0:
            tried = entries[:at] + entries[at + size :]
            plan = replace(failure.plan, entries=tuple(tried))
            runs -= 1
            violation = _violation(plan, make, None)
            if violation is not None and violation.rule == failure.rule:
                entries, dropped = tried, True
                best = Failure(failure.seed, failure.rule, str(violation), plan)
            else:
                at += size
        if size == 1 and not dropped:
            break
        size = max(1, size // 2)
    return best


def first_failure(
    seeds: range, options: Options = plans.TODAY, make: MakeWorld = make_world
) -> Failure | None:
    for seed in seeds:
        failure = run_seed(seed, options, make)
        if failure is not None:
            return failure
    return None


def main(arguments: list[str] | None = None, make: MakeWorld = make_world) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.run", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--seed", type=int, help="the first one (default 0); alone: only this one")
    parser.add_argument("--trace", action="store_true", help="print everything that happens")
    parser.add_argument("--log", action="store_true", help="with the faults that the log is for")
    parser.add_argument("--with", dest="extra", default="", help="more options, by name: a,b")
    parser.add_argument("--keep-going", action="store_true")
    given = parser.parse_args(arguments)
    options = plans.WITH_LOG if given.log else plans.TODAY
    options = replace(options, **{name: True for name in given.extra.split(",") if name})
    first = given.seed or 0
    count = (
        1 if given.seed is not None and "--seeds" not in (arguments or sys.argv) else given.seeds
    )
    total, began, failed = Sum(), time.perf_counter(), 0
    for seed in range(first, first + count):
        failure = run_seed(seed, options, make, total)
        if failure is None:
            continue
        failed += 1
        print(f"seed {seed}: {failure.text.splitlines()[0]}")
        if not given.keep_going:
            short = failure if given.trace else shrink(failure, make)
            print("\n".join(short.trace(make)))
            break
    seconds = time.perf_counter() - began
    print(
        f"{total.seeds} seeds, {failed} failed, {total.requests} requests, {total.events} events, "
        f"{total.virtual_seconds / 3600:.2f} simulated hours in {seconds:.1f} s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
