"""What the demo shows: live on a terminal, a plain line a second elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from healfs.cli.demo_load import BLOCK, Report
from healfs.cli.demo_plot import Mark, plot
from healfs.cli.output import console, state_text
from healfs.config import one_line

_REFRESH_EVERY = 0.2  # seconds
_LINE_EVERY = 1.0
_WINDOW = 0.5  # seconds over which the throughput shown is taken


class Screen:
    """A context manager while the load runs; commands are printed above what changes."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds  # how long the load will run, at least
        self.console: Console = console()
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self.samples: list[tuple[float, float]] = []  # CLOCK_MONOTONIC, bytes
        self.report = Report()
        self.state = ""
        self.parked = 0
        self.shown = 0.0
        self.running = False

    def __enter__(self) -> Screen:
        self.running = True
        if self.console.is_interactive:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.running = False
        self.live.stop()

    def command(self, line: str) -> None:
        self._print(Text(f"$ {line}", style="bold"))

    def output(self, text: str) -> None:
        self._print(Text("\n".join(one_line(line) for line in text.splitlines())))

    def say(self, text: str) -> None:
        self._print(Text(f"# {text}", style="dim"))

    def _print(self, text: Text) -> None:
        # Commands are to be copied: a line break in one would break it.
        self.console.print(text, soft_wrap=True)

    def load(self, report: Report) -> None:
        self.report = report
        moved = (report.written + report.compared + report.verified) * BLOCK
        self.samples.append((report.time, moved))

    def status(self, answer: dict[str, Any]) -> None:
        """`healfs status --json`."""
        if self.state != answer["state"]:
            self.shown = 0.0  # what happens is shown when it happens
        self.state = str(answer["state"])
        self.parked = int(answer["requests"]["parked"])

    def refresh(self) -> None:
        every = _REFRESH_EVERY if self.console.is_interactive else _LINE_EVERY
        if not (self.running and self.state) or time.monotonic() < self.shown + every:
            return
        self.shown = time.monotonic()
        if self.console.is_interactive:
            self.live.update(Group(*self._plot((), self.seconds), self._line()), refresh=True)
        else:
            self._print(self._line())

    def _line(self) -> Text:
        one = self.report
        line = Text(f"{self.samples[-1][0] - self.samples[0][0]:5.1f} s  ")
        line.append_text(state_text(self.state)).append(" " * (10 - len(self.state)))
        line.append(f"{self._throughput() / 2**20:4.0f} MiB/s {self.parked:3} parked  ")
        if one.to_verify:
            line.append(f"{one.verified} of {one.to_verify} blocks verified")
        else:
            line.append(f"{one.written} written {one.compared} compared")
        line.append(f" {one.error_count} errors", style="red" if one.error_count else "")
        return line

    def _throughput(self) -> float:
        """Bytes a second just now."""
        end, moved = self.samples[-1]
        start, before = next(s for s in self.samples if s[0] >= end - _WINDOW)
        return (moved - before) / (end - start) if end > start else 0.0

    def _plot(self, marks: Sequence[Mark], span: float | None = None) -> list[Text]:
        lines = plot(
            self.samples,
            marks,
            columns=max(40, min(80, self.console.width)),
            span=span,
            ascii_only=not self.console.encoding.lower().startswith("utf"),
        )
        return [Text(line) for line in lines]

    def plot(self, marks: Sequence[Mark]) -> None:
        """The timeline of all that was."""
        self._print(Text())
        for line in self._plot(marks):
            self._print(line)
        self._print(Text())

    def verdict(self, text: str) -> None:
        self._print(Text(text, style="bold green" if text.startswith("PASS") else "bold red"))
