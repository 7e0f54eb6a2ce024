"""Throughput over time as lines of block characters."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

HEIGHT = 6
_LABEL = 10  # columns left of the axis
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_EIGHTHS_ASCII = "  ..::##|"


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment to point at below the axis."""

    time: float
    text: str


def plot(
    samples: Sequence[tuple[float, float]],
    marks: Sequence[Mark] = (),
    *,
    columns: int = 80,
    span: float | None = None,
    ascii_only: bool = False,
) -> list[str]:
    """Lines of at most `columns`. Samples: seconds and bytes moved until then, both rising.

    `span` is the time of the right edge; the last sample's if not given.
    """
    if len(samples) < 2:
        return []
    start = samples[0][0]
    end = max(samples[-1][0], start + (span or 0))
    width = columns - _LABEL - 2
    step = (end - start) / width
    until = [_moved(samples, start + step * n) for n in range(width + 1)]
    rates = [(after - before) / step for before, after in pairwise(until)]
    top = max(rates) or 1.0
    glyphs = _EIGHTHS_ASCII if ascii_only else _EIGHTHS
    lines = []
    for row in reversed(range(HEIGHT)):
        label = f"{top / 2**20:.0f} MiB/s" if row == HEIGHT - 1 else "0" if row == 0 else ""
        cells = [_eighths(rate / top * HEIGHT - row) for rate in rates]
        # What flowed at all is seen, so that an empty column means none did.
        if row == 0:
            cells = [max(c, 1) if rate > 0 else 0 for c, rate in zip(cells, rates, strict=True)]
        edge = "|" if ascii_only else "┤" if label else "│"
        lines.append(f"{label:>{_LABEL}}{edge}{''.join(glyphs[c] for c in cells)}".rstrip())
    lines.append(" " * _LABEL + ("+" + "-" * width if ascii_only else "└" + "─" * width))
    placed = [(_LABEL + 1 + int((m.time - start) / step), m.text) for m in marks]
    return lines + _mark_lines([(min(c, columns - 1), t) for c, t in placed], columns)


def _eighths(full: float) -> int:
    return round(8 * min(max(full, 0.0), 1.0))


def _moved(samples: Sequence[tuple[float, float]], time: float) -> float:
    """Bytes moved until `time`, between two samples in proportion."""
    at = bisect_right(samples, (time, float("inf")))
    if at == 0:
        return samples[0][1]
    if at == len(samples):
        return samples[-1][1]
    (t0, b0), (t1, b1) = samples[at - 1], samples[at]
    return b0 + (b1 - b0) * (time - t0) / (t1 - t0)


def _mark_lines(marks: Sequence[tuple[int, str]], columns: int) -> list[str]:
    """Each text stands right of its ^, or left of it at the edge, on the first line with room."""
    lines: list[str] = []
    for column, text in marks:
        fits = column + 2 + len(text) <= columns
        piece = f"^ {text}" if fits else f"{text} ^"
        start = max(0, column if fits else column - len(piece) + 1)
        for n, line in enumerate(lines):
            if len(line) < start:
                lines[n] = line.ljust(start) + piece
                break
        else:
            lines.append(" " * start + piece)
    return lines
