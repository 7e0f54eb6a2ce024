"""`python -m tests.bench`: healfs beside its peers, in one run. It prints, and asserts nothing.

Each row is one load on disks of the same kind, measured in turn, round after round, so that
what else the machine does meets all of them. A figure is the median of the rounds; a ratio is
the median of the rounds' ratios, healfs to the disk beside it. A row that fails says why, the
others are measured all the same, and the exit status is 1.
"""

from __future__ import annotations

import contextlib
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from tests.bench import crowd, disks, memory, recovery, rounds, standstill
from tests.bench.load import DISK_BYTES, LOADS, PLAIN, FioFailed, Load

console = Console(width=None if sys.stdout.isatty() else 160)
failures: list[str] = []


@dataclass(frozen=True)
class Group:
    """Disks of one kind; `first` is the one whose ratio to the others is printed."""

    name: str
    disks: dict[str, disks.Disk]
    loads: tuple[str, ...]
    where: str | None = None  # the directory that the disks' files lie in; None: in no file

    @property
    def first(self) -> str:
        return next(iter(self.disks))


COST = ("4k-randwrite-qd32", "1m-write-qd8")
# A log of 64 MiB makes healfs flush each 32 MiB, at the disk's speed; with it off a file is never
# flushed, and the page cache is what is measured. A guest that flushes as often makes them equal,
# and on tmpfs a flush costs nothing: what is left is the cost of log and order themselves.
FLUSHED_COST = ("4k-randwrite-qd32-flushed", "1m-write-qd8-flushed")
TMPFS = "/dev/shm"
PLAIN_PYTHON = ", plain Python"
WARM = LOADS["4k-randwrite-qd32"]  # run on each disk, before anything of a group is measured


def groups(beside: Path | None, switch: str, aio: str) -> list[Group]:
    """`beside` is another source tree of healfs, measured as one more peer."""
    name = "healfs" + PLAIN_PYTHON * bool(disks.why_plain())
    file: dict[str, disks.Disk] = {name: disks.healfs_file(switch)}
    nbd: dict[str, disks.Disk] = {name: disks.healfs_nbd(switch)}
    if beside is not None:
        name = "beside" + PLAIN_PYTHON * bool(disks.why_plain(beside))
        file[name] = disks.healfs_file(tree=beside)
        nbd[name] = disks.healfs_nbd(tree=beside)
    logged_file = {"log on": disks.healfs_file(), "log and order off": disks.healfs_file("nolog")}
    logged_nbd = {"log on": disks.healfs_nbd(), "log and order off": disks.healfs_nbd("nolog")}
    file |= {"qemu-storage-daemon": disks.qemu_file(aio), "nbdfuse": disks.nbdfuse_file}
    file["limit"] = disks.limit_file
    nbd |= {"nbdfuse": disks.nbdfuse_nbd, "limit": disks.limit_nbd}
    return [
        Group("file", file, PLAIN, tempfile.gettempdir()),
        Group("tmpfs", file, PLAIN, TMPFS),
        Group("nbd", nbd, PLAIN),
        Group("log-tmpfs", logged_file, COST, TMPFS),
        Group("log-nbd", logged_nbd, COST),
        Group("log-file", logged_file, COST + FLUSHED_COST, tempfile.gettempdir()),
    ]


