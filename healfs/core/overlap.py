# cython: annotation_typing=False
"""Which outstanding writes touch the same bytes.

A hierarchy of grids: a range lives on the finest grid whose cells are at least as long as it
is, so in one or two cells, whatever its length; a look-up visits the cells of each grid in use
that the asked range touches. Both cost the same with ten ranges outstanding or with ten
thousand (a tree would pay log n, a sorted list a memmove).
"""

from __future__ import annotations

from collections.abc import Iterable


class Range:
    """What has a half-open byte range."""

    __slots__ = ("end", "start")

    start: int
    end: int


_FINEST = 12  # 4 KiB: most requests
_STEP = 4  # sixteen cells of one grid make a cell of the next


def _grid_of(length: int) -> int:
    shift = _FINEST
    while length > 1 << shift:
        shift += _STEP
    return shift


def joined(pieces: Iterable[tuple[int, int]]) -> list[list[int]]:
    """[offset, length] of these (start, end), without overlap, in order."""
    found: list[list[int]] = []
    for start, end in sorted(pieces):
        if found and start <= sum(found[-1]):
            found[-1][1] = max(sum(found[-1]), end) - found[-1][0]
        else:
            found.append([start, end - start])
    return found


class Overlap:
    """An index of ranges; empty ranges are in no cell and overlap nothing."""

    def __init__(self) -> None:
        # A cell holds a range, or a list of two and more: nearly all hold one, and ten thousand
        # lists of one would be nearly a megabyte.
        self._grids: dict[int, dict[int, Range | list[Range]]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, item: Range) -> None:
        start, end = item.start, item.end
        if start >= end:
            return
        shift = _FINEST if end - start <= 4096 else _grid_of(end - start)
        grid = self._grids.get(shift)
        if grid is None:
            grid = self._grids[shift] = {}
        first, last = start >> shift, end - 1 >> shift
        for cell in (first,) if first == last else range(first, last + 1):
            items = grid.get(cell)
            if items is None:
                grid[cell] = item
            elif isinstance(items, list):
                items.append(item)
            else:
                grid[cell] = [items, item]
        self._count += 1

    def add_alone(self, item: Range) -> bool:
        """`add`, if it is seen at a glance that nothing overlaps: one cell, and that one empty.

        Nearly every write is such a one; find and add together cost three times as much.
        """
        start, grids = item.start, self._grids
        cell = start >> _FINEST
        if item.end - 1 >> _FINEST != cell or start >= item.end or len(grids) != 1:
            return False
        grid = grids.get(_FINEST)
        if grid is None or cell in grid:
            return False
        grid[cell] = item
        self._count += 1
        return True

    def remove(self, item: Range) -> None:
        """Raises KeyError or ValueError for what is not in it: a bug of the caller."""
        start, end = item.start, item.end
        if start >= end:
            return
        shift = _FINEST if end - start <= 4096 else _grid_of(end - start)
        grid = self._grids[shift]
        first, last = start >> shift, end - 1 >> shift
        for cell in (first,) if first == last else range(first, last + 1):
            items = grid[cell]
            if items is item:
                del grid[cell]
            elif isinstance(items, list):
                items.remove(item)
                if len(items) == 1:
                    grid[cell] = items[0]
            else:
                raise ValueError("not in the index")
        self._count -= 1
        if not grid:
            del self._grids[shift]

    def find(self, start: int, end: int) -> list[Range]:
        """The ranges that overlap [start, end), each once, in no order."""
        if not self._count or start >= end:
            return []
        found: list[Range] = []
        for shift, grid in self._grids.items():
            first, last = start >> shift, end - 1 >> shift
            if first == last:
                items = grid.get(first)
                if items is None:
                    continue
                if isinstance(items, list):
                    found += [x for x in items if x.start < end and start < x.end]
                elif items.start < end and start < items.end:
                    found.append(items)
                continue
            cells: Iterable[int] = range(first, last + 1)
            if len(grid) < last - first:
                cells = [cell for cell in grid if first <= cell <= last]
            seen: dict[int, Range] = {}
            for cell in cells:
                items = grid.get(cell)
                if items is None:
                    continue
                for x in items if isinstance(items, list) else (items,):
                    if x.start < end and start < x.end:
                        seen[id(x)] = x
            found += seen.values()
        return found
