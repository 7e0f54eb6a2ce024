"""The index of ranges against a plain list."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from healfs.core.overlap import Overlap, Range, joined


class Piece(Range):
    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end


LENGTHS = st.one_of(
    st.integers(0, 3),
    st.sampled_from([4095, 4096, 4097, 65535, 65536, 65537, 1 << 20, 1 << 30]),
    st.integers(0, 1 << 22),
)
STARTS = st.one_of(
    st.integers(0, 64), st.integers(0, 1 << 23), st.integers(0, 64).map((4096).__mul__)
)
RANGES = st.tuples(STARTS, LENGTHS).map(lambda pair: (pair[0], pair[0] + pair[1]))
STEPS = st.lists(st.tuples(st.sampled_from(["add", "add", "remove", "find"]), RANGES), max_size=60)


@settings(max_examples=300, deadline=None)
@given(STEPS, st.randoms(use_true_random=False))
def test_as_a_plain_list(steps, rng):
    index, naive = Overlap(), []
    for what, (start, end) in steps:
        if what == "add":
            piece = Piece(start, end)
            index.add(piece)
            naive.append(piece)
        elif what == "remove" and naive:
            piece = naive.pop(rng.randrange(len(naive)))
            index.remove(piece)
        found = index.find(start, end)
        wanted = [
            p for p in naive if p.start < end and start < p.end and start < end and p.start < p.end
        ]
        assert len(found) == len(wanted)
        assert {id(p) for p in found} == {id(p) for p in wanted}
        assert len(index) == sum(p.start < p.end for p in naive)
    for piece in naive:
        index.remove(piece)
    assert len(index) == 0
    assert index.find(0, 1 << 40) == []


def test_removing_what_is_not_in_it_raises():
    index = Overlap()
    piece = Piece(0, 10)
    with pytest.raises((KeyError, ValueError)):
        index.remove(piece)
    index.add(piece)
    with pytest.raises((KeyError, ValueError)):
        index.remove(Piece(0, 10))
    assert index.find(0, 1) == [piece]


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=12))
def test_joined_ranges_are_the_same_bytes(pieces):
    pieces = [(start, start + length) for start, length in pieces]
    found = joined(pieces)
    assert {b for s, e in pieces for b in range(s, e)} == {
        b for s, n in found for b in range(s, s + n)
    }
    assert all(s + n < after for (s, n), (after, _) in itertools.pairwise(found))
