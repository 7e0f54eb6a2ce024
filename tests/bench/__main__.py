"""`python -m tests.bench`: healfs beside its peers, in one run. It prints, and asserts nothing.

Each row is one load on disks of the same kind, measured in turn, round after round, so that
what else the machine does meets all of them. A figure is the median of the rounds; a ratio is
the median of the rounds' ratios, healfs to the disk beside it.
"""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from tests.bench import crowd, disks, memory, recovery, standstill
from tests.bench.load import DISK_BYTES, LOADS, PLAIN, Load

console = Console(width=None if sys.stdout.isatty() else 140)


@dataclass(frozen=True)
class Group:
    """Disks of one kind; `first` is the one whose ratio to the others is printed."""

    name: str
    disks: dict[str, disks.Disk]
    loads: tuple[str, ...]
    where: str | None = None  # the directory that the disks' files lie in

    @property
    def first(self) -> str:
        return next(iter(self.disks))


COST = ("4k-randwrite-qd32", "1m-write-qd8")
# A log of 64 MiB makes healfs flush each 32 MiB, at the disk's speed; with it off a file is never
# flushed, and the page cache is what is measured. A guest that flushes as often makes them equal,
# and on tmpfs a flush costs nothing: what is left is the cost of log and order themselves.
FLUSHED_COST = ("4k-randwrite-qd32-flushed", "1m-write-qd8-flushed")
TMPFS = "/dev/shm"


def groups(beside: Path | None, switch: str) -> list[Group]:
    """`beside` is another source tree of healfs, measured as one more peer."""
    file: dict[str, disks.Disk] = {"healfs": disks.healfs_file(switch)}
    nbd: dict[str, disks.Disk] = {"healfs": disks.healfs_nbd(switch)}
    if beside is not None:
        file["beside"] = disks.healfs_file(tree=beside)
        nbd["beside"] = disks.healfs_nbd(tree=beside)
    logged_file = {"log on": disks.healfs_file(), "log and order off": disks.healfs_file("nolog")}
    logged_nbd = {"log on": disks.healfs_nbd(), "log and order off": disks.healfs_nbd("nolog")}
    file |= {"qemu-storage-daemon": disks.qemu_file, "nbdfuse": disks.nbdfuse_file}
    file["limit"] = disks.limit
    nbd |= {"nbdfuse": disks.nbdfuse_nbd}
    return [
        Group("file", file, PLAIN),
        Group("tmpfs", file, PLAIN, TMPFS),
        Group("nbd", nbd, PLAIN),
        Group("log-tmpfs", logged_file, COST, TMPFS),
        Group("log-nbd", logged_nbd, COST),
        Group("log-file", logged_file, COST + FLUSHED_COST),
    ]


def measure(group: Group, loads: dict[str, Load], rounds: int, seconds: float) -> None:
    """All loads of a group on the same disks; prints one table."""
    table = Table(title=f"{group.name}: requests a second", title_justify="left")
    table.add_column("load")
    for name in group.disks:
        table.add_column(name, justify="right")
    for name in list(group.disks)[1:]:
        table.add_column(f"{group.first} : {name}", justify="right", style="bold")
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(_directory(group.where)))
        # The first file there is gets the memory that was freed last, in pieces: it is up to a
        # fifth slower, whoever serves it (tried with all disks alike). So this one is first.
        disks.backing_file(directory)
        files = {}
        for number, (name, disk) in enumerate(group.disks.items()):
            (directory / str(number)).mkdir()
            files[name] = stack.enter_context(disk(directory / str(number)))
        for load_name, load in loads.items():
            found: dict[str, list[float]] = {name: [] for name in files}
            for number in range(rounds):
                for name, file in files.items():
                    if load.writes:
                        os.sync()  # nobody pays for what another has left in the page cache
                    with console.status(f"{group.name} {load_name} {number + 1}/{rounds}: {name}"):
                        found[name].append(load.run(file, seconds))
            table.add_row(load_name, *_figures(found))
    console.print(table)


