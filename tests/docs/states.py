"""The table of states in healfs-semantics(7), made from healfs.core.states.

`python -m tests.docs.states` writes it into the page; test_man holds the page against it.
"""

from __future__ import annotations

from pathlib import Path

from healfs.core.states import MOVES

PAGE = Path(__file__).parents[2] / "man" / "healfs-semantics.7.scd"
BEGIN, END = "; the table of moves: begin\n", "; the table of moves: end\n"


def table() -> str:
    """As a table of scdoc(5), one row a move."""
    lines = ["[[ *from*", ":[ *to*", ":[ *when*"]
    for old, moves in MOVES.items():
        for new, when in moves.items():
            lines += [f"|  {old}", f":  {new}", f":  {when}"]
    return "\n".join(lines) + "\n"


def split(page: str) -> tuple[str, str, str]:
    """What comes before the table, the table, and what comes after it."""
    before, begin, rest = page.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"no place for the table of moves in {PAGE}")
    return before + begin, inside, end + after


if __name__ == "__main__":
    before, _, after = split(PAGE.read_text())
    PAGE.write_text(f"{before}\n{table()}\n{after}")
