"""The table of states: closed, connected, and enforced."""

import pytest

from healfs.core.states import MOVES, IllegalMove, State, check_move


def test_every_state_has_its_row_and_every_move_a_reason():
    assert set(MOVES) == set(State)
    assert all(reason for row in MOVES.values() for reason in row.values())


def test_no_state_moves_to_itself():
    assert not [state for state, row in MOVES.items() if state in row]


def test_every_state_is_reached_from_the_first():
    reached, todo = set(), [State.CONNECTING]
    while todo:
        state = todo.pop()
        if state not in reached:
            reached.add(state)
            todo += MOVES[state]
    assert reached == set(State)


def test_every_state_ends_in_closed_and_a_bug_latches_from_every_live_one():
    for state in State:
        if state is not State.CLOSED:
            check_move(state, State.CLOSED)
        if state not in (State.CLOSED, State.FAULTED):
            check_move(state, State.FAULTED)


def test_faulted_and_closed_are_left_for_nothing_else():
    assert set(MOVES[State.FAULTED]) == {State.CLOSED}
    assert not MOVES[State.CLOSED]


@pytest.mark.parametrize("old", State)
@pytest.mark.parametrize("new", State)
def test_what_is_not_in_the_table_raises(old, new):
    if new in MOVES[old]:
        check_move(old, new)
    else:
        with pytest.raises(IllegalMove, match=f"{old} -> {new}"):
            check_move(old, new)