def _directory(where: str | None) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="healfs-bench-", dir=where)


def _figures(found: dict[str, list[float]]) -> list[str]:
    first, *others = found.values()
    cells = [f"{statistics.median(values):,.0f}" for values in found.values()]
    for values in others:
        ratios = [mine / theirs for mine, theirs in zip(first, values, strict=True)]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return cells


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


def print_recovery(outages: tuple[float, ...], times: int) -> None:
    title = f"recovery: the server listens -> the first parked write is answered, {times} times, ms"
    table = Table(title=title, title_justify="left")
    table.add_column("outage")
    for name in recovery.PEERS:
        table.add_column(f"{name}, median", justify="right")
        table.add_column("worst", justify="right")
    for outage in outages:
        cells = []
        for peer in recovery.PEERS.values():
            with _directory(None) as directory:
                found = recovery.measure(peer, Path(directory), outage, times)
            cells += [f"{statistics.median(found) * 1e3:,.1f}", f"{max(found) * 1e3:,.1f}"]
        table.add_row(f"{outage:g} s", *cells)
    console.print(table)


def print_crowd() -> None:
    with _directory(None) as directory:
        let_go = crowd.release(Path(directory))
    console.print("10,000 parked writes released")
    console.print(f"  a second                       {let_go.released:,.0f}")
    console.print(f"  a second, healthy              {let_go.healthy:,.0f}")
    console.print(f"  longest absence of the loop    {let_go.longest_away * 1e3:.1f} ms")
    for title, measure in (
        ("a read, with entries in the log", crowd.with_log_entries),
        ("a write, parked and released with", crowd.with_parked),
    ):
        with _directory(None) as directory:
            found = measure(Path(directory))
        console.print(f"CPU of the worker for {title}")
        for count, seconds in found.items():
            console.print(f"  {count:>6,}                         {seconds * 1e6:.1f} us")


def print_idle() -> None:
    with _directory(None) as directory:
        share = crowd.idle(Path(directory))
    console.print(f"{crowd.IDLE_MOUNTS} idle mounts: {share:.2%} of a core together")


@click.command()
@click.option(
    "--rows",
    default="",
    help="Only rows (GROUP/LOAD, recovery, crowd, standstill-file, upgrade-nbd, idle, memory, ...) "
    "that match this regex.",
)
@click.option("--rounds", default=7, show_default=True)
@click.option(
    "--kills",
    default=10,
    show_default=True,
    help="Of the worker, and upgrades, for the standstill.",
)
@click.option("--outages", default=5, show_default=True, help="Of each length, for the recovery.")
@click.option("--minute", is_flag=True, help="Outages of 60 s, too.")
@click.option("--seconds", default=2.0, show_default=True, help="One run of fio.")
@click.option(
    "--beside",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Another source tree of healfs: before and after.",
)
@click.option("--switch", default="", help="For healfs's worker: see switch/sitecustomize.py.")
def main(
    rows: str,
    rounds: int,
    kills: int,
    outages: int,
    minute: bool,
    seconds: float,
    beside: Path | None,
    switch: str,
) -> None:
    """Measure healfs beside qemu-storage-daemon's FUSE export and nbdfuse."""
    for group in groups(beside, switch):
        wanted = {
            name: LOADS[name] for name in group.loads if re.search(rows, f"{group.name}/{name}")
        }
        if wanted:
            measure(group, wanted, rounds, seconds)
    if re.search(rows, "recovery"):
        print_recovery(recovery.OUTAGES + (60.0,) * minute, outages)
    if re.search(rows, "crowd"):
        print_crowd()
    for what in STANDSTILLS:
        for name in ("file", "nbd"):
            if re.search(rows, f"{what}-{name}"):
                print_standstill(name, what, kills)
    if re.search(rows, "idle"):
        print_idle()
    if re.search(rows, "memory"):
        print_memory()


if __name__ == "__main__":
    main()
