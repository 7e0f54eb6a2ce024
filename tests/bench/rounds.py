"""One load on several disks, round after round, and what each of them did."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.load import FioFailed


@dataclass
class Row:
    """Figures of each disk, one a round; `failed` says why a disk has none."""

    found: dict[str, list[float]]
    failed: dict[str, str] = field(default_factory=dict)

    def cells(self) -> list[str]:
        """A figure for each disk, and the ratio of the first to each of the others."""
        first, *others = self.found
        return [self._figure(name) for name in self.found] + [
            self._ratio(first, name) for name in others
        ]

    def _figure(self, name: str) -> str:
        return "failed" if name in self.failed else f"{statistics.median(self.found[name]):,.0f}"

    def _ratio(self, first: str, other: str) -> str:
        if first in self.failed or other in self.failed:
            return "-"
        pairs = zip(self.found[first], self.found[other], strict=True)
        ratios = [mine / theirs for mine, theirs in pairs]
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def turns(names: Sequence[str], number: int) -> list[str]:
    """Who runs when in this round: each is the first in its turn, and has one before it in one
    round and behind it in the next."""
    at = number % len(names)
    first, *rest = [*names[at:], *names[:at]]
    return [first, *(reversed(rest) if number % 2 else rest)]


def measure(
    run: Callable[[Path], float],
    files: Mapping[str, Path],
    rounds: int,
    gone: dict[str, str],
    now: Callable[[int, str], None],
) -> Row:
    """`run` makes a figure of a file; `now` is told who runs. `gone` are the disks that are not
    there any more, and why; one that hangs joins them."""
    row = Row({name: [] for name in files}, dict(gone))
    for number in range(rounds):
        for name in turns(list(files), number):
            if name in row.failed:
                continue
            now(number, name)
            os.sync()  # nobody pays for what another, or the row before, left in the page cache
            try:
                row.found[name].append(run(files[name]))
            except FioFailed as failure:
                row.failed[name] = str(failure)
                if failure.hung:
                    gone[name] = f"hung before: {failure}"
    return row