def measure(group: Group, loads: dict[str, Load], count: int, seconds: float) -> None:
    """All loads of a group on the same disks; prints one table."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(_directory(group.where)))
        kind = f" ({_filesystem(directory)})" if group.where else ""
        table = Table(title=f"{group.name}{kind}: requests a second", title_justify="left")
        table.add_column("load")
        for name in group.disks:
            table.add_column(name, justify="right")
        for name in list(group.disks)[1:]:
            table.add_column(f"{group.first} : {name}", justify="right", style="bold")
        # The first file there is gets the memory that was freed last, in pieces: it is up to a
        # fifth slower, whoever serves it (tried with all disks alike). So this one is first.
        disks.backing_file(directory)
        files: dict[str, Path] = {}
        gone: dict[str, str] = {}
        for number, (name, disk) in enumerate(group.disks.items()):
            files[name] = directory / str(number)
            files[name].mkdir()
            with console.status(f"{group.name}: {name}"):
                try:
                    files[name] = stack.enter_context(disk(files[name]))
                    # healfs's log is memory that nobody has touched, a peer has threads to start.
                    WARM.run(files[name], max(1.0, seconds))
                except (*NOT_THERE, FioFailed) as error:
                    gone[name] = _one_line(error)
        for load_name, load in loads.items():
            with console.status("") as status:

                def now(number: int, name: str, row: str = f"{group.name}/{load_name}") -> None:
                    status.update(f"{row} {number + 1}/{count}: {name}")

                run = partial(load.run, seconds=seconds)
                row = rounds.measure(run, files, count, gone, now)
            table.add_row(load_name, *row.cells())
            for name, why in row.failed.items():
                _failed(f"{group.name}/{load_name}, {name}", why)
        console.print(table)


# What a program that is not there, or does not do what it should, makes of its disk.
NOT_THERE = (OSError, RuntimeError, subprocess.SubprocessError)


def _failed(row: str, why: str) -> None:
    failures.append(f"{row}: {why}")
    _say(f"failed: {failures[-1]}")


def _say(line: str) -> None:
    console.print(line, style="bold red", markup=False, highlight=False, soft_wrap=True)


def _one_line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())


def attempt(row: str, call: Callable[[], None]) -> None:
    """Whatever goes wrong, the rows after it are measured."""
    try:
        call()
    except Exception as error:
        _failed(row, f"{type(error).__name__}: {_one_line(error)}")


def _directory(where: str | None) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="healfs-bench-", dir=where)


def _filesystem(directory: Path) -> str:
    command = ("findmnt", "-n", "-o", "FSTYPE", "-T", directory)
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return printed.split()[-1]  # of those mounted over each other, the last


def print_memory() -> None:
    with tempfile.TemporaryDirectory(prefix="healfs-bench-") as directory:
        found = memory.measure(Path(directory))
    console.print("memory of the worker")
    console.print(f"  idle                     {found.idle / (1 << 20):.1f} MiB")
    console.print(f"  of the log, idle         {found.idle_log / (1 << 20):.1f} MiB")
    console.print(f"  a parked 4 KiB write     {found.parked_write:,.0f} bytes and its payload")
    console.print(f"  a parked 4 KiB read      {found.parked_read:,.0f} bytes")


STANDSTILLS = {
    "standstill": ("the worker's death by kill -9", standstill.kill),
    "upgrade": ("an upgrade", standstill.upgrade),
}


def print_standstill(name: str, what: str, ends: int) -> None:
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="healfs-bench-")))
        if name == "file":
            source: str | Path = disks.backing_file(directory)
        else:
            # One thread: of several, nbdkit 1.32 dies by an assertion when a client goes amid a
            # reply (connections.c, raw_send_socket).
            memory_plugin = ("--threads=1", "memory", str(DISK_BYTES))
            _, source = stack.enter_context(disks.nbdkit(directory, *memory_plugin))
        mount = stack.enter_context(disks.healfs_mount(source, "", None))
        title, end = STANDSTILLS[what]
        with console.status(f"{name}: {title}"):
            found = standstill.measure(mount, ends, end)
    title = f"{name}: I/O stands still for {title}, {ends} times, seconds"
    table = Table(title=title, title_justify="left")
    table.add_column("callers, 4 KiB, queue depth 4")
    for column in ("first answer, median", "worst", "longest wait of one, median", "worst"):
        table.add_column(column, justify="right")
    for group, label in standstill.GROUPS.items():
        cells = []
        for values in (found.first[group], found.longest[group]):
            cells += [f"{statistics.median(values):.3f}", f"{max(values):.3f}"]
        table.add_row(label, *cells)
    console.print(table)


def print_recovery(kind: str, outages: tuple[float, ...], times: int) -> None:
    title = (
        f"recovery-{kind}: the server listens -> the first parked write is answered, ms; "
        f"{times} outages of each length, and up to {recovery.PHASE:g} s more"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("outage")
    for name in recovery.PEERS:
        table.add_column(f"{name}, median", justify="right")
        table.add_column("worst", justify="right")
    for outage in outages:
        cells = []
        for name, peer in recovery.PEERS.items():
            row = f"recovery-{kind}, {outage:g} s, {name}"
            try:
                with console.status(row), _directory(None) as directory:
                    found = recovery.measure(
                        peer, Path(directory), outage, times, tcp=kind == "tcp"
                    )
                cells += [f"{statistics.median(found) * 1e3:,.1f}", f"{max(found) * 1e3:,.1f}"]
            except NOT_THERE as error:
                cells += ["failed", "failed"]
                _failed(row, _one_line(error))
        table.add_row(f"{outage:g} s", *cells)
    console.print(table)


def print_crowd() -> None:
    with _directory(None) as directory:
        let_go = crowd.release(Path(directory))
    console.print(f"10,000 parked writes released, {crowd.ROUNDS} times")
    console.print(f"  a second                       {let_go.released:,.0f}")
    console.print(f"  a second, healthy              {let_go.healthy:,.0f}")
    console.print(f"  longest absence of the loop    {let_go.longest_away * 1e3:.1f} ms")
    for title, measure in (
        ("a read, with entries in the log", crowd.with_log_entries),
        ("a write, parked and released with", crowd.with_parked),
    ):
        with _directory(None) as directory:
            found = measure(Path(directory))
        console.print(f"CPU of the worker for {title}, median of {crowd.ROUNDS}")
        for count, seconds in found.items():
            console.print(f"  {count:>6,}                         {seconds * 1e6:.1f} us")


def print_idle() -> None:
    with _directory(None) as directory:
        share = crowd.idle(Path(directory))
    console.print(f"{crowd.IDLE_MOUNTS} idle mounts: {share:.2%} of a core together")


def _seconds(_: click.Context, __: click.Parameter, given: str) -> tuple[float, ...]:
    try:
        lengths = tuple(float(one) for one in given.split(","))
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) <= 0:
        raise click.BadParameter("seconds, with commas between: 0.5,2")
    return lengths


def _pattern(_: click.Context, __: click.Parameter, given: str) -> re.Pattern[str]:
    try:
        return re.compile(given)
    except re.error as error:
        raise click.BadParameter(f"no regex: {error}") from None


def _tree(_: click.Context, __: click.Parameter, given: Path | None) -> Path | None:
    """Absolute: it is for processes elsewhere. Where it has no healfs, they would find this one."""
    if given is not None and not (given / "healfs/__init__.py").is_file():
        raise click.BadParameter(f"there is no healfs in {given}")
    return given and given.resolve()


@click.command()
@click.option(
    "--rows",
    default="",
    callback=_pattern,
    help="Only rows (GROUP/LOAD, recovery-unix, crowd, standstill-file, upgrade-nbd, idle, memory, "
    "...) that match this regex.",
)
@click.option("--rounds", "count", default=7, show_default=True, type=click.IntRange(1))
@click.option(
    "--kills",
    default=10,
    show_default=True,
    type=click.IntRange(1),
    help="Of the worker, and upgrades, for the standstill.",
)
@click.option(
    "--outages",
    default="0.5,2",
    show_default=True,
    callback=_seconds,
    help="For the recovery, in seconds. All that the goals name: "
    "--outages 0.5,2,10,60 --times 20, which takes two hours.",
)
@click.option(
    "--times", default=5, show_default=True, type=click.IntRange(1), help="Of each outage."
)
@click.option(
    "--seconds",
    default=2.0,
    show_default=True,
    type=click.FloatRange(0.1),
    help="One run of fio, besides 0.3 s that are not measured.",
)
@click.option(
    "--beside",
    type=click.Path(path_type=Path),
    callback=_tree,
    help="Another source tree of healfs: before and after.",
)
@click.option(
    "--aio",
    default="threads",
    show_default=True,
    type=click.Choice(["threads", "io_uring"]),
    help="qemu-storage-daemon's: which is faster depends on the row and the machine.",
)
@click.option("--switch", default="", help="For healfs's worker: see switch/sitecustomize.py.")
def main(
    rows: re.Pattern[str],
    count: int,
    kills: int,
    outages: tuple[float, ...],
    times: int,
    seconds: float,
    beside: Path | None,
    aio: str,
    switch: str,
) -> None:
    """Measure healfs beside qemu-storage-daemon's FUSE export and nbdfuse."""
    plan: list[tuple[str, Callable[[], None]]] = []
    for group in groups(beside, switch, aio):
        wanted = {name: LOADS[name] for name in group.loads if rows.search(f"{group.name}/{name}")}
        if wanted:
            plan.append((group.name, partial(measure, group, wanted, count, seconds)))
    others: dict[str, Callable[[], None]] = {
        f"recovery-{kind}": partial(print_recovery, kind, outages, times)
        for kind in ("unix", "tcp")
    }
    others["crowd"] = print_crowd
    for what in STANDSTILLS:
        for name in ("file", "nbd"):
            others[f"{what}-{name}"] = partial(print_standstill, name, what, kills)
    others |= {"idle": print_idle, "memory": print_memory}
    plan += [(name, call) for name, call in others.items() if rows.search(name)]
    if not plan:
        raise click.BadParameter(f"no row matches {rows.pattern}", param_hint="--rows")
    notes = _notes(beside)
    for line in notes:
        _say(line)
    for name, call in plan:
        attempt(name, call)
    for line in notes:  # again: the first one has long been scrolled away
        _say(line)
    if failures:
        _say(f"{len(failures)} failed:")
        for line in failures:
            _say(f"  {line}")
        sys.exit(1)


def _notes(beside: Path | None) -> list[str]:
    trees: dict[str, Path | None] = {"healfs": None}
    if beside is not None:
        trees[str(beside)] = beside
    return [
        f"{name} runs as plain Python here, not compiled ({why}): its figures say nothing of what "
        "make setup installs where there is a C compiler"
        for name, tree in trees.items()
        if (why := disks.why_plain(tree))
    ]


if __name__ == "__main__":
    main()
